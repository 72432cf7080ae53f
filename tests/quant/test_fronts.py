"""The fronts of quant load without torch, and what their docstrings show is true."""

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import quant

FRONTS = (
    "activations",
    "catalog",
    "checkpoints.compressed",
    "checkpoints.front",
    "checkpoints.gguf",
    "checkpoints.gguf_header",
    "checkpoints.gguf_tokenizer",
    "checkpoints.joined",
    "checkpoints.onnxruntime",
    "checkpoints.protocol",
    "checkpoints.pytorch",
    "checkpoints.shards",
    "checkpoints.source",
    "checkpoints.torchao",
    "checkpoints.vllm",
    "costs",
    "deployment",
    "devices",
    "digest",
    "export.auto_round",
    "export.compressed_config",
    "export.experts",
    "export.front",
    "export.gptq_layout",
    "export.gptqmodel",
    "export.gguf_names",
    "export.llama_cpp",
    "export.llm_compressor",
    "export.mlx",
    "export.modelopt",
    "export.onnxruntime",
    "export.protocol",
    "export.rules",
    "export.torchao",
    "export.vllm",
    "elements",
    "floating",
    "formats",
    "geometry",
    "gguf_blocks",
    "integer",
    "kv_cache",
    "latency",
    "layers",
    "lint",
    "microscaling",
    "patterns",
    "plain",
    "plan",
    "planning",
    "quantizers.runs",
    "reading",
    "runtime_rules",
    "runtimes",
    "safetensors_header",
    "schemes",
    "storage",
)
PACKAGES = ("quant.codecs", "quant.quantizers", "quant.export", "quant.checkpoints")
MODULES = sorted(found.name for found in walk_packages(quant.__path__, "quant."))


def test_fronts_do_not_load_torch():
    lines = [f"import quant.{name}" for name in FRONTS]
    check = "import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], check=True)


def test_every_module_is_a_front_or_needs_torch():
    backs = [name for name in MODULES if name.removeprefix("quant.") not in FRONTS]
    for name in backs:
        source = Path(import_module(name).__file__).read_text(encoding="utf-8")
        assert "import torch" in source or "from torch" in source or name in PACKAGES, name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(import_module(name)).failed == 0
