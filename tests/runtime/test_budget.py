"""A budget is what was said, or what the machine has; a container's limit counts."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from floyd.runtime.budget import Budget, parse_bytes, process_bytes, ram


@pytest.mark.parametrize(
    ("said", "size"),
    [("8GB", 8 * 10**9), ("6GiB", 6 * 2**30), (" 1.5 gb ", 1_500_000_000), ("500MB", 5 * 10**8), ("8", 8 * 10**9),
     ("0", 0), ("12G", 12 * 10**9), (1234, 1234)],
)  # fmt: skip
def test_sizes_are_read_as_they_are_written(said: Any, size: int) -> None:
    assert parse_bytes(said) == size


@pytest.mark.parametrize("said", ["much", "8 XB", "-1GB", "", "GB", True, -1, 1.5, None])
def test_what_is_no_size_is_refused_with_examples(said: Any) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto' or a size such as '8GB'"):
        parse_bytes(said)


def test_a_budget_holds_bytes() -> None:
    assert Budget(vram="8GB", ram="16GB").cards == (8 * 10**9,)
    assert Budget(vram=("12GB", "8GB")).cards == (12 * 10**9, 8 * 10**9)
    assert Budget(vram=0).cards == ()


@pytest.mark.parametrize("field", [{"ram": 0}, {"quantize": 1}, {"vram": "lots"}])
def test_a_budget_that_makes_no_sense_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Budget(**field)


def test_a_size_means_the_card_where_there_is_one_and_main_memory_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert Budget.of("8GB") == Budget(vram="8GB")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert Budget.of("8GB") == Budget(vram=0, ram="8GB")
    assert Budget.of("auto") == Budget()
    assert Budget.of(Budget(vram="1GB")) == Budget(vram="1GB")


def test_what_is_not_said_is_measured() -> None:
    measured = Budget(vram="8GB").measured()
    assert measured.cards == (8 * 10**9,)
    assert 0 < measured.ram_bytes < 2**50
    assert Budget(ram="3GB").measured().ram_bytes == 3 * 10**9


def _machine(root: Path, *, available_kb: int = 800_000) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal:  1000000 kB\nMemAvailable:  {available_kb} kB\n")
    (root / "sys/fs/cgroup/memory").mkdir(parents=True)
    return root / "sys/fs/cgroup"


def test_files_that_the_system_caches_are_not_held_against_a_container(tmp_path: Path) -> None:
    groups = _machine(tmp_path)
    (groups / "memory.max").write_text("500000000\n")
    (groups / "memory.current").write_text("450000000\n")
    (groups / "memory.stat").write_text("anon 50000000\ninactive_file 400000000\n")
    assert ram(tmp_path) == (500_000_000, 450_000_000)


def test_the_older_control_groups_count_too(tmp_path: Path) -> None:
    groups = _machine(tmp_path)
    (groups / "memory/memory.limit_in_bytes").write_text("300000000\n")
    (groups / "memory/memory.usage_in_bytes").write_text("100000000\n")
    assert ram(tmp_path) == (300_000_000, 200_000_000)
    (groups / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")  # what it says for no limit
    assert ram(tmp_path) == (1_024_000_000, 819_200_000)


def test_the_process_knows_its_size(tmp_path: Path) -> None:
    before = process_bytes()
    with mmap.mmap(-1, 50_000_000) as ballast:  # new pages: the heap may have as many to give again
        ballast.write(bytes(50_000_000))
        assert process_bytes() - before > 40_000_000
    assert process_bytes(tmp_path) == 0
