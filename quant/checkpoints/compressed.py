"""The tensors of compressed-tensors' formats: which there are for a weight, and filling them.

Values, codes and scales are the quantizer's own. Where the library packs, its own function does.

| format | `weight` becomes |
|---|---|
| pack-quantized | `weight_packed` (32-bit words), `weight_scale`, `weight_shape`, and `weight_zero_point` (packed along the output channels, moved by half the range) |
| int-quantized, float-quantized | `weight` in 8 bits, `weight_scale` |
| nvfp4-pack-quantized | `weight_packed` (two codes a byte), `weight_scale` (e4m3), `weight_global_scale` (divides them) |
| mxfp4-pack-quantized | `weight_packed`, `weight_scale` (exponents) |
| mxfp8-quantized | `weight` in 8 bits, `weight_scale` (exponents) |
"""  # noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quant.checkpoints.shards import Slot
from quant.floating import FloatFormat
from quant.integer import IntegerFormat, ScaleType
from quant.microscaling import BlockFormat
from quant.storage import Format, Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from quant.codecs.stored import Coded
    from quant.packing import Encoded

SCALES: dict[ScaleType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def slots(fmt: Format, matrix: Matrix, *, packed: bool) -> dict[str, Slot]:
    """Name -> type and shape of the tensors of a weight. `packed`: 8-bit integers are packed too."""
    if isinstance(fmt, BlockFormat):
        return _block_slots(fmt, matrix)
    assert isinstance(fmt, IntegerFormat | FloatFormat), "the linter refuses such plans"
    if isinstance(fmt, IntegerFormat) and packed:
        return _packed_slots(fmt, matrix)
    kind = "I8" if isinstance(fmt, IntegerFormat) else "F8_E4M3"
    shape = (1,) if fmt.granularity == "tensor" else fmt.scales_shape(matrix)
    return {"weight": Slot(kind, matrix), "weight_scale": Slot(SCALES[fmt.scale_type], shape)}


def _packed_slots(fmt: IntegerFormat, matrix: Matrix) -> dict[str, Slot]:
    rows, columns = matrix
    scales = fmt.scales_shape(matrix)
    found = {
        "weight_packed": Slot("I32", (rows, -(-columns * fmt.bits // 32))),
        "weight_scale": Slot(SCALES[fmt.scale_type], scales),
        "weight_shape": Slot("I64", (2,)),
    }
    if not fmt.symmetric:
        found["weight_zero_point"] = Slot("I32", (-(-rows * fmt.bits // 32), scales[1]))
    return found


def _block_slots(fmt: BlockFormat, matrix: Matrix) -> dict[str, Slot]:
    rows, columns = matrix
    scales = (rows, columns // fmt.size)
    if fmt.weight_bits == 8:
        return {"weight": Slot("F8_E4M3", matrix), "weight_scale": Slot("U8", scales)}
    found = {"weight_packed": Slot("U8", (rows, columns // 2))}
    if fmt.scale == "e8m0":
        return found | {"weight_scale": Slot("U8", scales)}
    return found | {"weight_scale": Slot("F8_E4M3", scales), "weight_global_scale": Slot("F32", (1,))}


def tensors(stored: Encoded | Coded[Any], *, packed: bool) -> dict[str, Tensor]:
    """The tensors of `slots`, filled."""
    fmt = stored.fmt
    if isinstance(fmt, BlockFormat):
        return _block_tensors(stored)
    if isinstance(fmt, IntegerFormat) and packed:
        return _packed_tensors(stored)
    return _plain_tensors(stored)


def _plain_tensors(stored: Any) -> dict[str, Tensor]:
    import torch

    values, scales = stored.values.reshape(stored.matrix), stored.scales
    if isinstance(stored.fmt, FloatFormat):
        values, (scales,) = values.view(torch.float8_e4m3fn), scales
    whole = stored.fmt.granularity == "tensor"
    return {"weight": values, "weight_scale": scales.reshape(1) if whole else scales}


def _packed_tensors(encoded: Any) -> dict[str, Tensor]:
    import torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    bits, half = encoded.fmt.bits, 1 << (encoded.fmt.bits - 1)

    def signed(tensor: Tensor) -> Tensor:
        return tensor if encoded.fmt.symmetric else (tensor.to(torch.int16) - half).to(torch.int8)

    found = {
        "weight_packed": pack_to_int32(signed(encoded.values).reshape(encoded.matrix), bits),
        "weight_scale": encoded.scales,
        "weight_shape": torch.tensor(encoded.matrix),
    }
    if encoded.zero_points is not None:
        found["weight_zero_point"] = pack_to_int32(signed(encoded.zero_points), bits, packed_dim=0)
    return found


def _block_tensors(coded: Any) -> dict[str, Tensor]:
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    from quant.codecs.elements import values

    codes = coded.values.reshape(coded.matrix)
    if coded.fmt.weight_bits == 8:
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": coded.scales[0]}
    found = {"weight_packed": pack_fp4_to_uint8(values(codes, coded.fmt.element))}
    if coded.fmt.scale == "e8m0":
        return found | {"weight_scale": coded.scales[0]}
    scales, tensor_scale = coded.scales
    return found | {
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": tensor_scale.reciprocal(),
    }
