"""The loop: what is live while a pruner is attached to a model."""
