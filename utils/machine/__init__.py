"""The machine a run works on: its processes, number formats, memory and signals."""
