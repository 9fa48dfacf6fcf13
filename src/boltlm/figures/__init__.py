"""Measures become pictures and a report."""
