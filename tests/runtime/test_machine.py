from __future__ import annotations

import pytest
import torch

from floyd.runtime import machine
from floyd.runtime.machine import computes_in, cpu

CPU = torch.device("cpu")


def test_a_cpu_computes_in_what_it_says_of_itself() -> None:
    told = getattr(torch.cpu, "get_capabilities", dict)()
    if told.get("architecture") != "x86_64":
        pytest.skip("this torch does not tell what the processor can do")
    native = told["avx512_bf16"] or told["amx_bf16"] or (told["avx_ne_convert"] and not told["avx512_f"])
    assert computes_in(torch.bfloat16, CPU) == native
    assert cpu().half == ("bfloat16" if native else "float32")


@pytest.mark.parametrize(
    ("onednn", "avx512", "bf16", "amx", "expected"),
    [
        (True, True, True, False, True),  # Zen 4
        (True, True, False, True, True),
        (True, True, True, True, True),  # Sapphire Rapids
        (True, True, False, False, False),  # Skylake, Ice Lake: emulated
        (True, False, False, False, True),  # ARM with its own instructions
        (False, False, False, False, False),  # Zen 3 and before
    ],
)
def test_emulated_bfloat16_does_not_count(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, bf16: bool, amx: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name, value in (("avx512", avx512), ("avx512_bf16", bf16), ("amx_tile", amx)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value)
    assert computes_in(torch.bfloat16, CPU) == expected
    assert cpu().half == ("bfloat16" if expected else "float32")


def test_float16_is_asked_for_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda value=value: value)
        assert computes_in(torch.float16, CPU) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_every_device_computes_in_whole_precision(dtype: torch.dtype) -> None:
    assert computes_in(dtype, CPU)


def test_other_devices_are_trusted() -> None:
    assert computes_in(torch.bfloat16, torch.device("mps"))
    assert computes_in(torch.float16, torch.device("meta"))


def test_an_old_card_emulates_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert not computes_in(torch.bfloat16, torch.device("cuda"))
    assert computes_in(torch.float16, torch.device("cuda"))
    assert asked == [False]
    assert machine.ANY_CARD.half == "bfloat16"
