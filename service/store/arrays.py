"""Named arrays as npz, without pickle: the same arrays give the same bytes."""

import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

EPOCH = (1980, 1, 1, 0, 0, 0)


def write_arrays(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an uncompressed npz with sorted names and no times. Raises ValueError for object arrays."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            entry.create_system = 3
            with archive.open(entry, "w", force_zip64=True) as member:
                npy.write_array(
                    member, np.asarray(arrays[name], order="C"), version=(2, 0), allow_pickle=False
                )


def read_arrays(file: BinaryIO) -> dict[str, NDArray[Any]]:
    """The inverse of `write_arrays`; the arrays are read-only."""
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def read_array(file: BinaryIO, name: str) -> NDArray[Any] | None:
    """One array as `read_arrays` gives it, or None."""
    with np.load(file, allow_pickle=False) as archive:
        array: NDArray[Any] | None = archive[name] if name in archive.files else None
    if array is not None:
        array.flags.writeable = False
    return array
