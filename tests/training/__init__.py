"""Tests of boltlm.training."""
