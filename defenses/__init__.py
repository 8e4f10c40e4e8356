"""Defenses: one file per method, from top to bottom."""
