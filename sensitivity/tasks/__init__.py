"""Bitplan: one task per file."""
