"""Models of a hub (huggingface.co, or a mirror with its API), at one commit that never moves."""
