"""How much memory there may be used: as it is said, or as the machine has it. This file does without torch until asked
about a card.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_HEADROOM = 0.95  # of what is free: others on the machine go on living, and allocators leave holes


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What floyd may fill, in bytes: `Budget(vram="8GB", ram="16GB")`.

    `vram` 0 is a machine without a card. None is whatever the machine has, which `measured` fills in. `ram` counts the
    whole process, `vram` what torch's allocator holds; a card sold as 8 GB has 8 GiB, and the difference to "8GB" is
    what its driver takes. Several cards are a tuple, `vram=("12GB", "12GB")`, and a stage lies on one of them.
    `quantize` False keeps all weights in 16 bits or more.
    """

    vram: int | str | tuple[int | str, ...] | None = None
    ram: int | str | None = None
    quantize: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.vram, tuple | list):
            object.__setattr__(self, "vram", tuple(parse_bytes(size, name="vram") for size in self.vram) or None)
        else:
            object.__setattr__(self, "vram", _bytes("vram", self.vram))
        object.__setattr__(self, "ram", _bytes("ram", self.ram))
        if not isinstance(self.quantize, bool):
            raise TypeError(f"quantize of a Budget is True or False, got {self.quantize!r}.")
        if self.ram == 0:
            raise ValueError("ram of a Budget must be more than 0: a program needs some.")

    @classmethod
    def of(cls, memory: Budget | str | int) -> Budget:
        """What `memory=` says: a Budget, "auto", or the size of the accelerator's memory, which on a machine without
        one is that of main memory."""
        if isinstance(memory, Budget):
            return memory
        if memory == "auto":
            return cls()
        size = _bytes("memory", memory)
        return cls(vram=size) if has_accelerator() else cls(vram=0, ram=size)

    def measured(self) -> Self:
        """With the machine's numbers where none are given."""
        vram = self.vram if self.vram is not None else _headroom(free_vram())
        ram = self.ram if self.ram is not None else _headroom(free_ram(), in_use=process_bytes())
        return replace(self, vram=vram, ram=ram)

    @property
    def cards(self) -> tuple[int, ...]:
        """What each card may hold; empty without one."""
        assert self.vram is not None, "measured() comes first"
        sizes = self.vram if isinstance(self.vram, tuple) else (self.vram,)
        return tuple(size for size in sizes if isinstance(size, int) and size > 0)

    @property
    def ram_bytes(self) -> int:
        assert isinstance(self.ram, int), "measured() comes first"
        return self.ram


def _headroom(free_bytes: int | None, in_use: int = 0) -> int:
    """Where a system does not tell, there is no limit that could be kept."""
    return 2**62 if free_bytes is None else int(free_bytes * _HEADROOM) + in_use


def _bytes(name: str, size: int | str | None) -> int | None:
    return None if size is None or size == "auto" else parse_bytes(size, name=name)


def parse_bytes(size: int | str, *, name: str = "memory") -> int:
    """ "8GB" is 8 * 10**9 bytes, "8GiB" 8 * 2**30; a bare number is bytes, but a small one in words is GB: "8"."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    unit = match[2].upper() or "GB" if match else ""
    if unit in {"K", "M", "G", "T"}:
        unit += "B"
    if match is None or unit not in _UNITS:
        raise ValueError(f"{name} must be 'auto' or a size such as '8GB', '7.5GiB' or 8_000_000_000; got {size!r}.")
    return int(float(match[1]) * _UNITS[unit])


def has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def free_vram() -> int | None:
    """Of the best device, in bytes; what our own allocator holds and does not use is free, too. 0 without a device."""
    import torch

    if not torch.accelerator.is_available():
        return 0
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    if torch.backends.mps.is_available():
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def free_ram() -> int | None:
    """What programs may still take."""
    return ram()[1]


def process_bytes(root: Path = Path("/")) -> int:
    """Main memory that this process has now; 0 where the system does not tell."""
    status = root / "proc/self/status"
    if not status.is_file():
        return 0
    rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(rows["VmRSS"].split()[0]) * 1024 if "VmRSS" in rows else 0


def ram(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """In bytes, all and free. A container's own limit counts where there is one."""
    table = root / "proc/meminfo"
    if table.is_file():
        rows = dict(line.split(":", 1) for line in table.read_text().splitlines() if ":" in line)
        total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        for limit, used in _cgroups(root):
            if limit < total:
                total, free = limit, min(free, max(0, limit - used))
        return total, free
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not these names
        return None, None


def _cgroups(root: Path) -> list[tuple[int, int]]:
    """Limit and use, by the second version of control groups and by the first. What the kernel caches of files it would
    give back, so it is not in use."""
    found = []
    for folder, limit_name, used_name, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        place = root / "sys/fs/cgroup" / folder
        limit, used = _number(place / limit_name), _number(place / used_name)
        if limit is not None:
            found.append((limit, max(0, (used or 0) - _row(place / "memory.stat", cached))))
    return found


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _row(path: Path, name: str) -> int:
    rows = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == name), 0)
