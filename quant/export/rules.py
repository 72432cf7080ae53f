"""Rules that several consumers share; each yields its violations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from quant.export.protocol import Deployment, Violation, WeightFacts
from quant.kv_cache import cache_faults
from quant.layers import EXPERT_OPS

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Siblings that serving runtimes load as one matrix."""
CHANNEL, TENSOR = "channel", "tensor"


@dataclass(frozen=True)
class Takes:
    """A number type that a consumer takes, and with what.

    `symmetric` and `asymmetric` are the widths without and with zero points, for the kind "int".
    `scales` are "tensor", "channel", "group" (of any size) and group sizes; None takes any. `activations`
    are names of activation formats, None for activations at their own precision. With `whole_groups` the
    group size must divide the columns.
    """

    kind: str
    symmetric: Collection[int] = ()
    asymmetric: Collection[int] = ()
    scales: Collection[str | int] | None = None
    activations: Collection[str | None] = (None,)
    whole_groups: bool = True

    def fault(self, facts: WeightFacts, columns: int) -> tuple[int, str] | None:
        """The first rule that facts of this kind break and how many they keep before it, or None."""
        sign, widths = ("symmetric", self.symmetric) if facts.symmetric else ("asymmetric", self.asymmetric)
        if facts.kind == "int" and facts.bits not in widths:
            return 0, f"{sign} weights must have a width of {', '.join(map(str, widths)) or 'none'} bits"
        grain = facts.granularity if facts.group_size is None else facts.group_size
        if self.scales is not None and not {grain, facts.granularity} & set(self.scales):
            shown = (
                f"one per {item}" if isinstance(item, str) else f"groups of {item}" for item in self.scales
            )
            return 1, f"scales must be {', '.join(shown)}"
        if facts.group_size == 1:
            return 1, "a group must hold at least 2 columns"
        if self.whole_groups and facts.group_size is not None and columns % facts.group_size:
            return 2, f"the group size must divide the {columns} columns"
        return None


def only_ops(deployment: Deployment, ops: Collection[str]) -> Iterator[Violation]:
    """Only modules of these kinds may be quantized."""
    for name in deployment.quantized:
        op = deployment.layers[name].op
        if op not in ops:
            yield Violation(name, f"only {', '.join(ops)} modules can be quantized", f"a {op} module")


def no_additions(deployment: Deployment) -> Iterator[Violation]:
    """Quantizers may store nothing beside the tensors of their format."""
    for name in deployment.quantized:
        scheme = deployment.schemes[name]
        if scheme.adds:
            rule = (
                f"the format's tensors must be all that is stored, and {scheme.quantizer} stores others:"
                " plan without it, or write pytorch-packed, which holds them"
            )
            yield Violation(name, rule, scheme.name)


def one_cache(deployment: Deployment, kinds: Collection[str]) -> Iterator[Violation]:
    """All key-value caches must be full, or all of one of these types: there is one setting for them."""
    caches = deployment.plan.kv_cache or {}
    for name, rule, step in cache_faults(caches, kinds):
        yield Violation(name, f"{rule}: {step}", caches[name])


def only_formats(deployment: Deployment, *takes: Takes) -> Iterator[Violation]:
    """Every quantized weight must be one of these; one violation each, of the rule that comes closest."""
    for name, facts in deployment.quantized.items():
        layer = deployment.layers[name]
        rule = _format_fault(facts, layer.matrix[1], takes)
        if rule is not None:
            yield Violation(name, rule, layer.scheme)


def _format_fault(facts: WeightFacts, columns: int, takes: Collection[Takes]) -> str | None:
    kind = [row for row in takes if row.kind == facts.kind]
    if not kind:
        return f"weights must be {', '.join(dict.fromkeys(row.kind for row in takes))}"
    fitting = [row for row in kind if facts.activation in row.activations]
    if not fitting:
        names = dict.fromkeys(item or "left alone" for row in kind for item in row.activations)
        return f"activations of {facts.kind} weights must be {', '.join(names)}"
    faults = [fault for row in fitting if (fault := row.fault(facts, columns)) is not None]
    return None if len(faults) < len(fitting) else max(faults, key=lambda fault: fault[0])[1]


def named_experts(deployment: Deployment, *takes: Takes) -> Iterator[Violation]:
    """Quantized experts must have names of their own for the consumer, and one of these formats."""
    for name, facts in deployment.quantized.items():
        layer = deployment.layers[name]
        if layer.op not in EXPERT_OPS:
            continue
        rule = _format_fault(facts, layer.matrix[1], takes)
        if deployment.model.linears[name] == (name,):
            yield Violation(name, "config.json must say how many experts there are", "no such number")
        elif rule is not None:
            yield Violation(name, f"of experts, {rule}", layer.scheme)


def fused_agree(deployment: Deployment) -> Iterator[Violation]:
    """Modules that are loaded as one matrix must get one scheme, or all keep their precision."""
    for names in _fused_sets(deployment):
        found = {name: _scheme(deployment, name) for name in names}
        if len(set(found.values())) > 1:
            rule = f"it is loaded as one matrix with {', '.join(names[1:])}, so their schemes must be equal"
            yield Violation(names[0], rule, ", ".join(found.values()))


def fused_have_channels(deployment: Deployment) -> Iterator[Violation]:
    """Floats loaded as one matrix must not have one scale per tensor: they would be rounded again."""
    for names in _fused_sets(deployment):
        for name in names if len(names) > 1 else ():
            facts = deployment.quantized.get(name)
            if facts is not None and facts.kind.startswith("fp8") and facts.granularity == TENSOR:
                rule = "it is loaded as one matrix with others, so its scales must be one per channel"
                yield Violation(name, rule, _scheme(deployment, name))


def _fused_sets(deployment: Deployment) -> Iterator[list[str]]:
    sets: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for module in deployment.model.modules:
        parent, _, last = module.name.rpartition(".")
        if module.op in EXPERT_OPS:
            sets[parent, -1].append(module.name)
            continue
        for number, members in enumerate(FUSED):
            if last in members:
                sets[parent, number].append(module.name)
    yield from sets.values()


def _scheme(deployment: Deployment, name: str) -> str:
    return deployment.layers[name].scheme if name in deployment.quantized else "full precision"
