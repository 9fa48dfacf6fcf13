"""Tests of boltlm.sequences."""
