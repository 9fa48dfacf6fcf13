"""Chunks get the thoughts that a teacher has about them."""
