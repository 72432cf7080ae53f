import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.ops import OPS, from_matrix, matrix_shape, op_of, to_matrix


class Experts(nn.Module):
    def __init__(self, first, down):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(first))
        self.down_proj = nn.Parameter(torch.randn(down))


MODULES = {
    "linear": nn.Linear(6, 4),
    "conv1d": nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": nn.Conv2d(4, 6, (3, 5), groups=2),
    "embedding": nn.Embedding(7, 5),
    "transformers_conv1d": Conv1D(9, 4),
    "experts": Experts((3, 8, 5), (3, 5, 4)),
    "experts_transposed": Experts((3, 5, 8), (3, 4, 5)),
}


def test_every_op_has_a_module_here():
    assert set(MODULES) == set(OPS)


def test_matrix_round_trip_and_shape():
    for name, module in MODULES.items():
        for parameter, weight in module.named_parameters():
            if parameter == "bias":
                continue
            assert op_of(module, parameter) == name
            shape = tuple(weight.shape)
            matrix = to_matrix(weight, name)
            assert tuple(matrix.shape) == matrix_shape(shape, name)
            assert torch.equal(from_matrix(matrix, name, shape), weight)


def test_rows_are_output_channels():
    assert matrix_shape(tuple(MODULES["transformers_conv1d"].weight.shape), "transformers_conv1d") == (9, 4)
    assert matrix_shape(tuple(MODULES["conv2d"].weight.shape), "conv2d") == (6, 30)
    assert op_of(nn.ConvTranspose2d(2, 2, 3)) is None
    assert op_of(MODULES["linear"], "bias") is None
    assert op_of(MODULES["experts"]) is None
