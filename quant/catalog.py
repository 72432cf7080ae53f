"""The quantizers, exporters and checkpoints that Bitplan offers. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from quant.storage import Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from quant.adjusted import Adjusted
    from quant.checkpoints.protocol import CheckpointModule
    from quant.export.protocol import ExporterModule
    from quant.inputs import LayerInputs
    from quant.integer import IntegerFormat
    from quant.packing import Encoded


class Quantize(Protocol):
    """Weight matrix (output channels, columns) of finite floats -> stored integers, scales, zero points."""

    def __call__(
        self, weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None
    ) -> Encoded:
        """Choose scales and round. `inputs` are for quantizers that need them; others pass them over."""


class Adjust(Protocol):
    """The same for quantizers that change the matrix, have another round it, and store how to change back."""

    def __call__(
        self,
        weight_matrix: Tensor,
        fmt: IntegerFormat,
        inputs: LayerInputs | None = None,
        *,
        base: Quantize,
        parameter: int,
    ) -> Adjusted:
        """`base` rounds; `parameter` is the number in the scheme's spelling, 0 where it has none."""


@dataclass(frozen=True)
class Adjustment:
    """What is special about a quantizer that lets another one round.

    `shapes` tells the float16 tensors that it stores beside the format for a matrix and a parameter, by the
    names of its addition's fields (quant/adjusted.py); `parameter` names the number that its spelling ends
    with, None where there is none; `default` is the number where it is left out, 0 where it must be given,
    and `most` the largest. `refuses` says why it is not offered for a matrix and a parameter, or None.
    `divides_inputs`: the layer's input is divided by the stored scales before it is rounded, so the scheme
    must round activations.
    """

    shapes: Callable[[Matrix, int], dict[str, tuple[int, ...]]]
    parameter: str | None = None
    default: int = 0
    most: int = 10**9
    refuses: Callable[[Matrix, int], str | None] = lambda matrix, parameter: None
    divides_inputs: bool = False

    def bits(self, matrix: Matrix, parameter: int) -> int:
        """What is stored beside the format."""
        return 16 * sum(prod(shape) for shape in self.shapes(matrix, parameter).values())


@dataclass(frozen=True)
class Quantizer:
    """One line of QUANTIZERS. `module` holds the function `quantize` and is loaded when used.

    `version` is raised whenever the numbers change: stored scores made with another version are not
    reused. `families` are the keys of FORMATS it can write. `needs_inputs`: it reads statistics of the
    layer's inputs, so it must be given calibration data. `adjusts` is set for those that change the matrix,
    have another quantizer round it, and store tensors beside those of the format.
    """

    name: str
    module: str
    version: int
    families: tuple[str, ...]
    summary: str
    source: str
    needs_inputs: bool = False
    adjusts: Adjustment | None = None

    @property
    def spelling(self) -> str:
        """As it stands in a scheme's grammar."""
        if self.adjusts is None or self.adjusts.parameter is None:
            return self.name
        number = f"<{self.adjusts.parameter}>"
        return f"{self.name}[{number}]" if self.adjusts.default else f"{self.name}{number}"

    def load(self) -> Any:
        """Import the module (and with it torch) and return its `quantize`: a Quantize, or an Adjust."""
        return import_module(self.module).quantize


def _column_scales(matrix: Matrix, _: int) -> dict[str, tuple[int, ...]]:
    return {"scales": (matrix[1],)}


def _low_rank_refusal(matrix: Matrix, rank: int) -> str | None:
    if rank < min(matrix):
        return None
    return (
        f"factors of rank {rank} must be thinner than the matrix {matrix[0]} x {matrix[1]}; use a lower rank"
    )


EVERY_FAMILY = ("integer", "float", "microscaling", "gguf", "plain")

