"""GGUF files, through their authors' own package: `pip install floyd-if[gguf]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floyd.errors import CheckpointError


class GGUFState(Mapping[str, Tensor]):
    """The tensors of a file, each unpacked to float32 when it is asked for."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise CheckpointError(f"{path} cannot be read without: pip install gguf.") from error
        try:
            self._reader = GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise CheckpointError(f"{path} is not a GGUF file: {error}") from error
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in self._tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[key]
        try:
            content = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"{key} is stored as {tensor.tensor_type.name}, which cannot be unpacked.") from error
        return torch.from_numpy(content.copy()).float().view(self.shapes[key])

    def __contains__(self, key: object) -> bool:
        return key in self._tensors  # without reading it, as a Mapping by itself would

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
