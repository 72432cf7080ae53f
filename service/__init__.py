"""Bitplan: service."""
