"""Executors: where measurements run."""
