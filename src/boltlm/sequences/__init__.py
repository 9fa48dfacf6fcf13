"""Chunks and latents become training sequences and prompts (docs/method.md, section 3)."""
