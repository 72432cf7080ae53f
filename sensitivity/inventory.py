"""The layers of a model that take part, and what is wrong with it in the errors of sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from quant.inventory import AlreadyQuantized, NothingToQuantize, take_inventory
from quant.layers import Inventory
from quant.patterns import PatternError
from sensitivity.errors import BadPattern, ModelAlreadyQuantized, ModelHasNothingToQuantize


def inventory_of(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], run: Callable[[], int] | None = None
) -> Inventory:
    """As `take_inventory`; `run` lets it count multiplications.

    Raises ModelAlreadyQuantized, ModelHasNothingToQuantize and BadPattern.
    """
    try:
        return take_inventory(model, include=include, exclude=exclude, run=run)
    except AlreadyQuantized as error:
        raise ModelAlreadyQuantized(str(error)) from error
    except NothingToQuantize as error:
        raise ModelHasNothingToQuantize(str(error)) from error
    except PatternError as error:
        raise BadPattern(str(error)) from error
