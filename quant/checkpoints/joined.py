"""Parameters that transformers joins from several stored tensors, and takes apart again when it saves.

Checkpoints of mixture-of-experts models hold every expert's matrices apart, under the names of the model's
first release. Which tensors make up which parameter, and how, is asked of transformers' own conversions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.checkpoints.protocol import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One stored tensor of a joined parameter: its name, and the pattern of the conversion it matches."""

    tensor: str
    pattern: str | None


@dataclass(frozen=True)
class Joined:
    """Every parameter of the folder's model with the stored tensors that it is made of, in order.

    A stored name goes through all `renamings`, then through one of the `converters` or none.
    """

    model: Any
    parts: Mapping[str, tuple[Part, ...]]
    renamings: Sequence[Any]
    converters: Sequence[Any]

    @classmethod
    def of(cls, folder: Path, tensors: Iterable[str]) -> Joined:
        """Ask transformers about the stored names of a folder; the model is built without its weights.

        Raises CheckpointError when transformers does not know the model.
        """
        model = _empty_model(folder)
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        state, prefix = model.state_dict(), model.base_model_prefix
        conversions = get_model_conversion_mapping(model)
        converters = [item for item in conversions if isinstance(item, WeightConverter)]
        renamings = [item for item in conversions if not isinstance(item, WeightConverter)]
        parts: dict[str, list[Part]] = {}
        for tensor in sorted(tensors, key=dot_natural_key):
            name, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
            if name not in state and tensor in state:
                name, pattern = rename_source_key(tensor, [], [], prefix, state)
            if name in state:
                parts.setdefault(name, []).append(Part(tensor, pattern))
        return cls(model, {name: tuple(members) for name, members in parts.items()}, renamings, converters)

    def converted(self, parameter: str) -> bool:
        """Whether the parameter is more than a stored tensor under another name."""
        return any(part.pattern is not None for part in self.parts[parameter])

    def join(self, parameter: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter that transformers makes of the stored tensors (by stored name)."""
        converter = copy.deepcopy(self._converter(parameter))
        for part in self.parts[parameter]:
            converter.add_tensor(parameter, part.tensor, part.pattern, tensors[part.tensor])
        made = converter.convert(parameter, model=self.model, config=self.model.config)
        value: Tensor = _single(made[parameter])
        return value

    def apart(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`: stored name -> tensor. Raises CheckpointError where it is not one."""
        import torch

        reverse = self._converter(parameter).reverse_transform()
        renamed, pattern = reverse.rename_source_key(parameter)
        reverse.add_tensor(renamed, parameter, pattern, value)
        made = reverse.convert(renamed, model=self.model, config=self.model.config)
        stored = {self._renamed(part.tensor): part.tensor for part in self.parts[parameter]}
        plain = {self._bare(name): tensor for name, tensor in stored.items()}
        found = {
            plain[self._bare(name)]: _single(tensor)
            for name, tensor in made.items()
            if self._bare(name) in plain
        }
        if set(found) != set(stored.values()) or not torch.equal(self.join(parameter, found), value):
            raise CheckpointError(
                f"Parameter {parameter!r} must come apart into its stored tensors"
                f" {', '.join(list(stored.values())[:3])}, .... Got {', '.join(list(made)[:3])}."
                " Save the model with save_original_format=False, and plan for that folder."
            )
        return found

    def _converter(self, parameter: str) -> Any:
        patterns = {part.pattern for part in self.parts[parameter]}
        return next(item for item in self.converters if patterns & set(item.source_patterns))

    def _renamed(self, tensor: str) -> str:
        """The name that a conversion sees: after every renaming."""
        from transformers.core_model_loading import apply_renamings

        return str(apply_renamings(tensor, self.renamings))

    def _bare(self, name: str) -> str:
        """Without the prefix of the base model, which a checkpoint may leave out."""
        return re.sub(rf"^{re.escape(self.model.base_model_prefix)}\.", "", name)


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def transformers_config(folder: Path) -> Any:
    """The configuration of a folder, of which no code is run. Raises CheckpointError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"config.json must describe a model of transformers. Got {type(error).__name__}: {error!s:.200}."
            " Save the model again with save_pretrained()."
        ) from error


def _empty_model(folder: Path) -> Any:
    import torch
    import transformers

    config = transformers_config(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            return kind(config) if isinstance(kind, type) else transformers.AutoModel.from_config(config)
    except Exception as error:
        raise CheckpointError(
            f"config.json must describe a model that can be built. Got {type(error).__name__}:"
            f" {error!s:.200}. Save the model again with save_pretrained()."
        ) from error
