"""Tests of boltlm.sampling."""
