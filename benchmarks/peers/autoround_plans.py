"""AutoRound's AutoScheme (delta loss): one scoring, then its dynamic program for each budget of average bits.

It counts scales and zero points in its average. Its loader of data sets is replaced by the samples that
everybody has; scores lie in a folder of the run, where AutoScheme finds them again for the next budget.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from asked import BATCH, WHOLE_ROWS, WHOLE_TENSOR, Asked, Scheme, timed


def main() -> None:
    asked = Asked.from_command()
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(asked.folder / "scores")
    os.environ["AR_LOG_LEVEL"] = "ERROR"
    logging.disable(logging.WARNING)
    plans, seconds = timed(lambda: search(asked))
    asked.answer("auto-round", plans, seconds)


def option(scheme: Scheme) -> Any:
    """The format as AutoRound writes it."""
    from auto_round.schemes import QuantizationScheme

    group = {WHOLE_ROWS: -1, WHOLE_TENSOR: 0}.get(scheme.group, scheme.group)
    return QuantizationScheme(bits=scheme.bits, group_size=group, sym=True, data_type="int", act_bits=16)


def search(asked: Asked) -> dict[float, dict[str, str]]:
    """Budget -> layer -> scheme."""
    from auto_round.auto_scheme import delta_loss
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from transformers import AutoTokenizer

    batches = [{name: rows for name, rows in batch.items() if name != "labels"} for batch in asked.batches()]
    delta_loss.get_dataloader = lambda *_args, **_options: batches
    tokenizer = AutoTokenizer.from_pretrained(asked.model_folder)
    count, length = asked.samples[asked.inputs].shape
    found = {}
    for budget in asked.budgets:
        scheme = AutoScheme(
            avg_bits=budget,
            options=[option(scheme) for scheme in asked.schemes],
            nsamples=count,
            seqlen=length,
            batch_size=BATCH,
            device_map="cpu",
        )
        made = GenScheme(scheme, asked.model(), asked.layers, {}, tokenizer=tokenizer).get_layer_config()
        found[budget] = {layer: named(asked.schemes, made[layer]) for layer in asked.layers}
    return found


def named(schemes: list[Scheme], config: dict[str, Any]) -> str:
    """The scheme that AutoRound chose."""
    return next(
        x.name
        for x in schemes
        if vars(option(x)).items() >= {"bits": config["bits"], "group_size": config["group_size"]}.items()
    )


if __name__ == "__main__":
    main()
