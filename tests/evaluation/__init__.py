"""Tests of boltlm.evaluation."""
