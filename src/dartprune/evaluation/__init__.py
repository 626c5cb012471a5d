"""Measuring quality; uses the public API like any user."""
