"""The tools that plan bits too: how each is asked, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import PeerFailed, environment, run_script

BESIDE = ("transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Peer:
    """A tool's way to search: its environment and packages, its script in peers/, and what that is told.

    `kinds` are the models that it takes; `refuses` says why it does not take the others.
    """

    name: str
    environment: str
    packages: tuple[str, ...]
    script: str
    option: str = ""
    kinds: tuple[str, ...] = ("lm", "cnn")
    refuses: str = ""


MODELOPT = ("modelopt", ("nvidia-modelopt", "requests"), "modelopt_plans.py")
AUTOROUND = ("autoround", ("auto-round", "requests"), "autoround_plans.py")
MCT = ("mct", ("model-compression-toolkit", "torchvision"), "mct_plans.py")
NNCF = ("nncf", ("nncf", "openvino"), "nncf_plans.py")
AIMET = ("aimet", ("aimet-torch",), "aimet_plans.py")
PEERS = (
    Peer("ModelOpt gradient", *MODELOPT, "gradient"),
    Peer("ModelOpt gradient, no ties", *MODELOPT, "gradient untied", ("lm",), "has no ties here"),
    Peer("ModelOpt kl_div", *MODELOPT, "kl_div"),
    Peer("AutoRound AutoScheme", *AUTOROUND, "", ("lm",), "takes language models alone"),
    Peer("MCT", *MCT, "average"),
    Peer("MCT Hessian", *MCT, "hessian", ("cnn",), "needs over 7 minutes of CPU for its Hessians here"),
    Peer("NNCF", *NNCF),
    Peer("AIMET AMP", *AIMET),
)


@dataclass(frozen=True)
class Answer:
    """What a peer found: budget -> layer -> scheme, with its version and CPU seconds."""

    version: str
    seconds: float
    plans: Mapping[float, Mapping[str, str]]

    @classmethod
    def of(cls, layers: Collection[str], found: Mapping[str, Any]) -> Answer:
        """From the peer's JSON. Raises PeerFailed unless each plan names every layer and no other one."""
        for budget, plan in found["plans"].items():
            if plan.keys() != set(layers):
                wrong = ", ".join(sorted(plan.keys() ^ set(layers))[:3])
                raise PeerFailed(f"a plan must name the model's {len(layers)} layers. At {budget}: {wrong}")
        plans = {float(budget): plan for budget, plan in found["plans"].items()}
        return cls(f"{found['package']} {found['version']}", found["seconds"], plans)


def ask(peer: Peer, place: Path, asked: Mapping[str, Any]) -> Answer:
    """What a peer answers to this in its environment, from the place if its answer lies there.

    `asked` is what peers/asked.py reads. Raises PeerFailed.
    """
    answer = place / "answer.json"
    if not answer.exists():
        if asked["kind"] not in peer.kinds:
            raise PeerFailed(peer.refuses)
        python = environment(peer.environment, *peer.packages, *BESIDE)
        place.mkdir(parents=True, exist_ok=True)
        (place / "asked.json").write_text(json.dumps(asked))
        run_script(python, Path(__file__).parent / "peers" / peer.script, place)
    return Answer.of(asked["layers"], json.loads(answer.read_text()))
