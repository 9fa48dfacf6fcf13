"""Sequences become checkpoints."""
