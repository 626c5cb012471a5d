"""The knowledge-drift study: what happens inside a pruned model when the topic changes (method.md section 10)."""
