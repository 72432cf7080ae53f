"""Quantizers: one paper, one file."""
