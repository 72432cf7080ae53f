"""ONNX Runtime: the `customized_weight_config` of its MatMulNBits quantizer, by ONNX node name.

`matmul_nbits.json` goes to `MatMulNBitsQuantizer(model, nodes_to_exclude=..., algo_config=
RTNWeightOnlyQuantConfig(customized_weight_config=...))`. The quantizer gives 4 bits to every node that is
not mentioned, so all modules that keep their precision are listed as excluded (a name without a node does no
harm, and a head that shares an embedding's weight is listed as one). Nodes are named as `torch.onnx.export`
and Optimum name them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import Takes, only_formats, only_ops

FILE = "matmul_nbits.json"
BLOCKS = (16, 32, 64, 128, 256)
TAKES = (Takes("int", symmetric=(4, 8), asymmetric=(4, 8), scales=BLOCKS, whole_groups=False),)


def node_name(path: str) -> str:
    """The name of a linear module's MatMul: an index belongs to the list before it.

    >>> node_name("model.layers.0.mlp.up_proj")
    '/model/layers.0/mlp/up_proj/MatMul'
    """
    name = ""
    for part in path.split("."):
        name += f".{part}" if part.isdigit() and name else f"/{part}"
    return f"{name}/MatMul"


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the rules of the quantizer and of MatMulNBits."""
    return (
        *only_ops(deployment, ("linear",)),
        *only_formats(deployment, *TAKES),
        *_even_blocks(deployment),
    )


def _even_blocks(deployment: Deployment) -> Iterator[Violation]:
    """The quantizer packs two 4-bit zero points per byte across rows, the operator within each row."""
    for name, facts in deployment.quantized.items():
        layer = deployment.layers[name]
        if facts.bits == 4 and not facts.symmetric and facts.group_size:
            blocks = -(-layer.matrix[1] // facts.group_size)
            if blocks % 2:
                rule = "4-bit weights with zero points need an even number of groups per row"
                yield Violation(name, f"{rule}, not {blocks}", layer.scheme)


def files(deployment: Deployment) -> dict[str, bytes]:
    """The quantizer's arguments."""
    config = {
        "quant_format": "QOperator",
        "algorithm": "RTN",
        "nodes_to_exclude": [node_name(item.name) for item in deployment.untouched],
        "customized_weight_config": {
            node_name(name): {
                "bits": facts.bits,
                "group_size": facts.group_size,
                "scheme": "sym" if facts.symmetric else "asym",
            }
            for name, facts in deployment.quantized.items()
        },
    }
    return {FILE: (json.dumps(config, indent=2) + "\n").encode()}


def stored_bytes(deployment: Deployment) -> int:
    """Whole blocks of values, scales in the model's type, and zero points padded to bytes in each row."""
    scale_bytes = 2 if deployment.model.own_type == "fp16" else 4
    stored = deployment.kept_bytes
    for name, layer in deployment.quantized_layers.items():
        stored += node_bytes(deployment.quantized[name], *layer.matrix, scale_bytes)
    return stored


def node_bytes(facts: WeightFacts, rows: int, columns: int, scale_bytes: int) -> int:
    """Bytes of a MatMulNBits node's initializers: values, scales, packed zero points."""
    assert facts.group_size is not None, "the linter refuses such plans"
    blocks = -(-columns // facts.group_size)
    values = rows * blocks * (facts.group_size * facts.bits // 8)
    points = 0 if facts.symmetric else rows * -(-blocks * facts.bits // 8)
    return values + rows * blocks * scale_bytes + points


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """The nodes that the quantizer writes for a model with one small MatMul for every module."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, RTNWeightOnlyQuantConfig

    config = json.loads(exported[FILE])
    names = [module.name for module in model.modules]
    quantizer = MatMulNBitsQuantizer(
        _stand_in(names),
        nodes_to_exclude=config["nodes_to_exclude"],
        algo_config=RTNWeightOnlyQuantConfig(customized_weight_config=config["customized_weight_config"]),
    )
    quantizer.process()
    written = {node.name.rpartition("_Q")[0]: node for node in quantizer.model.model.graph.node}
    return {name: node_facts(written.get(node_name(name))) for name in names}


def _stand_in(names: list[str]) -> Any:
    """An ONNX model with a MatMul of 1024 x 8 for every name."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    values = np.linspace(-1, 1, 8192, dtype=np.float32).reshape(1024, 8)
    nodes = [helper.make_node("MatMul", ["x", f"{n}.w"], [f"{n}.y"], name=node_name(n)) for n in names]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1024])],
        [helper.make_tensor_value_info(f"{n}.y", TensorProto.FLOAT, [1, 8]) for n in names],
        [numpy_helper.from_array(values, f"{n}.w") for n in names],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def node_facts(node: Any) -> WeightFacts | None:
    """What a node says of its weight; None for one that is no MatMulNBits."""
    if node is None or node.op_type != "MatMulNBits":
        return None
    attributes = {item.name: item.i for item in node.attribute}
    symmetric = len(node.input) < 4 or not node.input[3]
    return WeightFacts("int", attributes["bits"], symmetric, "group", attributes["block_size"])
