"""Bitplan: search."""
