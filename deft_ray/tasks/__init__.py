"""Tasks: rows, prompts, tokens, scores."""
