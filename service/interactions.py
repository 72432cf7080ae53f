"""The interactions of a search, kept in the store so that re-solves need nothing that they were made from.

No torch. What a metric knows of pairs of choices is one factor (see `ScoreTable.interactions`); it is
computed once, when the search has scored, and new budgets, limits, pins and ties only read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensitivity.table import ScoreTable
from service.planning.inputs import PlanningInputs
from service.store.blobs import BlobStore


def keep(store: BlobStore, table: ScoreTable, choices: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """Stores the factor of a table beside the (layer, scheme) that it was measured for, `choices`; gives the
    metric and the blob's digest, for the job's summary. None where the table has no interactions.
    """
    for metric, factor in table.interactions.items():
        named = [choices.get(layer, ()) for layer in table.layer_names]
        arrays: dict[str, NDArray[Any]] = {
            "factor": factor,
            "measured": np.array([[scheme in own for scheme in table.schemes] for own in named]),
            "layers": np.array(table.layer_names),
            "schemes": np.array(table.schemes),
        }
        return {"metric": metric, "factor": store.put_arrays(arrays)}
    return None


def paired(store: BlobStore, told: Mapping[str, str], inputs: PlanningInputs) -> PlanningInputs:
    """The inverse: the inputs with the interactions that `keep` told of, and with what has none. Raises
    BlobMissing.
    """
    arrays = store.get_arrays(told["factor"])
    rows, row_known = _places([str(name) for name in arrays["layers"]], inputs.table.layer_names)
    columns, column_known = _places([str(name) for name in arrays["schemes"]], inputs.table.schemes)
    known = np.outer(row_known, column_known) & arrays["measured"][np.ix_(rows, columns)]
    factor = np.where(known[:, :, None], arrays["factor"][np.ix_(rows, columns)], 0.0)
    table = replace(inputs.table, interactions={told["metric"]: factor})
    return replace(inputs, table=table, unpaired=~known)


def _places(stored: Sequence[str], names: Sequence[str]) -> tuple[list[int], NDArray[np.bool_]]:
    """Where each name is stored, 0 where it is not; and whether it is.

    >>> _places(["w2", "w4"], ["w4", "w8"])
    ([1, 0], array([ True, False]))
    """
    place = {name: position for position, name in enumerate(stored)}
    return [place.get(name, 0) for name in names], np.array([name in place for name in names], dtype=np.bool_)
