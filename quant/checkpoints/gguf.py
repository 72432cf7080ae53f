"""A GGUF file with the plan's types, its tensors packed with the very scales that were measured.

For causal language models of the Llama type, mixtures of experts among them, and for BERT encoders. Tensors
that the plan leaves alone keep their float type; vectors (norms, biases), routers and tables of positions and
token types are float32, as llama.cpp wants them. The file holds plan and provenance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quant.checkpoints.gguf_header import describe, head_width
from quant.checkpoints.joined import transformers_config
from quant.checkpoints.protocol import CheckpointError, Layout, OutputFile, Wrote
from quant.checkpoints.source import Source, StoredTensor
from quant.export.gguf_names import architecture, gguf_library, module_names, tensor_names
from quant.export.llama_cpp import FLOATS, gguf_types, model_faults, named
from quant.export.protocol import Deployment, Violation
from quant.export.rules import no_additions, one_cache

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf

MODELS = {
    "bert": "BertModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""`model_type` -> the class whose tensors can be written."""
EXPERTS = ("mixtral", "qwen3_moe")
"""Of these, models whose experts are joined parameters."""
ROPES = ("default", "linear", "llama3", "yarn")
OWN = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Type of a stored tensor -> GGML's for one that the plan leaves alone."""
NOT_WRITTEN = ("rotary_emb.inv_freq", "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Ends of the names of stored tensors that llama.cpp computes, or does without."""
FLOAT32 = (".ffn_gate_inp.", "position_embd.", "token_types.")
"""Parts of the names of matrices that are float32 unless they are planned."""
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")
"""What llama.cpp takes for its own, which is the one with tanh."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file: its GGUF name, elements and bytes."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, its GGML type, and the tensors of the file that hold it.

    `stored` are the source's tensors, several for experts that are stored apart. `layer` is the plan's, None
    where the plan leaves the parameter alone. `heads`: llama.cpp rotates pairs of neighboring rows, so the
    rows of these heads are put in its order; 0 where rows stay as they are. Joined gate and up projections
    of experts become two tensors: the halves of every expert's rows.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    layer: str | None
    kind: str
    heads: int
    tensors: tuple[FileTensor, ...]


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of what can be written for llama.cpp."""
    faults = tuple(model_faults(deployment))
    return (
        *faults,
        *_model(deployment.model.config),
        *no_additions(deployment),
        *one_cache(deployment, ()),
        *gguf_types(deployment),
        *(() if faults else named(deployment)),
        *(() if faults else _read_as_float32(deployment)),
    )


def _read_as_float32(deployment: Deployment) -> Iterator[Violation]:
    names = tensor_names(deployment.model.config, deployment.quantized)
    for module, told in names.items():
        if told[0].startswith(FLOAT32[1:]):
            yield Violation(module, "llama.cpp reads this table as float32", deployment.layers[module].scheme)


def _model(config: Any) -> Iterator[Violation]:
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if kind not in MODELS:
        rule = f"model_type must be one of {', '.join(MODELS)} to be written as GGUF"
        yield Violation("config.json", rule, repr(kind))
    elif MODELS[kind] not in classes:
        yield Violation("config.json", f"architectures must name {MODELS[kind]}", repr(classes))
    if kind == "bert":
        yield from _encoder(config)
        return
    if kind == "qwen3_moe" and not config.get("norm_topk_prob"):
        yield Violation("config.json", "norm_topk_prob must be true, as in llama.cpp", "not true")
    if kind == "qwen3_moe" and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        yield Violation(
            "config.json", "every block must have experts", "mlp_only_layers, decoder_sparse_step"
        )
    if config.get("hidden_act", "silu") != "silu":
        yield Violation("config.json", "hidden_act must be 'silu'", repr(config["hidden_act"]))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turned = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if turned not in ROPES:
        yield Violation("config.json", f"the rope type must be one of {', '.join(ROPES)}", repr(turned))
    elif turned == "yarn":
        yield from _yarn(rope)


def _yarn(rope: Mapping[str, Any]) -> Iterator[Violation]:
    """llama.cpp takes the paper's factor of attention, and whole dimensions as bounds of the ramp."""
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    if not isinstance(factor, int | float) or factor < 1:
        yield Violation("config.json", "yarn's factor must be a number of at least 1", repr(factor))
        return
    usual = 0.1 * log(factor) + 1
    if attention is not None and (not isinstance(attention, int | float) or abs(attention - usual) > 1e-6):
        yield Violation("config.json", f"yarn's attention_factor must be {usual:.6g}", repr(attention))
    for key, wanted in (("mscale", False), ("mscale_all_dim", False), ("truncate", True)):
        if bool(rope.get(key, wanted)) is not wanted:
            must = "be true" if wanted else "not be given"
            yield Violation("config.json", f"yarn's {key} must {must}", repr(rope[key]))


def _encoder(config: Mapping[str, Any]) -> Iterator[Violation]:
    if config.get("hidden_act", "gelu") not in GELU:
        yield Violation(
            "config.json", f"hidden_act must be one of {', '.join(GELU)}", repr(config["hidden_act"])
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        rule, got = "position_embedding_type must be 'absolute'", repr(config["position_embedding_type"])
        yield Violation("config.json", rule, got)
    if config.get("is_decoder"):
        yield Violation("config.json", "is_decoder must be false: an encoder sees all tokens", "true")


def layout(source: Source, deployment: Deployment) -> Layout:
    """Header, metadata and tensor table are written to a temporary file, tensors are counted."""
    config = transformers_config(source.folder)
    parameters = file_parameters(source, deployment, config)
    with TemporaryDirectory() as folder:
        place = Path(folder) / "header"
        writer, extra = _begun(place, source, deployment, config, parameters)
        writer.close()
        header = place.stat().st_size
    sizes = [
        *(len(data) for _, data in extra),
        *(tensor.nbytes for item in parameters for tensor in item.tensors),
    ]
    padded = [writer.ggml_pad(size, writer.data_alignment) for size in (header, *sizes)]
    planned = sum(layer.bytes for layer in deployment.plan.layers.values())
    return Layout((OutputFile("model.gguf", sum(padded), sum(sizes)),), planned)


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Write the file `out`, one parameter in memory at a time."""
    import numpy as np

    config = transformers_config(source.folder)
    parameters = file_parameters(source, deployment, config)
    writer, extra = _begun(out, source, deployment, config, parameters)
    try:
        for _, data in extra:
            writer.write_tensor_data(np.frombuffer(data, dtype=np.uint8))
        for item, weight in _values(source, parameters):
            for data in _packed(item, weight, deployment, inputs):
                writer.write_tensor_data(np.frombuffer(data, dtype=np.uint8))
            if item.layer is not None:
                wrote(item.layer)
    finally:
        writer.close()


def _values(source: Source, parameters: list[Parameter]) -> Iterator[tuple[Parameter, Tensor]]:
    """Every parameter with its values, in order."""
    from itertools import chain, groupby

    from quant.checkpoints.tensors import each_joined, each_stored

    def joined(item: Parameter) -> bool:
        return item.stored[0].part_of is not None

    for apart, members in groupby(parameters, key=joined):
        run = list(members)
        stored = list(chain.from_iterable(item.stored for item in run))
        values = each_joined(source, stored) if apart else each_stored(source, stored)
        yield from zip(run, (weight for _, weight in values), strict=True)


def _begun(
    place: Path, source: Source, deployment: Deployment, config: Any, parameters: list[Parameter]
) -> tuple[Any, list[tuple[str, bytes]]]:
    """A writer whose header, metadata and tensor table lie in `place`, and the tensors that come first."""
    import numpy as np

    library = gguf_library()
    writer = library.GGUFWriter(place, architecture(deployment.model.config))
    describe(writer, source, config, deployment)
    extra = list(_rope_factors(config))
    for name, data in extra:
        writer.add_tensor_info(name, (len(data) // 4,), np.dtype("float32"), len(data))
    for item in parameters:
        kind = library.GGMLQuantizationType[item.kind.upper()]
        for told in item.tensors:
            writer.add_tensor_info(told.name, told.shape, np.dtype("float32"), told.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer, extra


def _rope_factors(config: Any) -> Iterator[tuple[str, bytes]]:
    """What llama.cpp divides rotation frequencies by, float32 (head width / 2,), from transformers' own."""
    if getattr(config, "rope_parameters", None) is None or config.rope_parameters["rope_type"] != "llama3":
        return
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_width(config), 2).float() / head_width(config)
    plain = 1 / config.rope_parameters["rope_theta"] ** exponents
    yield "rope_freqs.weight", (plain / scaled).float().numpy().tobytes()


def file_parameters(source: Source, deployment: Deployment, config: Any) -> list[Parameter]:
    """The parameters in the file, in the order of the source's files and offsets.

    Raises CheckpointError for a stored tensor that GGUF has no place for.
    """
    planned = {(item.file, item.tensor): item.layer for item in source.stored(deployment.plan)}
    stored = list(_stored(source))
    names = _gguf_names(deployment.model.config, [name for name, _, _ in stored])
    found = []
    for name, shape, members in stored:
        if names.get(name) == ("output.weight",) and config.tie_word_embeddings:
            continue
        if name not in names or members[0].entry.dtype not in OWN:
            raise CheckpointError(
                "Every stored tensor must have a place in a GGUF file of this architecture."
                f" Got {name} ({members[0].entry.dtype}). Save the model again with save_pretrained()."
            )
        layer = planned.get((members[0].file, members[0].tensor))
        found.append(_parameter(name, shape, members, layer, names[name], deployment, config))
    told = [tensor.name for item in found for tensor in item.tensors]
    twice = next((name for name in told if told.count(name) > 1), None)
    if twice:
        raise CheckpointError(
            f"Tensors must differ in GGUF. Got two for {twice}. Save the model again with save_pretrained()."
        )
    return found


def _stored(source: Source) -> Iterator[tuple[str, tuple[int, ...], tuple[StoredTensor, ...]]]:
    """(parameter, its shape, the tensors it is stored in); experts that are stored apart are joined."""
    entries = {
        name: (file, entry)
        for file, header in source.headers.items()
        for name, entry in sorted(header.tensors.items(), key=lambda pair: pair[1].start)
        if not name.endswith(NOT_WRITTEN)
    }
    if source.config.get("model_type") not in EXPERTS:
        for name, (file, entry) in entries.items():
            yield name, entry.shape, (StoredTensor(file, name, "", entry),)
        return
    joined = source.joined
    parts = {name: [part.tensor for part in several] for name, several in joined.parts.items()}
    shapes = {name: tuple(value.shape) for name, value in joined.model.state_dict().items()}
    unknown = set(entries) - {tensor for several in parts.values() for tensor in several}
    parts |= {name: [name] for name in sorted(unknown)}
    for name, several in parts.items():
        whole = name in unknown or not joined.converted(name)
        told = None if whole else name
        members = tuple(StoredTensor(entries[t][0], t, "", entries[t][1], told) for t in several)
        yield name, members[0].entry.shape if whole else shapes[name], members


def _gguf_names(config: Mapping[str, Any], parameters: list[str]) -> dict[str, tuple[str, ...]]:
    """Parameter -> names of the tensors that hold it in the file; two for joined experts."""
    plain = {name.rpartition(".")[0] for name in parameters if name.endswith((".weight", ".bias"))}
    modules = module_names(config, plain)
    found = tensor_names(config, [name for name in parameters if not name.endswith((".weight", ".bias"))])
    for name in parameters:
        module, _, part = name.rpartition(".")
        if module in modules:
            found[name] = (f"{modules[module]}.{part}",)
    return found


def _parameter(
    name: str,
    shape: tuple[int, ...],
    stored: tuple[StoredTensor, ...],
    layer: str | None,
    names: tuple[str, ...],
    deployment: Deployment,
    config: Any,
) -> Parameter:
    plain = len(shape) < 2 or any(part in names[0] for part in FLOAT32)
    kind = "f32" if plain else OWN[stored[0].entry.dtype]
    if layer is not None:
        short = deployment.schemes[layer].weight.short
        kind = FLOATS.get(short, short)
    heads = 0
    if architecture(deployment.model.config) == "llama" and ".attn_q." in names[0]:
        heads = config.num_attention_heads
    elif architecture(deployment.model.config) == "llama" and ".attn_k." in names[0]:
        heads = config.num_key_value_heads or config.num_attention_heads
    library = gguf_library()
    block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind.upper()]]
    each = shape if len(names) == 1 else (shape[0], shape[1] // len(names), *shape[2:])
    tensors = tuple(FileTensor(told, each, prod(each) // block * size) for told in names)
    return Parameter(name, shape, stored, layer, kind, heads, tensors)


def _packed(
    item: Parameter, weight: Tensor, deployment: Deployment, inputs: InputsOf | None
) -> Iterator[bytes]:
    """The bytes of a parameter's tensors. Rows are put in order only after quantizing."""
    import torch

    from quant.apply import encode_weight
    from quant.checkpoints.tensors import tensor_bytes
    from quant.formats import codec_of

    rows = prod(item.shape[:-1]) if len(item.shape) > 1 else item.shape[0]
    if item.layer is None:
        dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        data = weight.to(dtypes[item.kind]).contiguous().reshape(rows, -1).view(torch.uint8)
    else:
        scheme, op = deployment.schemes[item.layer], deployment.layers[item.layer].op
        encoded = encode_weight(weight, op, item.layer, scheme, inputs)
        data = codec_of(scheme.weight).pack(encoded).values.reshape(rows, -1)
    if item.heads:
        data = data[_row_order(rows, item.heads)]
    count = len(item.tensors)
    if count == 1:
        yield tensor_bytes(data)
        return
    halves = data.reshape(item.shape[0], count, -1)
    for number in range(count):
        yield tensor_bytes(halves[:, number])


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
    names = tensor_names(deployment.model.config, deployment.layers)
    for name, layer in deployment.plan.layers.items():
        told = [tensors[tensor] for tensor in names[name] if tensor in tensors]
        parts = [gguf_library().quants.dequantize(tensor.data, tensor.tensor_type) for tensor in told]
        weight = torch.cat([torch.from_numpy(part.copy()) for part in parts], dim=1 if len(parts) > 1 else 0)
        turned = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(names[name][0].split(".")[-2])
        if kind == "llama" and turned:
            heads = reader.fields[f"llama.attention.{turned}"].contents()
            weight = weight[_row_order(len(weight), heads).argsort()]
        yield name, weight.reshape(layer.shape)
