"""Noise predictors of the diffusers library: which classes are built, and nothing else. Front: no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quant.digest import DIFFUSERS_CLASS
from sensitivity.errors import BadModel

CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")


def diffusers_class(config: Mapping[str, Any]) -> str | None:
    """The class that a diffusers config.json names; None for a configuration of another library.

    Raises BadModel for a class that is not one of CLASSES.

    >>> diffusers_class({"_class_name": "UNet2DModel"}), diffusers_class({"model_type": "llama"})
    ('UNet2DModel', None)
    """
    name = config.get(DIFFUSERS_CLASS)
    if name is None:
        return None
    if name not in CLASSES:
        raise BadModel(
            f"a diffusers model must be one of {', '.join(CLASSES)}. Got {str(name)[:80]!r}. Send the folder"
            " of the pipeline's unet or transformer."
        )
    return str(name)


def load_class(name: str) -> Any:
    """One of CLASSES itself; loads torch. Raises BadModel where diffusers is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise BadModel(
            f"{name} needs the diffusers library. Got none installed: pip install 'bitplan[diffusion]'."
        ) from error
    return getattr(diffusers, name)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of diffusers: what it would warn of is refused by name."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
