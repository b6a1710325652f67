"""Criteria: which channels matter."""
