"""Faults injected into the smoke graph, and what is left of the experiment afterwards."""