QUANTIZERS: dict[str, Quantizer] = {
    "adaquant": Quantizer(
        name="adaquant",
        module="quant.quantizers.adaquant",
        version=1,
        families=("integer",),
        summary="Learns weights and scales on the error at the layer's output, from gptq's and the nearest.",
        source="Hubara et al. 2021, arXiv:2006.10518",
        needs_inputs=True,
    ),
    "adaround": Quantizer(
        name="adaround",
        module="quant.quantizers.adaround",
        version=1,
        families=("integer",),
        summary="Learns whether each weight is rounded up or down, on the error at the layer's output.",
        source="Nagel et al. 2020, arXiv:2004.10568",
        needs_inputs=True,
    ),
    "awq": Quantizer(
        name="awq",
        module="quant.quantizers.awq",
        version=1,
        families=("integer", "float", "microscaling", "gguf"),
        summary="Columns with large inputs are multiplied before rounding and divided after it.",
        source="Lin et al. 2023, arXiv:2306.00978, section 3.2",
        needs_inputs=True,
        adjusts=Adjustment(shapes=_column_scales),
    ),
    "gptq": Quantizer(
        name="gptq",
        module="quant.quantizers.gptq",
        version=1,
        families=("integer",),
        summary="Rounds column by column; later columns make up for the error at the layer's output.",
        source="Frantar et al. 2022, arXiv:2210.17323",
        needs_inputs=True,
    ),
    "hqq": Quantizer(
        name="hqq",
        module="quant.quantizers.hqq",
        version=1,
        families=("integer",),
        summary="The scale and zero point with the least sum of |error|^0.7; needs no data.",
        source="Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/",
    ),
    "lorc": Quantizer(
        name="lorc",
        module="quant.quantizers.lorc",
        version=1,
        families=("integer", "float", "microscaling", "gguf"),
        summary="Two thin float16 matrices beside the rounded one; their product is what rounding lost.",
        source="Yao et al. 2023, arXiv:2303.08302, section 4; in turns as Li et al. 2023, arXiv:2310.08659",
        adjusts=Adjustment(
            shapes=lambda matrix, rank: {"left": (matrix[0], rank), "right": (rank, matrix[1])},
            parameter="rank",
            refuses=_low_rank_refusal,
        ),
    ),
    "mse_clip": Quantizer(
        name="mse_clip",
        module="quant.quantizers.mse_clip",
        version=1,
        families=EVERY_FAMILY,
        summary="The scale (and zero point) with the least squared error of each tensor, channel or group.",
        source="Banner et al. 2019, arXiv:1810.05723; least-squares scale after Rastegari et al. 2016,"
        " arXiv:1603.05279",
    ),
    "rtn": Quantizer(
        name="rtn",
        module="quant.quantizers.rtn",
        version=1,
        families=EVERY_FAMILY,
        summary="Round to nearest; the scale covers the full range of each tensor, channel or group.",
        source="Jacob et al. 2018, arXiv:1712.05877",
    ),
    "smoothquant": Quantizer(
        name="smoothquant",
        module="quant.quantizers.smoothquant",
        version=1,
        families=("integer", "float", "microscaling"),
        summary="Columns are multiplied in the weight and divided in the input before both are rounded.",
        source="Xiao et al. 2022, arXiv:2211.10438, section 4",
        needs_inputs=True,
        adjusts=Adjustment(
            shapes=_column_scales,
            parameter="percent",
            default=50,
            most=99,
            divides_inputs=True,
        ),
    ),
}

DEFAULT_QUANTIZER = "mse_clip"


@dataclass(frozen=True)
class Correction:
    """One line of CORRECTIONS: something that a plan changes beside its weights (quant/corrections.py).

    `version` is raised whenever the numbers change.
    """

    name: str
    version: int
    summary: str
    source: str


CORRECTIONS: dict[str, Correction] = {
    "batch_norm": Correction(
        name="batch_norm",
        version=1,
        summary="Statistics of batch norms follow what quantizing changes in their inputs.",
        source="batch-norm tuning in Hubara et al. 2021, arXiv:2006.10518",
    ),
    "bias": Correction(
        name="bias",
        version=1,
        summary="Biases take back the mean error that quantized weights bring to their layer's outputs.",
        source="Nagel et al. 2019, arXiv:1906.04721, section 4.2",
    ),
}


@dataclass(frozen=True)
class Exporter:
    """One line of EXPORTERS. `module` holds `lint`, `files`, `stored_bytes` and `read_back`.

    `library` is the consumer's package that `read_back` parses with; writing needs it only where the
    summary says so. `separate`: it cannot be installed beside our torch. `caches` are the types of key-value
    cache that the files can ask for, one for all layers; `cache_switches` tell for the other types that the
    consumer keeps which switches of its command ask for them.
    """

    name: str
    module: str
    library: str
    summary: str
    source: str
    separate: bool = False
    caches: tuple[str, ...] = ()
    cache_switches: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> ExporterModule:
        """Import the module."""
        return cast("ExporterModule", import_module(self.module))


