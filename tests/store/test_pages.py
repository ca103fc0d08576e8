"""Weights in large pages are weights like others."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from floyd.store import pages
from floyd.store.pages import LARGE_PAGE, cast, room

MANY = LARGE_PAGE // 2 + 3  # in float32 more than a large page, in float16 too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (), (7, 3), (MANY,), (3, 5, MANY // 4)])
def test_casting_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(torch.float16)
    own = cast(tensor, dtype)
    assert own.dtype == dtype
    assert own.shape == tensor.shape
    assert torch.equal(own, tensor.to(dtype))
    assert (own is tensor) == (dtype == torch.float16)


def test_what_is_cast_is_contiguous_and_may_be_written_and_saved(tmp_path: Path) -> None:
    own = cast(torch.randn(1024, 1500).half().T, torch.float32)
    assert own.is_contiguous()
    own.add_(1)
    torch.save(own, tmp_path / "own.pt")
    assert torch.equal(torch.load(tmp_path / "own.pt"), own)


def test_views_keep_the_memory_and_the_last_of_them_gives_it_back() -> None:
    def held() -> int:
        row = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(row.split()[1]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    gc.collect()
    before, size = held(), 96 * LARGE_PAGE
    whole = room((size,), torch.uint8).fill_(7)
    part = whole[size // 2 :][:5].view(5, 1)
    del whole
    gc.collect()
    assert held() - before > 0.9 * size
    assert part.flatten().tolist() == [7] * 5
    del part
    gc.collect()
    assert held() - before < 0.1 * size


def test_a_system_without_large_pages_has_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def madvise(self, advice: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages.mmap, "mmap", Refusing)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert room((MANY,), torch.float32).shape == (MANY,)
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert room((MANY,), torch.float32).shape == (MANY,)
