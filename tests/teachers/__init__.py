"""Tests of boltlm.teachers."""
