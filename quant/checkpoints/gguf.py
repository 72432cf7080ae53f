"""A GGUF file with the plan's types, its tensors packed with the very scales that were measured.

For causal language models of the Llama type. Tensors that the plan leaves alone keep their float type;
vectors (norms, biases) are float32, as llama.cpp wants them. The file holds plan and provenance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quant.checkpoints.gguf_header import describe, head_width
from quant.checkpoints.protocol import CheckpointError, Layout, OutputFile, Wrote
from quant.checkpoints.source import Source, StoredTensor
from quant.export.gguf_names import architecture, gguf_library, module_names
from quant.export.llama_cpp import FLOATS, gguf_types, model_faults, named
from quant.export.protocol import Deployment, Violation

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf

MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` -> the class whose tensors can be written."""
ROPES = ("default", "linear", "llama3")
OWN = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Type of a stored tensor -> GGML's for one that the plan leaves alone."""
NOT_WRITTEN = ("rotary_emb.inv_freq",)
"""Ends of the names of stored tensors that are computed from the configuration."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file: its GGUF name, elements, GGML type and bytes, and where its values are stored.

    `layer` is the plan's, None where the plan leaves the tensor alone. `heads`: llama.cpp rotates pairs of
    neighboring rows, so the rows of these heads are put in its order; 0 where rows stay as they are.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    stored: StoredTensor
    layer: str | None
    heads: int


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of what can be written for llama.cpp."""
    faults = tuple(model_faults(deployment))
    return (
        *faults,
        *_model(deployment.model.config),
        *gguf_types(deployment),
        *(() if faults else named(deployment)),
    )


def _model(config: Any) -> Iterator[Violation]:
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if kind not in MODELS:
        rule = f"model_type must be one of {', '.join(MODELS)} to be written as GGUF"
        yield Violation("config.json", rule, repr(kind))
    elif MODELS[kind] not in classes:
        yield Violation("config.json", f"architectures must name {MODELS[kind]}", repr(classes))
    if config.get("hidden_act", "silu") != "silu":
        yield Violation("config.json", "hidden_act must be 'silu'", repr(config["hidden_act"]))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turned = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if turned not in ROPES:
        yield Violation("config.json", f"the rope type must be one of {', '.join(ROPES)}", repr(turned))


def layout(source: Source, deployment: Deployment) -> Layout:
    """Header, metadata and tensor table are written to a temporary file, tensors are counted."""
    config = _config(source)
    tensors = file_tensors(source, deployment, config)
    with TemporaryDirectory() as folder:
        place = Path(folder) / "header"
        writer, extra = _begun(place, source, deployment, config, tensors)
        writer.close()
        header = place.stat().st_size
    sizes = [*(len(data) for _, data in extra), *(tensor.nbytes for tensor in tensors)]
    padded = [writer.ggml_pad(size, writer.data_alignment) for size in (header, *sizes)]
    planned = sum(layer.bytes for layer in deployment.plan.layers.values())
    return Layout((OutputFile("model.gguf", sum(padded), sum(sizes)),), planned)


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Write the file `out`, one tensor in memory at a time."""
    import numpy as np

    from quant.checkpoints.tensors import each_stored

    config = _config(source)
    tensors = file_tensors(source, deployment, config)
    writer, extra = _begun(out, source, deployment, config, tensors)
    try:
        for _, data in extra:
            writer.write_tensor_data(np.frombuffer(data, dtype=np.uint8))
        values = each_stored(source, [tensor.stored for tensor in tensors])
        for tensor, (_, weight) in zip(tensors, values, strict=True):
            data = _packed(tensor, weight, deployment, inputs)
            writer.write_tensor_data(np.frombuffer(data, dtype=np.uint8))
            if tensor.layer is not None:
                wrote(tensor.layer)
    finally:
        writer.close()


def _config(source: Source) -> Any:
    """The configuration with transformers' own defaults. Raises CheckpointError for one it cannot read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"config.json must be one that transformers reads. Got {error}. Save the model again."
        ) from error


