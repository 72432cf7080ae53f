"""Tiny models with random weights and data to go with them, built once per run and only when asked for."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

WORDS = tuple(f"{first}{second}" for first in "bdfgklmnp" for second in ("a", "e", "i", "o", "u"))


@dataclass(frozen=True)
class Tiny:
    """A model (folder or factory), its calibration file, and what it is for."""

    name: str
    task: str
    model_kind: str
    location: str
    data: Path
    data_kind: str

    @property
    def folder(self) -> Path:
        return Path(self.location)

    def spec(self, **changes: Any) -> Any:
        """A session spec with six samples per part and uneven micro-batches."""
        from sensitivity.spec import DataSource, ModelSource, SessionSpec

        spec = SessionSpec(
            ModelSource(self.model_kind, self.location, f"model-{self.name}"),  # type: ignore[arg-type]
            DataSource(str(self.data), self.data_kind, f"data-{self.name}"),  # type: ignore[arg-type]
            task=self.task if self.model_kind == "factory" else "auto",
            samples=6,
            sequence_length=12,
            batch_size=4,
            max_probes=32,
        )
        return replace(spec, **changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """tiny("llama" | "bert" | "resnet" | "mlp" | "denoiser" | a key of EXPERTS): built on first use."""
    built: dict[str, Tiny] = {}

    def build(name: str) -> Tiny:
        if name not in built:
            import torch

            torch.set_num_threads(1)
            torch.manual_seed(7)
            built[name] = BUILDERS[name](tmp_path_factory.mktemp(name))
        return built[name]

    return build


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., int]:
    """byte_level(folder, split, **options): saves a byte-level BPE tokenizer; returns its vocabulary's size."""

    def save(folder: Path, split: Any = None, *, use_regex: bool = False, **model: Any) -> int:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE(**model))
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex or split is None)
        tokenizer.pre_tokenizer = own if split is None else pre_tokenizers.Sequence([split, own])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sentences(200), trainer)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
        wrapped.save_pretrained(folder)
        return tokenizer.get_vocab_size()

    return save


@pytest.fixture(scope="session")
def word_pieces() -> Callable[..., int]:
    """word_pieces(folder, **options of the normalizer): saves BERT's kind of tokenizer; its vocabulary's size."""

    def save(folder: Path, **normalizer: Any) -> int:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([*sentences(200), "0123456789 .,!?()'-%äé"], trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **{f"{kind}_token": token for kind, token in names.items()}
        )
        wrapped.save_pretrained(folder)
        return tokenizer.get_vocab_size()

    return save


def sentences(count: int, seed: int = 0) -> list[str]:
    """Seeded sentences of 5 to 16 known words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(5, 16))) for _ in range(count)]


def save_tokenizer(folder: Path) -> int:
    """A word-level tokenizer with padding and end tokens; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[EOS]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    wrapped.save_pretrained(folder)
    return len(vocabulary)


def _llama(folder: Path) -> Tiny:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    data = folder / "text.txt"
    data.write_text("\n".join(sentences(40)) + "\n", encoding="utf-8")
    return Tiny("llama", "causal_lm", "folder", str(folder), data, "text")


def _bert(folder: Path) -> Tiny:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    data = folder / "rows.jsonl"
    rows = (json.dumps({"text": text}) for text in sentences(21))
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Tiny("bert", "sequence_embedding", "folder", str(folder), data, "jsonl")


def _resnet(folder: Path) -> Tiny:
    import torch
    from safetensors.torch import save_file
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    data = folder / "images.safetensors"
    labels = torch.randint(0, 5, (20,))
    save_file({"pixel_values": torch.randn(20, 1, 16, 16), "labels": labels}, data)
    return Tiny("resnet", "image_classification", "folder", str(folder), data, "safetensors")


FACTORY = """
import torch
from torch import nn


def build():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model


def build_double():
    return build().double()


def not_a_model():
    return 3


def fails():
    raise KeyError("weights")
"""


DENOISER = """
import torch
from torch import nn


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.time_embedding = nn.Linear(2, 4)

    def forward(self, sample, timestep):
        phase = timestep.to(sample) / 1000
        step = self.time_embedding(torch.stack([phase.sin(), phase.cos()], -1))
        return self.conv_out(torch.tanh(self.conv_in(sample) + step[..., None, None]))


def build():
    generator = torch.Generator().manual_seed(5)
    model = Denoiser()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model
"""


def _mlp(folder: Path) -> Tiny:
    import torch
    from safetensors.torch import save_file

    (folder / "tiny_factory.py").write_text(FACTORY, encoding="utf-8")
    sys.path.insert(0, str(folder))
    data = folder / "inputs.safetensors"
    save_file({"x": torch.randn(22, 6)}, data)
    return Tiny("mlp", "generic", "factory", "tiny_factory:build", data, "safetensors")


def _denoiser(folder: Path) -> Tiny:
    import torch
    from safetensors.torch import save_file

    (folder / "denoiser_factory.py").write_text(DENOISER, encoding="utf-8")
    sys.path.insert(0, str(folder))
    data = folder / "steps.safetensors"
    steps = torch.randint(0, 1000, (20,))
    inputs = {
        "sample": torch.randn(20, 1, 8, 8),
        "timestep": steps,
        "alphas_cumprod": 1 - 0.999 * steps / 1000,
    }
    save_file(inputs, data)
    return Tiny("denoiser", "diffusion", "factory", "denoiser_factory:build", data, "safetensors")


EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 12}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 12},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 12,
            "n_group": 1,
            "topk_group": 1,
            "layers_block_type": ["attention", "moe"],
        },
    ),
}
"""Mixture-of-experts models: configuration, class, and what each needs beyond the usual."""


def build_experts(kind: str, **changes: Any) -> Any:
    """A model of four fused experts per block, two of them used by each token (one in Llama 4)."""
    import torch
    import transformers

    torch.manual_seed(7)
    config, model, own = EXPERTS[kind]
    usual = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "head_dim": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    settings = getattr(transformers, config)(**{**usual, **own, **changes})
    settings._experts_implementation = "eager"
    return getattr(transformers, model)(settings).eval()


@pytest.fixture
def tiny_experts() -> Callable[..., Any]:
    """tiny_experts("mixtral" | ... a key of EXPERTS, **changes of its configuration)."""
    return build_experts


def _experts_folder(kind: str) -> Callable[[Path], Tiny]:
    def build(folder: Path) -> Tiny:
        save_tokenizer(folder)
        build_experts(kind).save_pretrained(folder)
        data = folder / "text.txt"
        data.write_text("\n".join(sentences(40)) + "\n", encoding="utf-8")
        return Tiny(kind, "causal_lm", "folder", str(folder), data, "text")

    return build


BUILDERS: dict[str, Callable[[Path], Tiny]] = {
    "llama": _llama,
    "bert": _bert,
    "resnet": _resnet,
    "mlp": _mlp,
    "denoiser": _denoiser,
    **{kind: _experts_folder(kind) for kind in EXPERTS},
}
