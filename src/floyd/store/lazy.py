"""State dicts whose tensors are read when they are asked for, and owned by nobody but who asked.

`weights.read` maps whole files into memory, and all that was looked at stays there as long as one of their tensors
does. Where tensors are changed on the way, or dropped again, this needs the memory of one of them.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floyd.errors import CheckpointError
from floyd.store import weights
from floyd.store.naming import SAFE
from floyd.store.pages import room

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it


@dataclass(frozen=True)
class Lying:
    """Where a tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self._bytes(self.start, self.nbytes).view(self.dtype).view(self.shape)

    def mapped(self) -> Tensor:
        """Its bytes in the file itself, through a memory map of its own: the last who holds the tensor closes it."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        before = self.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.start + self.nbytes:
                raise CheckpointError(f"{self.path} is cut off: download it again.")
            pages = mmap.mmap(file.fileno(), before + self.nbytes, access=mmap.ACCESS_COPY, offset=self.start - before)
        content = torch.frombuffer(pages, dtype=torch.uint8, count=self.nbytes, offset=before)
        return content.view(self.dtype).view(self.shape)

    def rows(self, numbers: Tensor) -> Tensor:
        """Some rows of a table, read one by one."""
        width = prod(self.shape[1:]) * self.dtype.itemsize
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.shape[0]:
            raise IndexError(f"The table has {self.shape[0]} rows, asked for {numbers.tolist()}.")
        parts = [self._bytes(self.start + number * width, width) for number in numbers.tolist()]
        return torch.stack(parts).view(self.dtype).view(-1, *self.shape[1:])

    def _bytes(self, start: int, count: int) -> Tensor:
        content = room((count,), torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            view = content.numpy().data
            while len(view) and (num_read := file.readinto(view)):
                view = view[num_read:]
        if len(view):
            raise CheckpointError(f"{self.path} is cut off: download it again.")
        return content


class LazyState(Mapping[str, Tensor]):
    """The tensors of safetensors files, in the order in which they lie: read, or mapped into memory."""

    def __init__(self, lying: Mapping[str, Lying], *, is_mapped: bool = False) -> None:
        self.lying, self.is_mapped = dict(lying), is_mapped

    def __getitem__(self, key: str) -> Tensor:
        lying = self.lying[key]
        return lying.mapped() if self.is_mapped else lying.read()

    def __contains__(self, key: object) -> bool:
        return key in self.lying  # without reading it, as a Mapping by itself would

    def __iter__(self) -> Iterator[str]:
        return iter(self.lying)

    def __len__(self) -> int:
        return len(self.lying)


class Renamed(Mapping[str, Tensor]):
    """Some of a state dict's tensors, under other names."""

    def __init__(self, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        """`names`: theirs, by ours."""
        self.state, self.names = state, dict(names)

    def __getitem__(self, key: str) -> Tensor:
        return self.state[self.names[key]]

    def __contains__(self, key: object) -> bool:
        return key in self.names  # without reading it, as a Mapping by itself would

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """That of one of its tensors, which is not read for it where the file's head says so."""
    if isinstance(state, Renamed):
        return shape_of(state.state, state.names[key])
    if isinstance(state, LazyState):
        return state.lying[key].shape
    shapes: Mapping[str, Any] | None = getattr(state, "shapes", None)
    return tuple(state[key].shape if shapes is None else shapes[key])


def opened(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    is_mapped: bool = False,
) -> Mapping[str, Tensor]:
    """The state dict in a component's folder, as `weights.read` finds it."""
    files = weights.files(Path(folder), variant=variant, use_safetensors=use_safetensors)
    if any(file.suffix != f".{SAFE}" for file in files):
        return weights.read(folder, variant=variant, use_safetensors=use_safetensors)
    return of_files(files, is_mapped=is_mapped)


def of_files(files: Sequence[Path], *, is_mapped: bool = False) -> LazyState:
    lying: dict[str, Lying] = {}
    for file in files:
        part = header(file)
        if doubled := lying.keys() & part.keys():
            raise CheckpointError(f"{file} repeats {weights.some(doubled)} of the shards before it.")
        lying.update(part)
    return LazyState(lying, is_mapped=is_mapped)


def header(path: Path) -> dict[str, Lying]:
    """What a safetensors file holds, and where."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST, path.stat().st_size - 8):
                raise ValueError("its header has no sensible length")
            content = json.loads(file.read(length))
        entries = {key: value for key, value in content.items() if key != "__metadata__"}
        found = {key: _lying(path, value, 8 + length) for key, value in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {weights.why(path, error)}") from error
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def _lying(path: Path, entry: Mapping[str, object], base: int) -> Lying:
    kind, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if kind not in _DTYPES:
        raise ValueError(f"a tensor is of the type {kind}")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    lying = Lying(path, _DTYPES[kind], tuple(map(int, shape)), base + int(offsets[0]))
    if lying.nbytes != int(offsets[1]) - int(offsets[0]):
        raise ValueError("a tensor's size is not that of its shape")
    return lying
