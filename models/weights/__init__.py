"""Weights files: where they come from, how they are read, and which model they fit."""
