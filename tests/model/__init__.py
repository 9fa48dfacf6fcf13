"""Tests of boltlm.model."""
