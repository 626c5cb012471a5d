"""Token selectors at work."""
