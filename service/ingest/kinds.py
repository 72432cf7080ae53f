"""Which files are taken: an allow-list, and for the well-known others what to send instead."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from quant.digest import INDEXES
from service.errors import ServiceError, Unprocessable, UnsupportedFile, json_pointer

MODEL_FILES: tuple[str, ...] = (
    "config.json",
    "*.safetensors",
    *INDEXES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
PARQUET = "parquet"
"""Rows of text that become jsonl on arrival (`parquet_text`)."""
CALIBRATION_FILES: dict[str, str] = {
    "*.safetensors": "safetensors",
    "*.npz": "npz",
    "*.txt": "text",
    "*.jsonl": "jsonl",
    "*.parquet": PARQUET,
}

_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.zst", "*.7z", "*.rar")
_PROGRAMS = ("*.pt2",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.torchscript", "*.npy")
_OTHER_RUNTIMES = ("*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.tflite", "*.gguf", "*.pb")
INSTEAD: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (_ARCHIVES, "an archive", "Send the unpacked files one by one in the manifest."),
    (
        _PICKLES,
        "a pickle or TorchScript file, which can run code when it is loaded",
        "Send safetensors. On your own machine, bitplan convert FILE_OR_FOLDER -o FOLDER makes them of a "
        "model's files, and safetensors.torch.save_file(tensors, file) of calibration data.",
    ),
    (
        _PROGRAMS,
        "a program of torch.export, which runs code of its own when it is loaded",
        "Send the Hugging Face folder that it was exported from: config.json and *.safetensors. For a model "
        "of your own code, run bitplan on your own machine with --factory package.module:function.",
    ),
    (
        ("model_index.json",),
        "the index of a pipeline of several models",
        "Send the folder of its unet or transformer: config.json and *.safetensors.",
    ),
    (
        _OTHER_RUNTIMES,
        "a file of another runtime",
        "Send the original Hugging Face folder: config.json and *.safetensors.",
    ),
    (("*.csv", "*.feather", "*.arrow"), "a table file", "Send parquet, jsonl, txt, npz or safetensors."),
    (("*.npz",), "an array file, which may be calibration data but no model", "Send safetensors."),
    (("*.parquet",), "a table file, which may be calibration data but no model", "Send safetensors."),
)


def is_model_file(name: str) -> bool:
    """Whether a file of a Hugging Face folder takes part.

    >>> is_model_file("config.json"), is_model_file("README.md")
    (True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def check_model_files(names: Sequence[str]) -> None:
    """Raise for the first file that has no place in a model, or when config.json or the weights are
    missing.
    """
    for position, name in enumerate(names):
        if not is_model_file(name):
            raise refusal(name, json_pointer("files", position, "path"), ", ".join(MODEL_FILES))
    for needed, why in (
        ("config.json", "it names the architecture"),
        ("*.safetensors", "it holds the weights"),
    ):
        if not any(fnmatchcase(name, needed) for name in names):
            raise Unprocessable(
                "missing-file",
                f"A model must have {needed}: {why}. Got {', '.join(sorted(names)) or 'no files'}. "
                "Send the folder that model.save_pretrained(folder) writes.",
                pointer="/files",
                extra={"missing": [needed]},
            )


def calibration_kind(names: Sequence[str]) -> str:
    """The kind ("safetensors", "npz", "text", "jsonl" or "parquet") of the one file of a calibration set."""
    if len(names) != 1:
        raise Unprocessable(
            "invalid-manifest",
            f"A calibration set must be exactly one file. Got {len(names)}. "
            "Put all samples into one safetensors, npz, txt, jsonl or parquet file.",
            pointer="/files",
        )
    for pattern, kind in CALIBRATION_FILES.items():
        if fnmatchcase(names[0].lower(), pattern):
            return kind
    raise refusal(names[0], json_pointer("files", 0, "path"), ", ".join(CALIBRATION_FILES))


def refusal(name: str, pointer: str, allowed: str) -> ServiceError:
    """The problem for a file that is not taken: what it is and what to send instead."""
    lowered = name.lower()
    if lowered.endswith((".py", ".pyc", ".so", ".dll", ".ipynb")):
        return Unprocessable(
            "remote-code",
            "A model must be built from classes of the installed transformers or diffusers library. Got the "
            f"program file {name!r}. Leave it out, or run bitplan on your own machine with --factory "
            "package.module:function.",
            pointer=pointer,
        )
    for patterns, what, instead in INSTEAD:
        if any(fnmatchcase(lowered, pattern) for pattern in patterns):
            return UnsupportedFile(
                "unsupported-file",
                f"A file must be one of {allowed}. Got {name!r}, {what}. {instead}",
                pointer=pointer,
            )
    return UnsupportedFile(
        "unsupported-file", f"A file must be one of {allowed}. Got {name!r}. Leave it out.", pointer=pointer
    )
