"""Metrics: one file per measure, from features to value."""
