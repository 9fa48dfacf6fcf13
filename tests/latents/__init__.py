"""Tests of boltlm.latents."""
