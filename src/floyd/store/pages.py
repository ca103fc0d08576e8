"""Room for weights in large pages, where the system gives them.

Memory that is new to a process comes page by page, and 4 KiB at a time that takes longer than casting what goes into
it. Linux gives 2 MiB at a time to who asks.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another precision, on its own device; itself if it has that precision."""
    if tensor.dtype == dtype or tensor.device.type != "cpu":
        return tensor.to(dtype)
    return room(tensor.shape, dtype).copy_(tensor)


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with any content, which alone owns its memory."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel that has none
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
