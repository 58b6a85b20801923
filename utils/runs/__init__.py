"""The folder of a run: its files, its checkpoint, the arguments it was started with."""
