"""Rules that several consumers share; each yields its violations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from quant.export.protocol import Deployment, Violation

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Siblings that serving runtimes load as one matrix."""


def only_ops(deployment: Deployment, ops: Collection[str]) -> Iterator[Violation]:
    """Only modules of these kinds may be quantized."""
    for name, layer in deployment.layers.items():
        if layer.op not in ops:
            yield Violation(name, f"only {', '.join(ops)} modules can be quantized", f"a {layer.op} module")


def only_integers(deployment: Deployment) -> Iterator[Violation]:
    """Weights must be integers with scales, activations at full precision."""
    for name, facts in deployment.facts.items():
        if facts is None:
            yield Violation(
                name, "weights must be plain integers with scales", deployment.layers[name].scheme
            )


def only_widths(
    deployment: Deployment, symmetric: Collection[int], asymmetric: Collection[int]
) -> Iterator[Violation]:
    """Integer widths that have kernels, with and without zero points."""
    for name, facts in deployment.facts.items():
        if facts is not None:
            kind, widths = ("symmetric", symmetric) if facts.symmetric else ("asymmetric", asymmetric)
            if facts.bits not in widths:
                allowed = ", ".join(map(str, widths)) or "none"
                rule = f"{kind} weights must have a width of {allowed} bits"
                yield Violation(name, rule, deployment.layers[name].scheme)


def only_groups(deployment: Deployment, sizes: Collection[int | None]) -> Iterator[Violation]:
    """Group sizes that have kernels (None: one scale per output channel); groups must divide the columns."""
    for name, facts in deployment.facts.items():
        if facts is None:
            continue
        layer = deployment.layers[name]
        if facts.granularity == "tensor" or facts.group_size not in sizes:
            allowed = ", ".join("one per channel" if size is None else f"groups of {size}" for size in sizes)
            yield Violation(name, f"scales must be {allowed}", layer.scheme)
        elif facts.group_size is not None and layer.matrix[1] % facts.group_size:
            rule = "the group size must divide the columns"
            yield Violation(name, rule, f"{layer.scheme} for {layer.matrix[1]} columns")


def fused_agree(deployment: Deployment) -> Iterator[Violation]:
    """Modules that are loaded as one matrix must get one scheme, or all keep their precision."""
    sets: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for module in deployment.model.modules:
        parent, _, last = module.name.rpartition(".")
        for number, members in enumerate(FUSED):
            if last in members:
                sets[parent, number].append(module.name)
    for names in sets.values():
        found = {name: _scheme(deployment, name) for name in names}
        if len(set(found.values())) > 1:
            rule = f"it is loaded as one matrix with {', '.join(names[1:])}, so their schemes must be equal"
            yield Violation(names[0], rule, ", ".join(found.values()))


def _scheme(deployment: Deployment, name: str) -> str:
    layer = deployment.layers.get(name)
    return "full precision" if layer is None else layer.scheme
