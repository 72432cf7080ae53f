"""Pickled checkpoints as safetensors: the same tensors by the same names, and no code of a file ever runs.

Files are read by `torch.load(weights_only=True)`, which rebuilds tensors and plain containers only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.digest import COMPANIONS, CONFIG, INDEXES, PICKLES, WEIGHTS

SINGLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training programs keep the weights beside the state of their optimizers."""
DTYPES = frozenset(
    {
        *(
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        ),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool, torch.complex64),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    }
)
OnBytes = Callable[[int, int], None]


class ConversionError(ValueError):
    """A checkpoint that cannot become safetensors; the message says what to do."""


@dataclass(frozen=True)
class ConvertedFile:
    """One weight file that was written; `shared` counts tensors that the source stored inside another one."""

    source: str
    name: str
    tensors: int
    shared: int
    bytes: int


@dataclass(frozen=True)
class Converted:
    """A folder that was written: weights, and the files of configuration and tokenizer as they were."""

    files: tuple[ConvertedFile, ...]
    copied: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "files": [asdict(file) for file in self.files],
            "copied": list(self.copied),
            "tensors": sum(file.tensors for file in self.files),
            "bytes": sum(file.bytes for file in self.files),
            "has_config": CONFIG in self.copied,
        }


def convert(source: Path, out: Path, on_bytes: OnBytes = lambda done, total: None) -> Converted:
    """Write the checkpoint of `source`, a pickled file or a folder of such, to the new or empty folder `out`,
    which appears whole or not at all. `on_bytes(done, total)` counts bytes of the source.

    Raises ConversionError for what is no pickled state dict of tensors, and FileNotFoundError.
    """
    folder, names, index = _weight_files(source)
    total, done = sum((folder / name).stat().st_size for name in names), 0
    written: list[ConvertedFile] = []
    weight_map: dict[str, str] = {}
    with _new_folder(out) as partial:
        for position, name in enumerate(names):
            on_bytes(done, total)
            tensors = read_tensors(folder / name)
            target = _target(name, position, len(names))
            _require_indexed(index, name, tensors)
            _require_new(weight_map, tensors, target)
            weight_map |= dict.fromkeys(tensors, target)
            written.append(_write(partial / target, name, tensors))
            done += (folder / name).stat().st_size
        if len(names) > 1:
            _write_index(partial, weight_map, written)
        copied = tuple(_copied(folder, partial))
    on_bytes(total, total)
    return Converted(tuple(written), copied)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, by name, mapped from the file where its format allows that.

    Raises ConversionError for a file that holds anything else than tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
    except OSError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from None
    state = _state_dict(file, value)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ConversionError(
                f"{file.name} must be a state dict of tensors by name. Got {type(tensor).__name__} at"
                f" {name!r:.200}. Save the weights alone: torch.save(model.state_dict(), file)."
            )
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
            kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout)
            raise ConversionError(
                f"Tensors must be dense and of a type that safetensors knows. Got {kind} at {name!r:.200} of"
                f" {file.name}. Save the original floating-point weights."
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _state_dict(file: Path, value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), Mapping)), value)
        if inner and all(isinstance(name, str) for name in inner):
            return dict(inner)
    raise ConversionError(
        f"{file.name} must be a state dict of tensors by name. Got {type(value).__name__} without one. Save"
        " the weights alone: torch.save(model.state_dict(), file)."
    )


def _unreadable(file: Path, error: Exception) -> ConversionError:
    """torch's own words advise to read without protection: only the name it stumbled over is told."""
    found = re.search(r"(?:GLOBAL|[Gg]lobal|function) ([\w.]+\.[\w.]+)", str(error))
    if file.suffix == ".pt2" or "TorchScript" in str(error):
        got = "a program of torch (TorchScript or torch.export)"
    elif found:
        got = f"an object {found.group(1)}, which would run code"
    else:
        got = f"no file that torch.load(weights_only=True) reads ({type(error).__name__})"
    return ConversionError(
        f"{file.name} must hold tensors alone. Got {got}. In the program that made it, load it and"
        " save the weights: model.save_pretrained(folder), or torch.save(model.state_dict(), file) and"
        " convert that."
    )


# -- names ----------------------------------------------------------------------------------------


