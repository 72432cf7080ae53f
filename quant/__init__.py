"""Bitplan: quant."""
