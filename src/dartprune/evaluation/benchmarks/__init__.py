"""Benchmarks of lm-evaluation-harness, perplexity and summaries, by recipes."""
