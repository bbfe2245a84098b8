"""Measuring quality: statistics and stored results."""
