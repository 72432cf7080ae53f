"""torchvision beside another build of torch: what its import needs."""

from __future__ import annotations

import sys

import torch


def declare_missing_operators() -> None:
    """Name torchvision's operators where its wheel is of another build than torch, so that it can be
    imported; they must not be called.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            )
