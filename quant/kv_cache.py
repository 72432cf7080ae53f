"""Caches of keys and values as decisions: each attention layer keeps its cache full or in a smaller type."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant.costs import CostError, Grid
from quant.geometry import CACHE_BITS, Geometry
from quant.schemes import Scheme, parse_scheme
from quant.storage import SchemeError

PREFIX = "kv-"
"""Before a type of cache where a scheme stands: `kv-int8` for an attention layer."""
FULL = "full"
"""The type of a cache that is left as the model has it; its bytes are those of the deployment's type."""
FULL_TYPES = ("float32", "float16", "bfloat16")
SMALLER_TYPES = tuple(kind for kind in CACHE_BITS if kind not in FULL_TYPES)
"""What a menu may hold; the full cache is always a choice."""
ALIASES = {"fp8": "fp8_e4m3"}


def cache_type(text: str, known: Iterable[str] = SMALLER_TYPES) -> str:
    """A type by its name or alias. Raises SchemeError.

    >>> cache_type("fp8"), cache_type(" int8")
    ('fp8_e4m3', 'int8')
    """
    kind = ALIASES.get(text.strip().lower(), text.strip().lower())
    if kind not in (*known,):
        names = ", ".join((*ALIASES, *known))
        raise SchemeError(f"A type of a key-value cache must be one of {names}. Got {text!r:.60}. Use int8.")
    return kind


def is_cache(scheme: str) -> bool:
    """Whether a scheme is one of an attention layer's cache.

    >>> is_cache("kv-int8"), is_cache("w4")
    (True, False)
    """
    return scheme.strip().lower().startswith(PREFIX)


def cache_scheme(kind: str) -> str:
    """The scheme of a type.

    >>> cache_scheme("int8")
    'kv-int8'
    """
    return f"{PREFIX}{kind}"


def cache_type_of(scheme: str) -> str:
    """Inverse of `cache_scheme`.

    >>> cache_type_of("kv-int8")
    'int8'
    """
    return scheme.removeprefix(PREFIX)


def scheme_name(text: str) -> str:
    """The canonical spelling of any scheme, of weights or of a cache. Raises SchemeError.

    >>> scheme_name("w4-channel"), scheme_name("kv-fp8"), scheme_name("kv-full")
    ('w4', 'kv-fp8_e4m3', 'kv-full')
    """
    if not is_cache(text):
        return parse_scheme(text).name
    kind = text.strip().lower().removeprefix(PREFIX)
    return cache_scheme(cache_type(kind, (FULL, *SMALLER_TYPES)))


def weight_schemes(names: Iterable[str]) -> list[Scheme]:
    """Those of some schemes that are of weights."""
    return [parse_scheme(name) for name in names if not is_cache(name)]


def split(assignment: Iterable[tuple[str, str]]) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """An assignment's weights, and its caches."""
    pairs = tuple(assignment)
    caches = {name: scheme for name, scheme in pairs if is_cache(scheme)}
    return tuple(pair for pair in pairs if not is_cache(pair[1])), caches


def cache_faults(
    caches: Mapping[str, str], offered: Collection[str], *, one: bool = True
) -> Iterator[tuple[str, str, str]]:
    """(attention layer, the rule that its cache breaks, what to do) for a plan's types of caches.

    Each must be full or one of `offered`, and all alike if `one`.

    >>> list(cache_faults({"attn": "int4"}, ()))
    [('attn', 'key-value caches must be full', 'plan without kv_cache')]
    """
    first = next(iter(caches), "")
    for name, kind in caches.items():
        if kind not in (FULL, *offered):
            step = f"plan with kv_cache {','.join(offered)}" if offered else "plan without kv_cache"
            yield name, f"key-value caches must be {' or '.join((FULL, *offered))}", step
        if one and kind != caches[first]:
            rule = f"key-value caches must have one type, and {first} has {caches[first]}"
            yield name, rule, "pin all to one, or plan for a runtime, which ties them"


@dataclass(frozen=True)
class Caches:
    """The attention layers whose caches are decided, by their number in the cache.

    `menu` are the schemes that a free layer may get, the full one first, `schemes` those and the ones that
    only pins name.
    """

    layers: tuple[str, ...]
    menu: tuple[str, ...]
    schemes: tuple[str, ...]

    @classmethod
    def of(cls, types: Sequence[str], geometry: Geometry | None, pinned: Iterable[str] = ()) -> Caches | None:
        """The decisions of a menu of types; None for an empty menu.

        Raises CostError for a model whose attention layers are not known, SchemeError for a type.
        """
        if not types:
            return None
        if geometry is None or not geometry.attention:
            raise CostError(
                "A menu of cache types must be for a model that generates, whose attention layers put keys"
                f" and values into its cache. Got {_without_cache(geometry)}. Leave kv_cache out."
            )
        menu = dict.fromkeys((cache_scheme(FULL), *(cache_scheme(cache_type(kind)) for kind in types)))
        named = (scheme_name(scheme) for scheme in pinned if is_cache(scheme))
        return cls(geometry.attention, tuple(menu), tuple(dict.fromkeys((*menu, *named))))

    def bytes(self, geometry: Geometry, context_length: int, batch: int, full: str) -> Grid:
        """Layers x schemes: exact bytes of each cache; `full` is the type of one that is left as it is."""
        kinds = [cache_type_of(scheme) for scheme in self.schemes]
        return tuple(
            tuple(
                geometry.layer_cache_bytes(layer, context_length, batch, full if kind == FULL else kind)
                for kind in kinds
            )
            for layer in range(len(self.layers))
        )

    @property
    def nothing(self) -> Grid:
        """Layers x schemes of zeros: what caches use of a resource of weights."""
        return tuple((0,) * len(self.schemes) for _ in self.layers)


def _without_cache(geometry: Geometry | None) -> str:
    if geometry is None:
        return "a model whose configuration names no attention layers"
    return "one that generates nothing" if not geometry.windows else "none that are known, or latent ones"


def extended(grid: Grid, cells: Grid) -> Grid:
    """A grid of weights with the rows and columns of caches after it: nothing is offered across.

    >>> extended(((1, 2),), ((3,),))
    ((1, 2, None), (None, None, 3))
    """
    width, added = len(grid[0]), len(cells[0])
    return (*((*row, *(None,) * added) for row in grid), *(((None,) * width) + row for row in cells))
