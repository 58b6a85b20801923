"""What one training step and one epoch do, and what a run carries from step to step."""
