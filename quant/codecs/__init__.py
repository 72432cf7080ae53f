"""Codecs of the format families beyond integers: torch halves of the files of the same name in `quant`."""