def _weight_files(source: Path) -> tuple[Path, tuple[str, ...], Mapping[str, str]]:
    """The folder, the pickled files in it, and the source's weight map (empty without an index)."""
    if source.is_file():
        return source.parent, (_pickled(source.name),), {}
    if not source.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(source))
    index = next((path for path in sorted(source.glob("*.bin.index.json"))), None)
    single = next((name for name in SINGLES if (source / name).is_file()), None)
    if single is not None:
        return source, (single,), {}
    if index is not None:
        weight_map = _weight_map(index)
        return source, tuple(sorted(set(weight_map.values()))), weight_map
    found = sorted(path.name for path in source.iterdir() if _is_pickled(path.name))
    if len(found) == 1:
        return source, tuple(found), {}
    safe = sorted(path.name for path in source.glob("*.safetensors"))
    got = (
        f"{len(found)} files ({', '.join(found)[:200]})"
        if found
        else f"none, but {safe[0]}"
        if safe
        else "none"
    )
    instead = "Pass the folder as it is: it holds safetensors." if safe and not found else "Pass one file."
    raise ConversionError(
        f"A folder must hold {SINGLES[0]}, an index *.bin.index.json, or one pickled file. Got {got}."
        f" {instead}"
    )


def _is_pickled(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth", ".ckpt"))


def _pickled(name: str) -> str:
    if _is_pickled(name):
        return name
    known = ", ".join(pattern for pattern in PICKLES if _is_pickled(pattern))
    raise ConversionError(
        f"A checkpoint must be one of {known}. Got {name!r}. Pass a file that torch.save()"
        " wrote, or its folder."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConversionError(f"{index.name} must be JSON with a weight_map. Got {error!s:.200}.") from None
    for name in files:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name and _is_pickled(name)
        if not plain or not (index.parent / name).is_file():
            raise ConversionError(
                f"{index.name} must name pickled files of its own folder. Got {name!r:.200}. Download the"
                " missing shard, or the index of these files."
            )
    if not files:
        raise ConversionError(f"{index.name} must name at least one file. Got none. Download it again.")
    return {str(tensor): str(name) for tensor, name in weight_map.items()}


def _target(name: str, position: int, count: int) -> str:
    """The name under which transformers or diffusers look for it.

    >>> _target("pytorch_model-00002-of-00003.bin", 1, 3), _target("weights.pt", 0, 1)
    ('model-00002-of-00003.safetensors', 'model.safetensors')
    """
    stem = Path(WEIGHTS[name.startswith("diffusion_")]).stem
    return f"{stem}-{position + 1:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors"


def _require_indexed(index: Mapping[str, str], name: str, tensors: Mapping[str, Tensor]) -> None:
    expected = {tensor for tensor, file in index.items() if file == name}
    lost = sorted(expected - set(tensors))
    if lost:
        raise ConversionError(
            f"{name} must hold the tensors that its index names. Got no {lost[0]!r:.200}. Download the"
            " folder again."
        )


def _require_new(weight_map: Mapping[str, str], tensors: Mapping[str, Tensor], target: str) -> None:
    for tensor in tensors:
        if tensor in weight_map:
            raise ConversionError(
                f"Tensor names must be unique over all shards. Got {tensor!r:.200} in {weight_map[tensor]}"
                f" and {target}. Pass the shards of one checkpoint."
            )


# -- writing --------------------------------------------------------------------------------------


def _write(path: Path, source: str, tensors: Mapping[str, Tensor]) -> ConvertedFile:
    """Every name gets its own bytes, also where the source stores several in one place."""
    places: set[int] = set()
    shared, whole = 0, {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        again = storage.nbytes() > 0 and storage.data_ptr() in places
        places.add(storage.data_ptr())
        own = not again and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        whole[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
        shared += again
    save_file(whole, path, metadata={"format": "pt"})
    _require_same(path, whole)
    return ConvertedFile(source, path.name, len(whole), shared, path.stat().st_size)


def _require_same(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """What lies on disk has the source's types, shapes and bytes, NaN included."""
    found = load_file(path)
    for name, tensor in tensors.items():
        stored = found.pop(name)
        same = (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        if not same or not torch.equal(_bytes(stored), _bytes(tensor)):
            raise RuntimeError(f"{path.name} must hold the source's bytes. Got others for {name!r}.")
    if found:
        raise RuntimeError(f"{path.name} must hold the source's tensors alone. Got {sorted(found)}.")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _write_index(folder: Path, weight_map: Mapping[str, str], files: list[ConvertedFile]) -> None:
    stem = Path(files[0].name).name.split("-0", 1)[0]
    name = next(name for name in INDEXES if name.startswith(f"{stem}.safetensors"))
    total = sum(file.bytes for file in files)
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copied(folder: Path, partial: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        taken = any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS) and path.name not in INDEXES
        if taken and path.is_file():
            shutil.copyfile(path, partial / path.name)
            yield path.name


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConversionError(
            f"Output folder must be new or empty. Got {str(out)!r}, which is in use. Name another one."
        )
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
