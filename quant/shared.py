"""Which parameters are one tensor: the same object, or the same memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a parameter stands: its module, the module's path, and its name there."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """The parameter's full name."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def layer(self) -> str:
        """The name as a layer: the module's path for its `weight`, the parameter's own for any other."""
        return self.path if self.attribute == "weight" else self.name


@dataclass(eq=False)
class Shared:
    """One stored tensor and all its uses, in the model's order. `overlaps` names another tensor's use."""

    tensor: Tensor
    uses: list[Use] = field(default_factory=list)
    overlaps: str | None = None


def identity(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same memory seen the same way."""
    if is_lazy(tensor) or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def shared_parameters(model: nn.Module) -> tuple[Shared, ...]:
    """Every parameter once, with all its uses; modules registered under two paths give two uses."""
    found: dict[Hashable, Shared] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            entry = found.setdefault(identity(parameter), Shared(parameter))
            entry.uses.append(Use(path, module, attribute))
    entries = tuple(found.values())
    _mark_overlaps(entries)
    return entries


def _mark_overlaps(entries: tuple[Shared, ...]) -> None:
    ranges = sorted((*_extent(entry.tensor), index) for index, entry in enumerate(entries) if _placed(entry))
    reach: tuple[str, int, int] = ("", -1, -1)
    for device, start, end, index in ranges:
        if device == reach[0] and start < reach[1]:
            other = entries[reach[2]]
            entries[index].overlaps = other.uses[0].name
            other.overlaps = other.overlaps or entries[index].uses[0].name
        if device != reach[0] or end > reach[1]:
            reach = (device, end, index)


def _placed(entry: Shared) -> bool:
    tensor = entry.tensor
    return not (is_lazy(tensor) or tensor.is_meta or tensor.numel() == 0)


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """(device, first byte, one past the last byte) that a strided tensor touches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a checkpoint stores, each memory once: parameters and persistent buffers."""
    seen: set[Hashable] = set()
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and not is_lazy(tensor):
            key = identity(tensor)
            if key not in seen:
                seen.add(key)
                yield tensor
