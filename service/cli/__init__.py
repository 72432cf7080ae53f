"""Bitplan: service/cli."""
