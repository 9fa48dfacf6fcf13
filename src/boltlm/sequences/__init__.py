"""Chunks and latents become training sequences and prompts."""
