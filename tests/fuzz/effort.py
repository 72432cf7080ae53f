"""How long a property is attacked: a few fixed examples in `make test`, many random ones in `make nightly`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

ALWAYS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
EXAMPLES = int(os.environ.get("BITPLAN_FUZZ_EXAMPLES", "1000"))
"""Of each property in a long run."""


@dataclass(frozen=True)
class Effort:
    """`long` runs are random: they print their seed, and BITPLAN_FUZZ_SEED repeats one."""

    long: bool

    def settings(self, few: int) -> settings:
        """Settings of a run with `few` examples, always the same, when it is short."""
        if self.long:
            return settings(max_examples=EXAMPLES, **ALWAYS)
        return settings(max_examples=few, derandomize=True, phases=[Phase.generate], **ALWAYS)

    def check(self, run: Callable[..., None], few: int) -> None:
        """Run a property, a function under `given`."""
        self.settings(few)(self._seeded(run))()

    def check_machine(self, make: Callable[[], RuleBasedStateMachine], few: int) -> None:
        """Run the machines that `make` makes."""
        run_state_machine_as_test(self._seeded(make), settings=self.settings(few))

    def _seeded(self, run: Callable[..., Any]) -> Callable[..., Any]:
        if not self.long:
            return run
        number = int(os.environ.get("BITPLAN_FUZZ_SEED", random.SystemRandom().getrandbits(32)))
        print(f"BITPLAN_FUZZ_SEED={number}")
        return seed(number)(run)
