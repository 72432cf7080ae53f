"""A traced graph with a plan's MatMulNBits nodes in it, and where every weight lies in the data file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor
from torch.nn.functional import pad

from quant.apply import InputsOf, encode_weight
from quant.checkpoints.onnx_graph import Graph, trace
from quant.checkpoints.onnxruntime import DATA, MODEL, OPS
from quant.checkpoints.protocol import CheckpointError, Wrote
from quant.checkpoints.source import FLOATS, Source, StoredTensor
from quant.checkpoints.tensors import each_stored, tensor_bytes
from quant.export.onnxruntime import node_name
from quant.export.protocol import Deployment, WeightFacts
from quant.ops import from_matrix
from quant.packing import Encoded, pack_bits, unpack_bits
from quant.storage import Matrix

ALIGNMENT = 64
MODULE_KEY = "bitplan.module"
"""Metadata of a linear layer's node: its module path."""


@dataclass(frozen=True)
class Part:
    """One tensor of the data file: ONNX type and shape, first byte and size."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


Parts = dict[str, tuple[Part, ...]]
"""Weight -> the parts it fills: itself, or its values, scales and perhaps zero points."""


@dataclass(frozen=True)
class OnnxModel:
    """What is written: the serialized graph and the parts of the data file.

    `stored` says where each weight lies in the source (its `layer` is the weight's name), `layers` which
    layer of the plan each planned weight is.
    """

    proto: bytes
    parts: Parts
    stored: tuple[StoredTensor, ...]
    layers: dict[str, str]

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return max((part.start + part.nbytes for part in _all(self.parts)), default=0)

    @property
    def payload_bytes(self) -> int:
        """Of all tensors in it."""
        return sum(part.nbytes for part in _all(self.parts))

    @property
    def planned_bytes(self) -> int:
        """Of the tensors of the plan's layers."""
        return sum(part.nbytes for weight in self.layers for part in self.parts[weight])


def _all(parts: Parts) -> Iterator[Part]:
    return (part for members in parts.values() for part in members)


def lay_out(source: Source, deployment: Deployment) -> OnnxModel:
    """The graph of the source's model with the plan in it. Raises CheckpointError where they do not fit."""
    graph = trace(source.folder)
    layers = {_planned_weight(graph, path): path for path in deployment.plan.layers}
    parts = _lay_parts(graph, layers, deployment)
    proto = onnx.load_from_string(graph.proto)
    _name_and_replace(proto.graph, graph, parts, deployment)
    for part in _all(parts):
        proto.graph.initializer.append(_external(part))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return OnnxModel(proto.SerializeToString(deterministic=True), parts, _stored(graph, source), layers)


def _planned_weight(graph: Graph, path: str) -> str:
    weight = _weight(graph, path)
    if weight is None:
        raise CheckpointError(
            f"Plan must name layers that the model's forward pass uses. Got {path!r}, which its ONNX graph"
            " does not read. Leave it out of the plan."
        )
    return weight


def _weight(graph: Graph, path: str) -> str | None:
    """The name under which the graph reads a module's weight."""
    name = f"{path}.weight"
    return next((other for other in (name, *graph.tied.get(name, ())) if other in graph.weights), None)


# -- the data file --------------------------------------------------------------------------------


def _lay_parts(graph: Graph, layers: Mapping[str, str], deployment: Deployment) -> Parts:
    """Every tensor, one after another, each at a multiple of ALIGNMENT."""
    place = 0
    found: Parts = {}
    for weight, shape in graph.weights.items():
        facts = deployment.quantized.get(layers.get(weight, ""))
        if facts is None:
            tensors = [("", int(TensorProto.FLOAT), shape)]
        else:
            tensors = list(_node_tensors(facts, deployment.plan.layers[layers[weight]].matrix))
        members = []
        for ending, dtype, sides in tensors:
            nbytes = prod(sides) * (4 if dtype == TensorProto.FLOAT else 1)
            members.append(Part(weight + ending, dtype, sides, place, nbytes))
            place += -(-nbytes // ALIGNMENT) * ALIGNMENT
        found[weight] = tuple(members)
    return found


def _node_tensors(facts: WeightFacts, matrix: Matrix) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Endings of names, types and shapes of a MatMulNBits node's constant inputs."""
    assert facts.group_size is not None, "the linter refuses such plans"
    rows, columns = matrix
    blocks = -(-columns // facts.group_size)
    yield f"_Q{facts.bits}", TensorProto.UINT8, (rows, blocks, facts.group_size * facts.bits // 8)
    yield "_scales", TensorProto.FLOAT, (rows, blocks)
    if not facts.symmetric:
        yield "_zero_points", TensorProto.UINT8, (rows, -(-blocks * facts.bits // 8))


def _external(part: Part) -> TensorProto:
    """An initializer whose values lie in the data file."""
    tensor = TensorProto(name=part.name, data_type=part.dtype, dims=part.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", DATA), ("offset", part.start), ("length", part.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_data(
    model: OnnxModel,
    source: Source,
    deployment: Deployment,
    place: Path,
    inputs: InputsOf | None,
    wrote: Wrote,
) -> None:
    """Fill the data file, one weight of the source at a time."""
    with place.open("wb") as stream:
        stream.truncate(model.data_bytes)
        for item, weight in each_stored(source, model.stored):
            path = model.layers.get(item.layer)
            for part, tensor in zip(
                model.parts[item.layer], _values(weight, path, deployment, inputs), strict=True
            ):
                stream.seek(part.start)
                stream.write(tensor_bytes(tensor))
            if path is not None:
                wrote(path)


def _values(
    weight: Tensor, path: str | None, deployment: Deployment, inputs: InputsOf | None
) -> list[Tensor]:
    """A weight in float32, or the constant inputs of its node."""
    if path is None or path not in deployment.quantized:
        return [weight.float()]
    op, scheme = deployment.layers[path].op, deployment.schemes[path]
    encoded = encode_weight(weight, op, path, scheme, inputs)
    assert isinstance(encoded, Encoded), "the linter refuses such plans"
    return node_values(encoded)


def node_values(encoded: Encoded) -> list[Tensor]:
    """Values packed by block, scales, and zero points packed by row: what MatMulNBits reads.

    The operator stores unsigned values; without zero points it subtracts half of their range.
    """
    fmt, (rows, blocks, _) = encoded.fmt, encoded.values.shape
    half = 1 << (fmt.bits - 1) if fmt.symmetric else 0
    values = (encoded.values.to(torch.int16) + half).to(torch.uint8)
    tensors = [pack_bits(values, fmt.bits), encoded.scales.float()]
    if encoded.zero_points is not None:
        whole = pack_bits(pad(encoded.zero_points, (0, -blocks % 8)), fmt.bits).reshape(rows, -1)
        tensors.append(whole[:, : -(-blocks * fmt.bits // 8)])
    return tensors


def _stored(graph: Graph, source: Source) -> tuple[StoredTensor, ...]:
    """Where every weight of the graph lies in the source, in the order of files; `layer` is the weight."""
    places = {name: file for file, header in source.headers.items() for name in header.tensors}
    found = []
    for weight, shape in graph.weights.items():
        names = (weight, *graph.tied.get(weight, ()))
        spelled = [
            form for name in names for form in (name, graph.prefix + name, name.removeprefix(graph.prefix))
        ]
        name = next((form for form in spelled if form in places), None)
        if name is None:
            raise CheckpointError(
                f"Checkpoint must hold every weight of the model. Got none for {weight!r}."
                " Save the model again with save_pretrained()."
            )
        entry = source.headers[places[name]].tensors[name]
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise CheckpointError(
                f"Tensor {name!r} must have the shape {shape} and one of the types {', '.join(FLOATS)}. Got"
                f" {entry.shape} and {entry.dtype}. Save the model again with save_pretrained()."
            )
        found.append(StoredTensor(places[name], name, weight, entry))
    return tuple(sorted(found, key=lambda item: (item.file, item.entry.start)))


def _spellings(graph: Graph, weight: str) -> Iterator[str]:
    """Names that a checkpoint may give a weight: its own and tied ones, with the model's prefix or not."""
    for name in (weight, *graph.tied.get(weight, ())):
        yield from (name, graph.prefix + name, name.removeprefix(graph.prefix))


# -- the graph ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readers:
    """Nodes that read a weight: products with the layer's matrix, transposes for them, and all others."""

    products: tuple[NodeProto, ...]
    transposes: tuple[NodeProto, ...]
    others: tuple[NodeProto, ...]


def _name_and_replace(proto: Any, graph: Graph, parts: Parts, deployment: Deployment) -> None:
    """Nodes of linear layers get their modules' names; those of quantized layers become MatMulNBits."""
    uses = defaultdict(list)
    for node in proto.node:
        for name in dict.fromkeys(node.input):
            uses[name].append(node)
    unneeded: set[str] = set()
    for module in deployment.model.modules:
        weight = _weight(graph, module.name) if module.op in OPS else None
        if weight is None:
            continue
        readers = _readers(weight, uses, transposed=module.op == "linear")
        facts = deployment.quantized.get(module.name)
        if facts is not None:
            _require_products(module.name, readers)
            unneeded |= {node.output[0] for node in readers.transposes}
        for number, node in enumerate(readers.products):
            name = node_name(module.name) + (f"_{number}" if number else "")
            node.name = name if facts is None else f"{name}_Q{facts.bits}"
            node.metadata_props.add(key=MODULE_KEY, value=module.name)
            if facts is not None:
                _replace(node, parts[weight], deployment.layers[module.name].matrix, facts)
    for index in reversed(range(len(proto.node))):
        if proto.node[index].output[0] in unneeded:
            del proto.node[index]


def _readers(weight: str, uses: Mapping[str, list[NodeProto]], *, transposed: bool) -> Readers:
    """`transposed`: the layer multiplies by the transpose of what is stored."""
    transposes = tuple(node for node in uses[weight] if node.op_type == "Transpose")
    turned = {node.output[0] for node in transposes}
    readers = [node for node in uses[weight] if node.op_type != "Transpose"]
    readers += [node for name in sorted(turned) for node in uses[name]]
    products = tuple(node for node in readers if _multiplies(node, weight, turned) is transposed)
    others = tuple(node for node in readers if _multiplies(node, weight, turned) is not transposed)
    return Readers(products, transposes, others)


def _multiplies(node: NodeProto, weight: str, turned: set[str]) -> bool | None:
    """Whether a node multiplies something by the stored weight transposed (or not); None: it does neither."""
    if len(node.input) < 2 or node.input[1] not in (weight, *turned):
        return None
    transposed = node.input[1] in turned
    if node.op_type == "MatMul":
        return transposed
    if node.op_type == "Gemm":
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        plain = (values.get("alpha", 1.0), values.get("beta", 1.0), values.get("transA", 0)) == (1.0, 1.0, 0)
        return transposed ^ bool(values.get("transB", 0)) if plain else None
    return None


def _require_products(path: str, readers: Readers) -> None:
    if readers.others or not readers.products:
        found = ", ".join(sorted({node.op_type for node in readers.others})) or "none"
        raise CheckpointError(
            f"Weight of {path!r} must be read by products with its layer's input only. Got {found}."
            " Leave it out of the plan."
        )


def _replace(node: NodeProto, parts: tuple[Part, ...], matrix: Matrix, facts: WeightFacts) -> None:
    """Make a product with constant weight a MatMulNBits of the same input, bias and output."""
    rows, columns = matrix
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    inputs = [node.input[0], *(part.name for part in parts)]
    if bias:
        inputs += [""] * (5 - len(inputs)) + [bias]
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    sizes = {"K": columns, "N": rows, "bits": facts.bits, "block_size": facts.group_size}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in sizes.items())


# -- reading --------------------------------------------------------------------------------------


def read_weights(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight) of every planned layer of a written folder, dequantized, one at a time."""
    graph = onnx.load(str(place / MODEL), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}

    def values(name: str) -> Tensor:
        tensor = TensorProto()
        tensor.CopyFrom(tensors[name])
        load_external_data_for_tensor(tensor, str(place))
        return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())

    nodes = {
        item.value: node
        for node in graph.node
        for item in node.metadata_props
        if item.key == MODULE_KEY and node.op_type == "MatMulNBits"
    }
    for path, layer in deployment.plan.layers.items():
        if path in nodes:
            matrix = dequantized(nodes[path], values)
            yield path, from_matrix(matrix, layer.op, layer.shape).contiguous()
        else:
            named = (f"{name}.weight" for name in (path, *layer.aliases))
            yield path, values(next(name for name in named if name in tensors))


def dequantized(node: NodeProto, values: Callable[[str], Tensor]) -> Tensor:
    """The matrix (output channels, columns) that a MatMulNBits node stands for; `values` gives its inputs."""
    sizes = {item.name: item.i for item in node.attribute}
    bits, rows, size = sizes["bits"], sizes["N"], sizes["block_size"]
    scales = values(node.input[2])
    blocks = scales.shape[1]
    levels = unpack_bits(values(node.input[1]).reshape(-1), bits, rows * blocks * size)
    points = torch.full((rows, blocks), 1 << (bits - 1), dtype=torch.uint8)
    if len(node.input) > 3 and node.input[3]:
        points = torch.stack([unpack_bits(row, bits, blocks) for row in values(node.input[3])])
    matrix = levels.reshape(rows, blocks, size).float().sub_(points[..., None]).mul_(scales[..., None])
    return matrix.reshape(rows, -1)[:, : sizes["K"]]
