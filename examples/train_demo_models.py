"""Train the two small models of the demo on real data and write them as Hugging Face folders.

digits-resnet/  a transformers ResNet on scikit-learn's handwritten digits
topics-llama/   a Llama-type language model on the language reference that CPython ships (pydoc_data.topics)

Each folder holds the checkpoint and calibration data that training never saw. Run it with

    python examples/train_demo_models.py --out DIR [--seed N] [--only cnn|lm]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.utils.logging import disable_progress_bar

THREADS = 2  # fixed: the order of floating-point sums depends on it
CNN_STEPS, LM_STEPS, QUICK_STEPS = 500, 900, 4
HELD_OUT_IMAGES = 897
HELD_OUT_CHARACTERS = 80_000
IMAGE_BATCH, TEXT_BATCH, SEQUENCE_LENGTH = 96, 8, 128
END_OF_TEXT = "<|endoftext|>"
DEPTHS = (1, 2, 2)


@dataclass(frozen=True)
class Trained:
    """A trained model on disk: its folder, its calibration file and its quality on held-out data."""

    folder: Path
    calibration: Path
    metric: str
    value: float


# -- training -------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a hundredth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches; every epoch is a new permutation of `range(count)`."""
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def train(
    model: nn.Module, loss_of_next_batch: Callable[[], Tensor], steps: int, peak: float, title: str
) -> None:
    """AdamW with gradient clipping for `steps` steps; leaves the model in eval mode.

    Progress is a bar, or ten lines where standard output is no terminal.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    model.train()
    lines = not Console().is_terminal
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), disable=lines) as progress:
        bar = progress.add_task(title, total=steps, loss=float("nan"))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            loss = loss_of_next_batch()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1, loss=loss.item())
            if lines and 10 * (step + 1) // steps > 10 * step // steps:
                print(f"{title} {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()


# -- image classifier -----------------------------------------------------------------------------


def digit_images() -> tuple[Tensor, Tensor]:
    """All 1,797 digits as float32 (N, 1, 32, 32) in [-1, 1], upscaled from 8 x 8, and labels int64 (N,)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    upscaled = functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return upscaled, torch.tensor(digits.target, dtype=torch.int64)


