"""Tests of boltlm.corpus."""
