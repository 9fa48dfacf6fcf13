"""Tests of boltlm.estep."""
