"""Baselines that learn the same tasks by other means."""
