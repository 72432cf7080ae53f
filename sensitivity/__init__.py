"""Bitplan: sensitivity."""
