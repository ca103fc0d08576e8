"""Compiling the kernels, and each of them against torch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from floyd.engines import native
from floyd.engines.learning import Norm
from floyd.engines.native import ACTS, KINDS, Kernels, Op
from floyd.engines.weights import Weights, panels
from floyd.errors import EngineError


def done(kernels: Kernels, kind: str, out: Tensor, threads: int = 1, **fields: Any) -> Tensor:
    """`out`, written by one operation."""
    ops = (Op * 1)(Op(kind=KINDS.index(kind), out=out.data_ptr(), alpha=1.0))
    for name, value in fields.items():
        setattr(ops[0], name, value.data_ptr() if isinstance(value, Tensor) else value)
    work = torch.full((max(1, kernels.work_floats(ops[0], threads)),), torch.nan)  # nothing may be read unwritten
    kernels.run(ops, work.data_ptr(), threads)
    return out


def shape(x_BHWC: Tensor, height: int = 0, width: int = 0) -> dict[str, int]:
    batch, x_height, x_width, channels = x_BHWC.shape
    return {
        "batch": batch, "height": height or x_height, "width": width or x_width,
        "x_height": x_height, "x_width": x_width, "channels": channels,
    }  # fmt: skip


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 8), (13, 6)])
@pytest.mark.parametrize(("ins", "outs"), [(16, 16), (32, 48), (48, 16)])
def test_a_winograd_convolution(
    compiled: Kernels, tile: int, threads: int, size: tuple[int, int], ins: int, outs: int
) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(ins, outs, 3, padding=1).requires_grad_(False)
    x_BHWC, add_BHWC = torch.randn(2, *size, ins), torch.randn(2, *size, outs)
    weight = Weights(compiled).conv3(conv, (ins,), 1.0, tile)
    out_BHWC = done(
        compiled, "conv3", torch.empty(2, *size, outs), threads, x=x_BHWC, weight=weight, bias=conv.bias, add=add_BHWC,
        tile=tile, out_channels=outs, alpha=0.5, **shape(x_BHWC),
    )  # fmt: skip
    expected = conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + 0.5 * add_BHWC
    torch.testing.assert_close(out_BHWC, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [2, 4])
def test_however_a_kernel_lies_in_memory_it_is_packed_alike(compiled: Kernels, tile: int) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(19, 24, 3, padding=1).requires_grad_(False)
    plain = Weights(compiled).conv3(conv, (19,), 0.5, tile)
    assert plain.any()
    for laid in (
        conv.weight.contiguous(memory_format=torch.channels_last),  # as a network's that was trained on the CPU
        conv.weight.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(48, 38, 3, 3)[::2, ::2].copy_(conv.weight),
    ):
        assert not laid.is_contiguous()
        conv.weight = torch.nn.Parameter(laid, requires_grad=False)
        assert torch.equal(Weights(compiled).conv3(conv, (19,), 0.5, tile), plain)


@pytest.mark.parametrize("tile", [2, 4])
def test_doubling_and_convolving_at_once(compiled: Kernels, tile: int) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
    x_BHWC, add_BHWC = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 3, 32)
    rows, columns = (torch.arange(side, dtype=torch.int32).repeat_interleave(2) for side in (5, 3))
    out_BHWC = done(
        compiled, "conv3", torch.empty(2, 10, 6, 32), x=x_BHWC, weight=Weights(compiled).conv3(conv, (16,), 1.0, tile),
        bias=conv.bias, add=add_BHWC, add_is_halved=1, is_doubled=1, rows=rows, columns=columns, tile=tile,
        out_channels=32, **shape(x_BHWC, 10, 6),
    )  # fmt: skip
    doubled = [F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0) for x in (x_BHWC, add_BHWC)]
    torch.testing.assert_close(out_BHWC.permute(0, 3, 1, 2), conv(doubled[0]) + doubled[1], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 2, 1), (5, 1, 2)])
def test_any_other_convolution(compiled: Kernels, kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(7, 20, kernel, stride, padding).requires_grad_(False)
    x_BCHW = torch.randn(2, 7, 9, 6)
    expected = conv(x_BCHW)
    x_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 9)).contiguous()
    weights = Weights(compiled)
    out_BHWC = done(
        compiled, "conv", torch.empty(2, *expected.shape[-2:], 32), x=x_BHWC, weight=weights.conv(conv, (7,)),
        bias=weights.bias([conv], (20,)), kernel=kernel, stride=stride, padding=padding, out_channels=32,
        **shape(x_BHWC, *expected.shape[-2:]),
    )  # fmt: skip
    torch.testing.assert_close(out_BHWC[..., :20].permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-5)
    assert not out_BHWC[..., 20:].any()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("pools", [False, True])
def test_a_norm_over_two_tensors_with_all_that_follows(compiled: Kernels, act: str, pools: bool) -> None:
    torch.manual_seed(0)
    x_BHWC, skip_BHWC = 3 + torch.randn(2, 14, 10, 16), torch.randn(2, 14, 10, 32)
    weight_C, bias_C, scale_BC, shift_BC = torch.randn(48), torch.randn(48), torch.randn(2, 48), torch.randn(2, 48)
    size = (7, 5) if pools else (14, 10)
    out_BHWC = done(
        compiled, "norm", torch.empty(2, *size, 48), x=x_BHWC, x2=skip_BHWC, channels2=32, weight=weight_C, bias=bias_C,
        scale=scale_BC, shift=shift_BC, film_stride=48, num_groups=6, eps=1e-5, act=ACTS.index(act), pools=pools,
        groups=(torch.arange(48) // 8).to(torch.int32), **shape(x_BHWC, *size),
    )  # fmt: skip
    h_BCHW = F.group_norm(torch.cat([x_BHWC, skip_BHWC], -1).permute(0, 3, 1, 2), 6, weight_C, bias_C)
    h_BCHW = h_BCHW * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]
    h_BCHW = h_BCHW if act == "none" else getattr(F, act)(h_BCHW)
    expected = F.avg_pool2d(h_BCHW, 2) if pools else h_BCHW
    torch.testing.assert_close(out_BHWC.permute(0, 3, 1, 2), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("act", ACTS[1:])
def test_activations_everywhere(compiled: Kernels, act: str) -> None:
    """Also where e^x has no place in float32."""
    x = torch.cat([torch.linspace(-12, 12, 1600), torch.tensor([-1e4, -200, -90, -0.0, 0.0, 90, 200, 1e4] * 2)])
    x_BHWC, one = x.view(1, -1, 1, 16), torch.ones(16)
    centred = torch.cat([x_BHWC, -x_BHWC], 1)  # of mean 0, so that the norm only scales
    out = done(
        compiled, "norm", torch.empty_like(centred), x=centred, weight=one * centred.square().mean().sqrt(),
        bias=one * 0, num_groups=1, act=ACTS.index(act), groups=torch.zeros(16, dtype=torch.int32), **shape(centred),
    )  # fmt: skip
    torch.testing.assert_close(out, getattr(F, act)(centred), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(("text", "looks_at_pixels"), [(5, True), (77, True), (5, False), (0, True)])
@pytest.mark.parametrize("threads", [1, 3])
def test_attention(compiled: Kernels, text: int, looks_at_pixels: bool, threads: int) -> None:
    torch.manual_seed(0)
    heads, head_width, pixels = 3, 16, 60
    inner = heads * head_width
    q, k, v = (3 * torch.randn(2, pixels, inner) for _ in range(3))
    text_k, text_v = 3 * torch.randn(2, text, inner), torch.randn(2, text, inner)
    bias = torch.zeros(2, text)
    bias[:, 1:3] = -10000
    x = torch.cat([q, k, v], -1) if looks_at_pixels else q
    out = done(
        compiled, "attention", torch.empty(2, pixels, inner), threads, x=x, text_k=text_k, text_v=text_v, heads=heads,
        text_bias=bias if text else None, head_width=head_width, factor=0.25, text=text, batch=2, height=6, width=10,
        looks_at_pixels=looks_at_pixels,
    )  # fmt: skip
    keys, values = ([text_k, k], [text_v, v]) if looks_at_pixels else ([text_k], [text_v])
    split = [y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, torch.cat(keys, 1), torch.cat(values, 1))]
    mask = F.pad(bias, (0, split[1].shape[2] - text))[:, None, None]
    expected = F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "ins", "outs"), [(1, 16, 16), (13, 48, 80), (300, 512, 112)])
def test_a_linear_layer(compiled: Kernels, rows: int, ins: int, outs: int) -> None:
    torch.manual_seed(0)
    x, weight, bias, add = torch.randn(rows, ins), torch.randn(outs, ins), torch.randn(outs), torch.randn(rows, outs)
    out = done(
        compiled, "linear", torch.empty(rows, outs), 2, x=x, weight=panels(weight.T, compiled.lanes), bias=bias,
        add=add, channels=ins, out_channels=outs, batch=1, height=1, width=rows,
    )  # fmt: skip
    torch.testing.assert_close(out, F.linear(x, weight, bias) + add, atol=2e-4, rtol=1e-5)


# --- compiling


def test_kernels_are_compiled_once(compiled: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native.kernels.__wrapped__()
    assert first.path.is_relative_to(tmp_path / "floyd" / "engines")
    made = [path.name for path in first.path.parent.iterdir()]
    assert made == [first.path.name]  # nothing else is left behind

    def refuse(*_: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(native, "_compile", refuse)
    assert native.kernels.__wrapped__().path == first.path


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineError, match=r"no C\+\+ compiler was found.*apt install g\+\+.*openvino"):
        native.kernels.__wrapped__()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(EngineError, match=r"the one that CXX names, '/nowhere/c\+\+'"):
        native.kernels.__wrapped__()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "it is Monday" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(EngineError, match="it is Monday"):
        native.kernels.__wrapped__()
    assert not list((tmp_path / "cache" / "floyd" / "engines").iterdir())


def test_a_broken_library_says_which_file_to_delete(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_text("not a library")
    with pytest.raises(EngineError, match=f"{path} cannot be loaded: delete it"):
        Kernels(path)


def test_windows_is_told_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.sys, "platform", "win32")
    with pytest.raises(EngineError, match="WSL"):
        native.kernels.__wrapped__()


@pytest.mark.parametrize(("structure", "file"), [(Op, "op.h"), (Norm, "learn.h")])
def test_a_structure_has_the_fields_of_the_header(structure: type[ctypes.Structure], file: str) -> None:
    """In the same order; that their sizes agree is checked when they are first used."""
    header = (native.SOURCES / file).read_text()
    start = header.index(f"struct {structure.__name__} {{")
    lines = [line.split("//")[0].strip() for line in header[start : header.index("};", start)].splitlines()[1:]]
    declared = " ".join(lines).replace("const ", "").replace("*", "").split(";")
    names = [name.strip() for line in declared if line.strip() for name in line.strip().split(" ", 1)[1].split(",")]
    assert names == [field[0] for field in structure._fields_]


@pytest.mark.parametrize(("enum", "names", "file"), [("Kind", KINDS, "op.h"), ("Act", ACTS, "simd.h")])
def test_numbers_mean_the_same_on_both_sides(enum: str, names: list[str], file: str) -> None:
    source = (native.SOURCES / file).read_text()
    start = source.index(f"enum {enum} {{") + len(f"enum {enum} {{")
    assert [name.strip().lower() for name in source[start : source.index("}", start)].split(",")] == names
