"""Gradients block by block are those of the whole model, bit for bit, within a limit on memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sensitivity import streaming, weights
from sensitivity.chain import Chain, NoChain, find_chain
from sensitivity.errors import DiskFull, MemoryLimitTooLow
from sensitivity.gradient_runs import GradientRuns
from sensitivity.memory import MARGIN, mapped_bytes
from sensitivity.passes import GradientPass
from sensitivity.session import Session
from sensitivity.spec import DataSource, Json, ModelSource, SessionSpec
from sensitivity.spill import spilled
from sensitivity.streaming import room_beside, run_streamed, samples_together
from sensitivity.units import BlockUnit, InspectUnit, MeasureUnit, ScoreUnit, Unit, UnitResult
from service.executors.local_pool import LocalPool
from service.executors.protocol import Executor, ExecutorSettings

SCHEMES = ("w2", "w4", "w8")
LARGE = 2**30
CASES = [
    *((name, "gram_fisher") for name in ("llama", "bert", "resnet", "mlp", "mixtral")),
    *((name, metric) for name in ("llama", "mixtral") for metric in ("gradient_output", "fisher_diagonal")),
    ("resnet", "taylor"),
]


def unit_of(session: Session, metric: str, block: str = "samples:1:4") -> BlockUnit:
    layers = tuple(layer.name for layer in session.inventory.layers)
    draws = ":draws:0:2" if metric == "gram_fisher" else ""
    return BlockUnit(metric, block + draws, SCHEMES, layers)


@pytest.fixture(scope="module")
def session(tiny: Any) -> Callable[[str], Session]:
    kept: dict[str, Session] = {}

    def get(name: str) -> Session:
        if name not in kept:
            kept[name] = Session(tiny(name).spec())
        return kept[name]

    return get


def streamed(session: Session, unit: BlockUnit, weight_bytes: int = LARGE) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of the unit, measured block by block by force."""
    chain = session.gradient_runs.chain
    assert isinstance(chain, Chain), chain
    session.weights.bound(weight_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "take_gradients", lambda p: run_streamed(session, chain, p, weight_bytes))
        return dict(session.run(unit).arrays)


def require_same(session: Session, unit: BlockUnit, weight_bytes: int = LARGE) -> None:
    expected = session.run(unit).arrays
    found = streamed(session, unit, weight_bytes)
    assert set(found) == set(expected)
    for key, array in found.items():
        assert np.abs(array).max() > 0
        np.testing.assert_array_equal(array, expected[key])


@pytest.mark.parametrize(("name", "metric"), CASES)
def test_streamed_numbers_are_those_of_the_whole_model(name: str, metric: str, session: Any) -> None:
    require_same(session(name), unit_of(session(name), metric))


@pytest.mark.parametrize("weight_bytes", [0, pytest.param(3000, marks=pytest.mark.slow)])
def test_little_room_for_quantized_weights_changes_no_number(weight_bytes: int, session: Any) -> None:
    """Layers, and schemes of one layer, then come in groups with a backward pass each."""
    for metric in ("fisher", "gradient_output"):
        require_same(session("llama"), unit_of(session("llama"), metric), weight_bytes)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_before_and_behind_the_blocks(tied: bool, tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny("llama").folder)
    config.tie_word_embeddings = tied
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny("llama").folder / name).read_bytes())
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = tiny("llama").spec(include=("*embed_tokens", "lm_head"))
    if tied:
        spec = replace(spec, include=("*embed_tokens",))
    found = Session(replace(spec, model=ModelSource("folder", str(tmp_path), "outside")))
    unit = unit_of(found, "gram_fisher")
    assert "model.embed_tokens" in unit.layers
    require_same(found, unit)
    require_same(found, replace(unit, layers=("model.embed_tokens",)), weight_bytes=0)


def test_passes_are_counted(session: Any) -> None:
    """Forward, forward again, backward: 4 for one draw."""
    found = session("llama")
    unit = unit_of(found, "fisher")
    assert found.run(unit).facts["forwards"] == 9
    chain = found.gradient_runs.chain
    found._spent = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, "take_gradients", lambda p: run_streamed(found, chain, p, LARGE))
        assert found.run(unit).facts["forwards"] == 12


# -- what cannot be streamed ----------------------------------------------------------------------