def shifted(images: Tensor, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Each image moved by up to `reach` pixels in both directions, filled with background."""
    padded = functional.pad(images, (reach,) * 4, value=-1.0)
    offsets = torch.randint(0, 2 * reach + 1, (len(images), 2), generator=generator).tolist()
    height, width = images.shape[-2:]
    return torch.stack(
        [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)]
    )


def mixed(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): a batch blended with itself in another order, and its classes as (N, 10)."""
    share = torch.rand(1, generator=generator)
    partner = torch.randperm(len(images), generator=generator)
    targets = functional.one_hot(labels, 10).float()
    blend = torch.lerp(images[partner], images, share)
    return blend, torch.lerp(targets[partner], targets, share)


def resnet_config(depths: Sequence[int] = DEPTHS) -> ResNetConfig:
    """Convolutions in basic blocks, 13 in all, and one linear head; `depths` are the blocks of each stage."""
    return ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=list(depths),
        layer_type="basic",
        num_labels=10,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is at their label."""
    return float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())


def train_cnn(out: Path, seed: int = 0, *, quick: bool = False, depths: Sequence[int] = DEPTHS) -> Trained:
    """Write `out/digits-resnet` and its calibration data: held-out images, neither trained on nor augmented.

    Mixup keeps the outputs from saturating, so the KL of a quantized copy is spread over all images
    and not decided by a few. `quick` stops after a few steps: a valid, badly trained model for tests.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = digit_images()
    order = torch.randperm(len(images), generator=generator)
    held_out, kept = order[:HELD_OUT_IMAGES], order[HELD_OUT_IMAGES:]
    model = ResNetForImageClassification(resnet_config(depths))
    batches = shuffled_batches(len(kept), IMAGE_BATCH, generator)

    def loss_of_next_batch() -> Tensor:
        rows = kept[next(batches)]
        inputs, targets = mixed(shifted(images[rows], generator), labels[rows], generator)
        return functional.cross_entropy(model(pixel_values=inputs).logits, targets)

    train(model, loss_of_next_batch, QUICK_STEPS if quick else CNN_STEPS, 4e-3, "digits-resnet")
    folder = out / "digits-resnet"
    model.save_pretrained(folder)
    calibration = folder / "calibration.safetensors"
    save_file({"pixel_values": images[held_out].contiguous(), "labels": labels[held_out]}, calibration)
    return Trained(folder, calibration, "accuracy", accuracy(model, images[held_out], labels[held_out]))


# -- language model -------------------------------------------------------------------------------


def split_topics(seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) passages of topics in a seeded order; no topic is in both.

    Topics quote one another at length, so a paragraph is kept only where it comes first, and
    held-out topics come first: no paragraph of theirs is left in the training text.
    """
    names = sorted(topics)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: set[str] = set()
    held_out: list[str] = []
    training: list[str] = []
    for index in order:
        room = held_out if sum(map(len, held_out)) < HELD_OUT_CHARACTERS else training
        room += passages(fresh_paragraphs(topics[names[index]], seen))
    return training, held_out


def fresh_paragraphs(text: str, seen: set[str]) -> list[str]:
    """The paragraphs of `text` that are not in `seen` (compared without white space), which grows by them."""
    fresh = []
    for paragraph in text.split("\n\n"):
        key = "".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    return fresh


def passages(paragraphs: list[str], size: int = 1000) -> list[str]:
    """Neighboring paragraphs joined until each passage, except the last, has `size` characters or more."""
    joined: list[str] = []
    for paragraph in paragraphs:
        if joined and len(joined[-1]) < size:
            joined[-1] += "\n\n" + paragraph
        else:
            joined.append(paragraph)
    return joined


def trained_tokenizer(texts: list[str], vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def llama_config(vocabulary: int) -> LlamaConfig:
    """4 blocks with grouped-query attention: 28 linear layers besides the untied head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def packed(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """One stream of token ids, int64 (N,), each text followed by the end-of-text token."""
    ids = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_token_id)]
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Per-token perplexity over whole sequences of `SEQUENCE_LENGTH` tokens."""
    count = len(stream) // SEQUENCE_LENGTH
    sequences = stream[: count * SEQUENCE_LENGTH].view(count, SEQUENCE_LENGTH)
    losses = [model(input_ids=s, labels=s).loss.item() * len(s) for s in sequences.split(32)]
    return math.exp(sum(losses) / count)


def train_lm(out: Path, seed: int = 0, *, quick: bool = False) -> Trained:
    """Write `out/topics-llama` with its tokenizer and calibration data: topics that training never saw.

    `quick` stops after a few steps: a valid, badly trained model for tests.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = split_topics(seed)
    tokenizer = trained_tokenizer(training)
    stream = packed(training, tokenizer)
    model = LlamaForCausalLM(llama_config(len(tokenizer)))

    def loss_of_next_batch() -> Tensor:
        starts = torch.randint(0, len(stream) - SEQUENCE_LENGTH, (TEXT_BATCH, 1), generator=generator)
        sequences = stream[starts + torch.arange(SEQUENCE_LENGTH)]
        loss: Tensor = model(input_ids=sequences, labels=sequences).loss
        return loss

    train(model, loss_of_next_batch, QUICK_STEPS if quick else LM_STEPS, 6e-3, "topics-llama")
    folder = out / "topics-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    calibration = folder / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out), encoding="utf-8")
    return Trained(folder, calibration, "perplexity", perplexity(model, packed(held_out, tokenizer)))


# -- command --------------------------------------------------------------------------------------

TRAINERS = {"cnn": train_cnn, "lm": train_lm}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the two small models of the demo on real data.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder per model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(TRAINERS), help="train one of the two")
    parser.add_argument(
        "--threads", type=int, default=THREADS, help="weights depend on it in their last bits"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    for name in [arguments.only] if arguments.only else TRAINERS:
        trained = TRAINERS[name](arguments.out, arguments.seed)
        Console().print(f"{trained.folder}: held-out {trained.metric} {trained.value:.4g}", highlight=False)


if __name__ == "__main__":
    main()
