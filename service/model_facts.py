"""What exports and checkpoints must know of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant.export.protocol import ModelFacts
from quant.plan import Plan


def model_facts(folder: Path, plan: Plan) -> ModelFacts:
    """The modules and the configuration of a model folder; its weights are not loaded.

    Raises ValueError where the folder is no model, or not the plan's.
    """
    from quant.inventory import take_inventory
    from sensitivity.model_loading import load_skeleton

    skeleton = load_skeleton(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ModelFacts.of(take_inventory(skeleton, include=list(plan.layers)), config)