EXPORTERS: dict[str, Exporter] = {
    "vllm": Exporter(
        name="vllm",
        module="quant.export.vllm",
        library="compressed_tensors",
        summary="config.json with a compressed-tensors quantization_config of mixed precision.",
        source="vLLM, scheme CompressedTensorsWNA16; compressed-tensors 0.20",
        caches=("fp8_e4m3",),
    ),
    "llm-compressor": Exporter(
        name="llm-compressor",
        module="quant.export.llm_compressor",
        library="compressed_tensors",
        summary="recipe.yaml with one QuantizationModifier or GPTQModifier and explicit config groups.",
        source="LLM Compressor, QuantizationModifier and GPTQModifier; compressed-tensors 0.20",
    ),
    "gptqmodel": Exporter(
        name="gptqmodel",
        module="quant.export.gptqmodel",
        library="gptqmodel",
        summary="quantize_config.json and config.json with a rule under `dynamic` for every module.",
        source="GPT-QModel 7.7, QuantizeConfig.from_quant_config and dynamic_get",
        separate=True,
    ),
    "auto-round": Exporter(
        name="auto-round",
        module="quant.export.auto_round",
        library="auto_round",
        summary="layer_config.json for the quantizer, config.json with extra_config for the loader.",
        source="AutoRound 0.16, get_layer_config of its loader",
    ),
    "modelopt": Exporter(
        name="modelopt",
        module="quant.export.modelopt",
        library="modelopt",
        summary="hf_quant_config.json of mixed precision, as TensorRT-LLM, vLLM and SGLang read it.",
        source="NVIDIA Model Optimizer 0.47, convert_hf_quant_config_format",
        caches=("fp8_e4m3",),
    ),
    "mlx": Exporter(
        name="mlx",
        module="quant.export.mlx",
        library="mlx",
        summary="config.json with a quantization entry for every module.",
        source="mlx-lm 0.32, load_model and generate; mlx.nn.quantize",
        cache_switches={
            "int8": "--kv-bits 8 --quantized-kv-start 0",
            "int4": "--kv-bits 4 --quantized-kv-start 0",
        },
    ),
    "llama.cpp": Exporter(
        name="llama.cpp",
        module="quant.export.llama_cpp",
        library="gguf",
        summary="tensor_types.txt for llama-quantize, every tensor by an anchored name; writing needs gguf.",
        source="llama.cpp, tools/quantize and src/llama-quant.cpp; tensor names of gguf 0.19",
    ),
    "torchao": Exporter(
        name="torchao",
        module="quant.export.torchao",
        library="torchao",
        summary="config.json with torchao's FqnToConfig for transformers; writing needs torchao.",
        source="torchao 0.18, FqnToConfig and config_to_dict; transformers 5.23, TorchAoConfig",
    ),
    "onnxruntime": Exporter(
        name="onnxruntime",
        module="quant.export.onnxruntime",
        library="onnxruntime",
        summary="matmul_nbits.json with the arguments of the MatMulNBits quantizer, by ONNX node name.",
        source="ONNX Runtime 1.31, MatMulNBitsQuantizer and RTNWeightOnlyQuantConfig",
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """One line of CHECKPOINTS. `module` holds `lint`, `layout` and `write`.

    `library` is the package that writing needs beyond Bitplan's own dependencies, if any; `writes` says
    whether the result is a folder or one file.
    """

    name: str
    module: str
    library: str | None
    writes: Literal["folder", "file"]
    summary: str
    source: str

    def load(self) -> CheckpointModule:
        """Import the module, without torch and without the library."""
        return cast("CheckpointModule", import_module(self.module))


CHECKPOINTS: dict[str, Checkpoint] = {
    "pytorch": Checkpoint(
        name="pytorch",
        module="quant.checkpoints.pytorch",
        library=None,
        writes="folder",
        summary="safetensors with dequantized weights in their own types, for transformers as it is.",
        source="safetensors 0.6, format of the header; transformers 5, from_pretrained",
    ),
    "pytorch-packed": Checkpoint(
        name="pytorch-packed",
        module="quant.checkpoints.packed",
        library=None,
        writes="folder",
        summary="safetensors with packed codes and scales, the plan's bytes, for load_checkpoint.",
        source="safetensors 0.6, format of the header; quant/packing.py and quant/codecs",
    ),
    "vllm": Checkpoint(
        name="vllm",
        module="quant.checkpoints.vllm",
        library="compressed_tensors",
        writes="folder",
        summary="safetensors packed by compressed-tensors, for vLLM and transformers.",
        source="compressed-tensors 0.20, PackedQuantizationCompressor",
    ),
    "gguf": Checkpoint(
        name="gguf",
        module="quant.checkpoints.gguf",
        library="gguf",
        writes="file",
        summary="One GGUF file for llama.cpp: tensors packed in the planned types, tokenizer, provenance.",
        source="gguf 0.19, GGUFWriter; llama.cpp, architectures llama, qwen2, qwen3, qwen3moe, bert",
    ),
    "onnxruntime": Checkpoint(
        name="onnxruntime",
        module="quant.checkpoints.onnxruntime",
        library="onnx",
        writes="folder",
        summary="an ONNX model with MatMulNBits nodes, weights in a data file beside it, for ONNX Runtime.",
        source="ONNX Runtime 1.31, com.microsoft.MatMulNBits; ONNX 1.23, external data",
    ),
    "torchao": Checkpoint(
        name="torchao",
        module="quant.checkpoints.torchao",
        library="torchao",
        writes="folder",
        summary="safetensors with the parts of torchao's tensors, for transformers.",
        source="torchao 0.18, safetensors_support; transformers 5.23, TorchAoHfQuantizer",
    ),
}


def consumer_fault(name: str, offered: Mapping[str, Any]) -> str | None:
    """Why a name is no consumer of EXPORTERS or CHECKPOINTS, whichever is `offered`; None where it is one.

    >>> consumer_fault("gguf", EXPORTERS).partition("Got ")[2]
    "'gguf'. It takes weights."
    """
    if name in offered:
        return None
    advice = "Pick one of them"
    if name in CHECKPOINTS:
        advice = "It takes weights"
    elif name in EXPORTERS:
        advice = "It takes configuration"
    return f"Consumer must be one of {', '.join(offered)}. Got {name[:60]!r}. {advice}."