def _begun(
    place: Path, source: Source, deployment: Deployment, config: Any, tensors: list[FileTensor]
) -> tuple[Any, list[tuple[str, bytes]]]:
    """A writer whose header, metadata and tensor table lie in `place`, and the tensors that come first."""
    import numpy as np

    library = gguf_library()
    writer = library.GGUFWriter(place, architecture(deployment.model.config))
    describe(writer, source, config, deployment)
    extra = list(_rope_factors(config))
    for name, data in extra:
        writer.add_tensor_info(name, (len(data) // 4,), np.dtype("float32"), len(data))
    for tensor in tensors:
        kind = library.GGMLQuantizationType[tensor.kind.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("float32"), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer, extra


def _rope_factors(config: Any) -> Iterator[tuple[str, bytes]]:
    """What llama.cpp divides rotation frequencies by, float32 (head width / 2,), from transformers' own."""
    if config.rope_parameters["rope_type"] != "llama3":
        return
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_width(config), 2).float() / head_width(config)
    plain = 1 / config.rope_parameters["rope_theta"] ** exponents
    yield "rope_freqs.weight", (plain / scaled).float().numpy().tobytes()


def file_tensors(source: Source, deployment: Deployment, config: Any) -> list[FileTensor]:
    """The tensors of the file, in the order of the source's files and offsets.

    Raises CheckpointError for a stored tensor that GGUF has no place for.
    """
    planned = {(item.file, item.tensor): item for item in source.stored(deployment.plan)}
    stored = [
        StoredTensor(file, name, "", entry)
        for file, header in source.headers.items()
        for name, entry in sorted(header.tensors.items(), key=lambda pair: pair[1].start)
        if not name.endswith(NOT_WRITTEN)
    ]
    modules = module_names(deployment.model.config, {item.tensor.rpartition(".")[0] for item in stored})
    found: dict[str, FileTensor] = {}
    for item in stored:
        module, _, part = item.tensor.rpartition(".")
        if modules.get(module) == "output" and config.tie_word_embeddings:
            continue
        if module not in modules or part not in ("weight", "bias") or item.entry.dtype not in OWN:
            raise CheckpointError(
                "Every stored tensor must have a place in a GGUF file of this architecture."
                f" Got {item.tensor} ({item.entry.dtype}). Save the model again with save_pretrained()."
            )
        name = f"{modules[module]}.{part}"
        if name in found:
            raise CheckpointError(
                f"Tensors must differ in GGUF. Got {found[name].stored.tensor} and {item.tensor} for {name}."
                " Save the model again with save_pretrained()."
            )
        layer = planned[item.file, item.tensor].layer if (item.file, item.tensor) in planned else None
        found[name] = _file_tensor(name, item, layer, deployment, config)
    return list(found.values())


def _file_tensor(
    name: str, stored: StoredTensor, layer: str | None, deployment: Deployment, config: Any
) -> FileTensor:
    shape = stored.entry.shape
    kind = "f32" if len(shape) < 2 else OWN[stored.entry.dtype]
    if layer is not None:
        short = deployment.schemes[layer].weight.short
        kind = FLOATS.get(short, short)
    library = gguf_library()
    block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind.upper()]]
    heads = 0
    if architecture(deployment.model.config) == "llama" and ".attn_q." in name:
        heads = config.num_attention_heads
    elif architecture(deployment.model.config) == "llama" and ".attn_k." in name:
        heads = config.num_key_value_heads or config.num_attention_heads
    return FileTensor(name, shape, kind, prod(shape) // block * size, stored, layer, heads)


def _packed(tensor: FileTensor, weight: Tensor, deployment: Deployment, inputs: InputsOf | None) -> bytes:
    """A tensor's bytes in the file. Rows are put in order after quantizing, which saw them as they were."""
    import torch

    from quant.apply import encode_weight
    from quant.checkpoints.tensors import tensor_bytes
    from quant.formats import codec_of

    if tensor.layer is None:
        dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        data = weight.to(dtypes[tensor.kind]).contiguous().reshape(weight.shape[0], -1).view(torch.uint8)
    else:
        scheme, op = deployment.schemes[tensor.layer], deployment.layers[tensor.layer].op
        encoded = encode_weight(weight, op, tensor.layer, scheme, inputs)
        data = codec_of(scheme.weight).pack(encoded).values.reshape(weight.shape[0], -1)
    return tensor_bytes(data[_row_order(len(data), tensor.heads)] if tensor.heads else data)


def _row_order(rows: int, heads: int) -> Tensor:
    """Which row of ours lies where in llama.cpp: the halves of each head by turns."""
    import torch

    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Dequantized by the gguf package, rows in the model's own order."""
    import torch

    reader = gguf_library().GGUFReader(place)
    kind = reader.fields["general.architecture"].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = module_names(deployment.model.config, deployment.layers)
    for name, layer in deployment.plan.layers.items():
        tensor = tensors[f"{names[name]}.weight"]
        values = gguf_library().quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(values.copy()).reshape(layer.shape)
        turned = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(names[name].rpartition(".")[2])
        if kind == "llama" and turned:
            heads = reader.fields[f"llama.attention.{turned}"].contents()
            weight = weight[_row_order(len(weight), heads).argsort()]
        yield name, weight