class Skipping(nn.Module):
    """Two blocks and a way around the second, or into it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList([nn.Linear(3, 3), Taking(), nn.Linear(3, 3)])

    def forward(self, values: Tensor) -> Tensor:
        first = self.blocks[0](values)
        second = self.blocks[1](first, first if self.way == "into" else None)
        third: Tensor = self.blocks[2](second)
        return third + first if self.way == "around" else third


class Taking(nn.Module):
    def forward(self, values: Tensor, more: Tensor | None) -> Tensor:
        return values * 2 if more is None else values * 2 + more * 1


PATHS = ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize(
    ("way", "match"), [("around", "depend on blocks.0 by more"), ("into", "blocks.1 is given more")]
)
def test_a_way_around_the_blocks_is_found(way: str, match: str) -> None:
    model = Skipping(way)
    parameters = list(model.parameters())
    with pytest.raises(NoChain, match=match):
        find_chain(model, PATHS, parameters, lambda: model(torch.ones(1, 3)).sum())


def test_a_plain_chain_is_found() -> None:
    model = Skipping("no")
    chain = find_chain(model, PATHS, list(model.parameters()), lambda: model(torch.ones(2, 3)).sum())
    assert chain.slots == (0, 0, 0)
    assert chain.hidden == (24, 24, 24, 24)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_blocks_out_of_order_and_failing_runs_are_told() -> None:
    model = Skipping("no")
    run = lambda: model(torch.ones(1, 3)).sum()  # noqa: E731
    with pytest.raises(NoChain, match="out of order"):
        find_chain(model, PATHS[::-1], list(model.parameters()), run)
    with pytest.raises(NoChain, match="failed with RuntimeError"):
        find_chain(model, PATHS, list(model.parameters()), lambda: model(torch.ones(1, 7)).sum())
    with pytest.raises(NoChain, match="no blocks"):
        find_chain(model, (), list(model.parameters()), run)


# -- a limit --------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(12)))
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> SessionSpec:
    """A model whose graph is larger than all else: 12 blocks on 8192 rows."""
    import sys

    folder = tmp_path_factory.mktemp("deep")
    (folder / "deep_factory.py").write_text(FACTORY, encoding="utf-8")
    sys.path.insert(0, str(folder))
    generator = torch.Generator().manual_seed(1)
    save_file({"x": torch.randn(24, 8192, 128, generator=generator)}, folder / "x.safetensors")
    return SessionSpec(
        ModelSource("factory", "deep_factory:build", "deep"),
        DataSource(str(folder / "x.safetensors"), "safetensors", "deep"),
        samples=8,
        batch_size=1,
        memory_limit=2**40,
    )


def in_a_process_of_its_own(
    folder: Path, spec: SessionSpec, units: Callable[[Json], Sequence[Unit]]
) -> list[UnitResult]:
    """What a fresh worker answers to an inspection and then to units made from it.

    What a process holds depends on what it did before, so limits are compared between fresh ones.
    """
    executor = LocalPool(ExecutorSettings(1, folder))
    executor.start(spec)
    try:
        results = [answered(executor, InspectUnit())]
        return results + [answered(executor, unit) for unit in units(results[0].facts)]
    finally:
        executor.close(0)


def answered(executor: Executor, unit: Unit) -> UnitResult:
    executor.submit(unit.key, unit)
    while not (outcomes := executor.wait(1.0)):
        pass
    assert outcomes[0].result is not None, outcomes[0].failure
    return outcomes[0].result


@pytest.mark.slow
def test_a_limit_is_obeyed_by_streaming_with_the_same_numbers(deep: SessionSpec, tmp_path: Path) -> None:
    def fisher(facts: Json) -> list[Unit]:
        layers = tuple(layer["name"] for layer in facts["inventory"]["layers"])
        return [BlockUnit("fisher", "samples:0:2", SCHEMES, layers)]

    inspected, whole = in_a_process_of_its_own(tmp_path, deep, fisher)
    facts = inspected.facts["memory"]
    assert facts["streamed"] is False
    gradients = facts["gradients"]
    assert gradients["whole"] > 12 * 2 * 8192 * 128 * 4
    assert gradients["blocks"] >= 12
    needed = facts["loaded"] + facts["largest"] + gradients["step"] + gradients["whole"] // 2
    limit = needed * MARGIN // (MARGIN - 1) + 2**25
    tight = replace(deep, memory_limit=limit)
    inspected, result = in_a_process_of_its_own(tmp_path, tight, fisher)
    assert inspected.facts["memory"]["streamed"] is True
    np.testing.assert_array_equal(result.arrays["values"], whole.arrays["values"])
    assert result.facts["anonymous_bytes"] <= limit


def test_a_whole_graph_beyond_the_limit_is_refused(deep: SessionSpec) -> None:
    session = Session(deep)
    assert session.memory is not None
    whole = session.gradient_runs.use.whole
    memory = replace(session.memory, limit=session.memory.loaded + whole // 2)
    session.gradient_runs = GradientRuns(session, memory)
    with pytest.raises(MemoryLimitTooLow, match="gradients of one sample"):
        session.differentiable_sample_loss("scoring", 0)


def test_a_limit_that_nothing_fits_is_refused(deep: SessionSpec) -> None:
    with pytest.raises(MemoryLimitTooLow, match=r"memory_limit must hold .* Got 1 MiB. Raise it"):
        Session(replace(deep, memory_limit=2**20))


def test_a_unit_that_took_more_than_the_limit_fails(deep: SessionSpec) -> None:
    session = Session(deep)
    assert session.memory is not None
    session.memory = replace(session.memory, limit=2**20)
    with pytest.raises(MemoryLimitTooLow, match="what inspect.* took"):
        session.run(InspectUnit())


def test_statistics_run_only_the_blocks_that_hold_their_layers(tiny: Any, session: Any) -> None:
    plain, limited = session("llama"), Session(tiny("llama").spec(memory_limit=2**40))
    limited.inputs._bound = 8000
    assert isinstance(limited.gradient_runs.chain, Chain)
    ran = []
    limited.model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    names = [layer.name for layer in limited.inventory.layers]
    limited.inputs(names[-1])
    assert len(ran) == 2  # through all blocks, once per micro-batch
    for name in names[::-1]:
        assert limited.inputs(name).second_moments.equal(plain.inputs(name).second_moments), name
        if name.startswith("model.layers.1"):
            assert len(ran) == 2
    limited.inputs._bound = 1000
    limited.inputs._kept.clear()
    with pytest.raises(MemoryLimitTooLow, match="second moments of model.layers.0.self_attn.q_proj"):
        limited.inputs(names[0])


def test_quantizers_that_go_by_inputs_reserve_more(tiny: Any) -> None:
    found = Session(tiny("llama").spec(memory_limit=2**40))
    assert found.memory is not None
    assert found.memory.factors == 40 * 24**2
    tight = found.memory.loaded + found.memory.forward + found.memory.largest
    found.memory = replace(found.memory, limit=tight)
    with pytest.raises(MemoryLimitTooLow, match="one layer in w4-gptq"):
        found.run(ScoreUnit("model.layers.0.mlp.up_proj", "w4-gptq", ("weight_error",)))


def test_quantized_weights_wait_in_files_and_measure_alike(tiny: Any, session: Any) -> None:
    plain, limited = session("llama"), Session(tiny("llama").spec(memory_limit=2**40))
    plan = MeasureUnit(tuple((layer.name, "w3") for layer in plain.inventory.layers), "choosing")
    expected = plain.run(plan).arrays
    np.testing.assert_array_equal(limited.run(plan).arrays["divergence"], expected["divergence"])
    held = [limited.weights.quantized(layer.name, "w3") for layer in plain.inventory.layers]
    assert mapped_bytes([(w.data_ptr(), w.nbytes) for w in held]) == sum(weight.nbytes for weight in held)


def test_a_short_disk_drops_what_was_used_longest_ago(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Session(tiny("llama").spec(memory_limit=2**40))
    first, second = (layer.name for layer in limited.inventory.layers[:2])
    kept = limited.weights.quantized(first, "w3")
    assert limited.weights.quantized(first, "w3") is kept
    monkeypatch.setattr(weights, "MOST_FILES", 1)
    limited.weights.quantized(second, "w3")
    assert limited.weights.quantized(first, "w3") is not kept
    limited.disk.total = 0
    in_memory = limited.weights.quantized(second, "w4")
    assert mapped_bytes([(in_memory.data_ptr(), 1)]) == 0
    assert limited.weights.quantized(second, "w4") is in_memory


def test_files_share_one_budget(tiny: Any) -> None:
    """Weights take what is left, are dropped for what must be kept, and give back what they took."""
    limited = Session(tiny("llama").spec(memory_limit=2**40))
    disk, layers = limited.disk, [layer.name for layer in limited.inventory.layers]
    sizes = {name: limited.weights.parameter(name).nbytes for name in layers}
    disk.total = 3 * max(sizes.values())
    for name in layers:
        limited.weights.quantized(name, "w3")
        assert 0 < disk.held == limited.weights._file_bytes() <= disk.total
    assert disk.room == disk.total
    kept = disk.spilled(torch.zeros(disk.total // 4 - 1))
    assert disk.held == kept.nbytes
    assert limited.weights._file_bytes() == 0
    assert mapped_bytes([(limited.weights.quantized(layers[0], "w3").data_ptr(), 1)]) == 0
    part = kept[:3].detach()
    del kept
    assert disk.held > 0
    del part
    assert disk.held == 0


def test_a_disk_that_others_filled_holds_no_weights_before_it_is_told(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = Session(tiny("llama").spec(memory_limit=2**40))
    layers = [layer.name for layer in limited.inventory.layers][:3]
    for name in layers:
        limited.weights.quantized(name, "w3")
    real, left = os.posix_fallocate, [limited.disk.held]

    def filled(descriptor: int, offset: int, size: int) -> None:
        if limited.disk.held > left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, size)

    left[0] = limited.weights.parameter(layers[-1]).nbytes
    monkeypatch.setattr(os, "posix_fallocate", filled)
    assert len(limited.disk.spilled(torch.ones(5))) == 5
    assert [name for name, _ in limited.weights._files] == layers[-1:]
    left[0] = -1
    with pytest.raises(DiskFull, match="No space left"):
        limited.disk.spilled(torch.ones(5))
    assert not limited.weights._files
    again = limited.weights.quantized(layers[0], "w3")
    assert mapped_bytes([(again.data_ptr(), 1)]) == 0


@pytest.mark.parametrize("fitting", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_as_many_samples_go_together_as_files_have_room_for(
    fitting: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Session(tiny("llama").spec(memory_limit=2**40))
    unit, chain, disk = unit_of(found, "fisher"), found.gradient_runs.chain, found.disk
    assert isinstance(chain, Chain)
    per_sample = sum(chain.hidden) + 2 * max(chain.hidden)
    disk.total = 2 * fitting * per_sample
    most, spill = [0], disk.spilled

    def watched(values: torch.Tensor) -> torch.Tensor:
        made = spill(values)
        most[0] = max(most[0], disk.held)
        return made

    monkeypatch.setattr(disk, "spilled", watched)
    require_same(found, unit)
    assert disk.held == found.weights._file_bytes()
    assert most[0] <= max(disk.total, per_sample)
    asked = GradientPass("fisher", unit.layers, unit.schemes, range(6), None, None)  # type: ignore[arg-type]
    assert samples_together(disk, chain, asked) == max(1, fitting)
    assert room_beside(disk, chain, asked) == max(0, disk.total - max(1, fitting) * per_sample)
    disk.total = 2**40
    assert samples_together(disk, chain, asked) == 6
    monkeypatch.setattr(streaming, "MOST_FILES", 2 * (len(chain.hidden) + 2) + 1)
    assert samples_together(disk, chain, asked) == 2


def test_weights_of_a_folder_stay_in_their_file(tiny: Any) -> None:
    session = Session(tiny("llama").spec(memory_limit=2**40))
    stored = sum(parameter.nbytes for parameter in session.model.parameters())
    assert session.run(InspectUnit()).facts["memory"]["mapped"] == stored


def test_spilled_tensors_are_in_files_and_equal() -> None:
    values = torch.randn(3, 5).to(torch.bfloat16)
    found = spilled(values)
    assert found.equal(values)
    assert mapped_bytes([(found.data_ptr(), found.nbytes), (values.data_ptr(), values.nbytes)]) == 30
    assert spilled(torch.zeros(0, 2)).shape == (0, 2)


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="No space left on device at 12 bytes"):
        spilled(torch.zeros(3))
