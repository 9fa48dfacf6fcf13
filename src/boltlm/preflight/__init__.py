"""Checks of params.yaml, of what it names and of the machine, before anything costs time."""
