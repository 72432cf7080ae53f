"""What a peer is asked and how it answers: the part of the peers' benchmark that runs in their environments.

    with Asked.of(sys.argv[1]) as asked:
        asked.answer(plans, seconds)

Needs torch, transformers and safetensors alone. The folder holds `asked.json`; `answer.json` is written.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

BATCH = 8
WHOLE_ROWS, WHOLE_TENSOR = "channel", "tensor"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Scheme:
    """A symmetric integer format by the name that Bitplan has for it: w4, w4-tensor, w4-g32."""

    name: str
    bits: int
    group: int | str

    @classmethod
    def of(cls, name: str) -> Scheme:
        """The scheme of a name, which must be one of those three kinds.

        >>> Scheme.of("w3-g48")
        Scheme(name='w3-g48', bits=3, group=48)
        """
        width, _, group = name.partition("-")
        if group in ("", WHOLE_TENSOR):
            return cls(name, int(width[1:]), group or WHOLE_ROWS)
        return cls(name, int(width[1:]), int(group[1:]))


class Asked:
    """One model, samples, layers, a menu and budgets; `option` picks among the peer's ways to search.

    `budgets` are bits per weight as the peer counts them; `layers` are the ones that get a scheme.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        given = json.loads((folder / "asked.json").read_text())
        self.model_folder = Path(given["model"])
        self.kind: str = given["kind"]
        self.layers: list[str] = given["layers"]
        self.schemes = [Scheme.of(name) for name in given["schemes"]]
        self.budgets: list[float] = given["budgets"]
        self.option: str = given["option"]
        self._samples = Path(given["samples"])
        random.seed(0)
        torch.manual_seed(0)
        torch.set_num_threads(1)

    @classmethod
    def from_command(cls) -> Asked:
        """As the driver asks: the folder is the only argument."""
        return cls(Path(sys.argv[1]))

    def model(self) -> nn.Module:
        """The trained model in evaluation mode, float32."""
        from transformers import AutoModelForCausalLM, AutoModelForImageClassification
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        kinds = {"lm": AutoModelForCausalLM, "cnn": AutoModelForImageClassification}
        return kinds[self.kind].from_pretrained(self.model_folder, dtype=torch.float32).eval()

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """All calibration samples by the name of the model's input, with `labels`."""
        from safetensors.torch import load_file

        return load_file(self._samples)

    @property
    def inputs(self) -> str:
        """The name of the model's main input."""
        return "input_ids" if self.kind == "lm" else "pixel_values"

    def batches(self) -> list[dict[str, Tensor]]:
        """The samples in micro-batches."""
        count = len(self.samples[self.inputs])
        return [
            {name: rows[start : start + BATCH] for name, rows in self.samples.items()}
            for start in range(0, count, BATCH)
        ]

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says about a batch."""
        return model(**{name: rows for name, rows in batch.items() if name != "labels"}).logits

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross entropy: of next tokens, or of classes."""
        labels = batch["labels"]
        if self.kind == "lm":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits.float(), labels)

    def answer(self, package: str, plans: Mapping[float, Mapping[str, str]], seconds: float) -> None:
        """Write the plans (budget -> layer -> scheme) and how long the search took."""
        found: dict[str, Any] = {
            "package": package,
            "version": version(package),
            "seconds": seconds,
            "plans": {f"{budget:g}": dict(plan) for budget, plan in plans.items()},
        }
        (self.folder / "answer.json").write_text(json.dumps(found, indent=1))


def timed(run: Callable[[], _T]) -> tuple[_T, float]:
    """What a function returns, and the seconds of the processor that it took."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start
