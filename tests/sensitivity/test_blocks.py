"""Blocks are found from the structure, and a run that begins at one is the whole run, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sensitivity.blocks import Blocks, find_blocks, listening, resumed


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.inner(values)


class Skips(nn.Module):
    """The first block's output is used again behind the last one, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, values: Tensor) -> Tensor:
        first = values = self.blocks[0](values)
        for block in self.blocks[1:]:
            values = block(values)
        return values + first


def blocks_of(model: nn.Module, *shape: int) -> Blocks:
    return find_blocks(model, lambda: model(torch.zeros(shape)))


def test_stages_are_taken_apart_and_residual_blocks_are_not() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(Residual(4), Residual(4)), Residual(4), nn.Linear(4, 2)
    )
    blocks = blocks_of(model, 1, 3)
    assert blocks.paths == ("0", "1.0", "1.1", "2", "3")
    assert [blocks.place(path) for path in ("0", "1.0.inner.2", "1.1", "2.inner", "3")] == [0, 1, 2, 3, 4]
    macs = torch.tensor([3 * 4, 2 * 16, 2 * 16, 2 * 16, 4 * 2])
    left = 1 - torch.cat([torch.zeros(1), macs.cumsum(0)]) / macs.sum()
    assert blocks.shares == pytest.approx(left.tolist())
    assert blocks.bytes == 4 * 4


def test_modules_outside_of_the_blocks_have_a_place_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head, self.idle = nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 4)
            self.layers = nn.ModuleList(Residual(4) for _ in range(3))

        def forward(self, tokens: Tensor) -> Tensor:
            values = self.table(tokens)
            for layer in self.layers:
                values = layer(values)
            return self.head(values)

    model = Model()
    blocks = find_blocks(model, lambda: model(torch.zeros(1, 2, dtype=torch.long)))
    assert blocks.paths == ("layers.0", "layers.1", "layers.2")
    assert [blocks.place(name) for name in ("table", "head", "idle", "layers.1.inner.0")] == [0, 3, 0, 1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, values: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](values))


@pytest.mark.parametrize("model", [nn.Linear(4, 4), Residual(4).inner[0], Twice()])
def test_models_without_a_chain_have_none(model: nn.Module) -> None:
    assert blocks_of(model, 1, 4) == Blocks()


def test_hooks_and_forwards_are_gone_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    own = model[0].forward
    model[0].forward = lambda values: own(values) + 1  # type: ignore[method-assign]
    wrapped = model[0].forward
    blocks = blocks_of(model, 1, 4)
    with (
        pytest.raises(KeyError),
        resumed(model, blocks, 1, torch.ones(1, 4)),
        listening(model, blocks, [2], print),
    ):
        raise KeyError
    assert model[0].forward is wrapped
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_from_a_block_is_the_whole_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Residual(4), Residual(4), nn.Linear(4, 2)).eval()
    blocks, values, kept = blocks_of(model, 1, 3), torch.randn(5, 3), dict[int, Tensor]()
    with torch.no_grad():
        with listening(model, blocks, range(1, 5), lambda k, value: kept.update({k: value.clone()})):
            whole = model(values)
        for boundary in range(1, 5):
            with resumed(model, blocks, boundary, kept[boundary].clone()):
                assert torch.equal(model(torch.full_like(values, torch.nan)), whole)


def test_a_value_that_flows_around_blocks_is_noticed() -> None:
    """`find_blocks` takes such a chain for one; the run that begins inside shows that it is none."""
    torch.manual_seed(0)
    model = Skips().eval()
    blocks = blocks_of(model, 1, 4)
    assert len(blocks.paths) == 3
    values, kept = torch.randn(2, 4), dict[int, Tensor]()
    with torch.no_grad():
        with listening(model, blocks, [2], lambda k, value: kept.update({k: value})):
            whole = model(values)
        with resumed(model, blocks, 2, kept[2]):
            assert not torch.equal(model(values), whole)
