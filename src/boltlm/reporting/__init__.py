"""Metrics become figures, a report, and runs in MLflow."""
