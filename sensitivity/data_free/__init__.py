"""Bitplan: one metric per file."""
