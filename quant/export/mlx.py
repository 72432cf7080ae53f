"""MLX: `config.json` with `quantization`, and the same again under `quantization_config`.

MLX's affine mode stores a scale and a bias of 16 bits for every group, for symmetric plans too: those are
refused, and an asymmetric plan's bytes in MLX are told by `stored_bytes`. Its nvfp4 mode has no scale for the
whole tensor, without which the stored numbers are others than those measured: refused.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import Takes, only_formats, only_ops

FILE = "config.json"
TAKES = (
    Takes("int", asymmetric=(2, 3, 4, 5, 6, 8), scales=(32, 64, 128)),
    Takes("mxfp4"),
    Takes("mxfp8"),
)
OPS = ("linear", "embedding")


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the rules of MLX's modes."""
    return (
        *only_ops(deployment, OPS),
        *only_formats(deployment, *TAKES),
    )


def files(deployment: Deployment) -> dict[str, bytes]:
    """The model's own configuration with the plan in it; modules that keep their precision say false."""
    entries = {name: _entry(facts) for name, facts in deployment.quantized.items()}
    most = Counter(deployment.quantized.values()).most_common(1)[0][0]
    alone = {module.name: False for module in deployment.untouched if module.op in OPS}
    quantization = {**_entry(most), **entries, **alone}
    config = {
        **deployment.model.config,
        "quantization": quantization,
        "quantization_config": quantization,
    }
    return {FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _entry(facts: WeightFacts) -> dict[str, Any]:
    mode = "affine" if facts.kind == "int" else facts.kind
    return {"group_size": facts.group_size, "bits": facts.bits, "mode": mode}


def stored_bytes(deployment: Deployment) -> int:
    """Packed values, and per group a scale and a bias of 16 bits each; MX formats have a scale of 8 bits."""
    stored = deployment.kept_bytes
    for name, layer in deployment.quantized_layers.items():
        facts = deployment.quantized[name]
        assert facts.group_size is not None, "the linter refuses such plans"
        beside = 4 if facts.kind == "int" else 1
        stored += layer.parameters * facts.bits // 8 + layer.parameters // facts.group_size * beside
    return stored


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """What `mlx.nn.quantize` makes of every module, asked as mlx-lm's loader asks it."""
    from mlx import nn

    config = json.loads(exported[FILE])
    if config["quantization"] != config["quantization_config"]:
        raise ValueError("quantization and quantization_config must be equal. Export again.")
    quantization = config["quantization"]
    found: dict[str, WeightFacts | None] = {}
    for module in model.modules:
        if module.op in OPS:
            leaf = nn.Linear(1024, 8) if module.op == "linear" else nn.Embedding(8, 1024)
            tree = _Tree(module.name, leaf)
            nn.quantize(
                tree.model,
                group_size=quantization["group_size"],
                bits=quantization["bits"],
                mode=quantization["mode"],
                class_predicate=lambda path, _: quantization.get(path, False),
            )
            found[module.name] = _facts(tree.leaf())
        else:
            found[module.name] = None
    return found


class _Tree:
    """An MLX model that holds one module at its path."""

    def __init__(self, path: str, leaf: Any) -> None:
        from mlx import nn

        self.path, self.model = path.split("."), nn.Module()
        place = self.model
        for part in self.path[:-1]:
            place[part] = nn.Module()
            place = place[part]
        place[self.path[-1]] = leaf

    def leaf(self) -> Any:
        place: Any = self.model
        for part in self.path:
            place = place[part]
        return place


def _facts(module: Any) -> WeightFacts | None:
    if not hasattr(module, "scales"):
        return None
    kind = "int" if module.mode == "affine" else module.mode
    return WeightFacts(kind, module.bits, kind != "int", "group", module.group_size)
