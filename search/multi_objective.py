"""Optuna's searches over several objectives at once: measured losses and what limited resources use.

Cheaper plans survive beside better ones, so a search reaches what one by the loss alone passes over, and ends
with the Pareto set of what it measured. NSGA-II crosses plans over generations (Deb et al. 2002; EQ-Net and
APQ search bit widths so); MOTPE is the Parzen estimator for several objectives (Ozaki et al. 2020).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from search.black_box import BlackBox

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

POPULATION = 12
RANDOM_TRIALS = 12
"""Plans of the random start that a Parzen estimator of several objectives needs to split good from bad; the
measured candidates count.
"""


def _generations(seed: int) -> BaseSampler:
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(population_size=POPULATION, seed=seed)


def _parzen(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)


nsga2 = BlackBox("nsga2", _generations, several=True)
motpe = BlackBox("motpe", _parzen, several=True)
