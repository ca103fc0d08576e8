"""The published cascades on cards of every size, without a download and without a card."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_costs import SMALL

from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel
from floyd.nn import convolution
from floyd.nn.convolution import PackedConv, PackedDoubling, can_pack
from floyd.pipelines.known import KNOWN_IDS, Described, known
from floyd.pipelines.sizing import Sizing, Workload, _weights, described, of_folder
from floyd.runtime.budget import Budget
from floyd.runtime.machine import ANY_CARD, cpu
from floyd.runtime.parts import MOST_PACKED_BYTES, Part, Precision
from floyd.runtime.plan import Plan, plan
from floyd.runtime.switches import Switches
from floyd.store.headers import Stored

LARGE = ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0", "stabilityai/stable-diffusion-x4-upscaler")
CARDS_GB = (2, 3, 4, 6, 8, 10, 12, 16, 24, 40, 80)


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    return Sizing.of_models(LARGE, machine=ANY_CARD).parts()


@pytest.fixture(scope="module")
def plans(parts: list[Part]) -> dict[int, Plan]:
    return {size: plan(parts, Budget(vram=f"{size}GB", ram="64GB"), ANY_CARD) for size in CARDS_GB}


@pytest.mark.parametrize(
    ("model", "component", "num_weights"),
    [
        (LARGE[0], "text_encoder", 4_762_310_656),
        (LARGE[0], "unet", 4_304_695_110),
        (LARGE[1], "unet", 1_243_277_190),
        (LARGE[2], "unet", 473_398_020),
        (LARGE[2], "text_encoder", 340_387_840),
        (LARGE[2], "vae", 55_325_927),
        ("DeepFloyd/IF-I-M-v1.0", "unet", 371_605_830),
        ("DeepFloyd/IF-I-L-v1.0", "unet", 935_365_830),
        ("DeepFloyd/IF-II-M-v1.0", "unet", 482_483_334),
    ],
)
def test_the_published_networks_have_as_many_weights_as_they_have(model: str, component: str, num_weights: int) -> None:
    found = known(model)
    assert found is not None
    assert sum(prod(tensor.shape) for tensor in found.components[component].tensors) == num_weights


def test_the_safety_checker_is_as_large_as_its_file() -> None:
    found = known(LARGE[0])
    assert found is not None
    assert sum(tensor.num_bytes for tensor in found.components["safety_checker"].tensors) == pytest.approx(
        608e6, rel=0.01
    )


def test_t5_takes_what_its_precisions_are_known_to_take(parts: list[Part]) -> None:
    t5 = next(part for part in parts if part.name == "stage_1.text_encoder")
    assert [round(t5.num_bytes(p) / 1e9, 1) for p in t5.precisions] == [9.5, 4.9, 2.9]
    half = Sizing.of_models(LARGE[:1], machine=ANY_CARD).with_fixed({"stage_1.text_encoder": Precision("float16")})
    assert half.parts()[0].num_bytes(Precision("float16")) == pytest.approx(11.54e9, rel=0.001)


@pytest.mark.parametrize("size", CARDS_GB)
def test_every_card_from_2_gb_on_paints_1024_px_within_its_memory(plans: dict[int, Plan], size: int) -> None:
    made = plans[size]
    assert made.vram_peak <= size * 10**9
    assert [choice.part for choice in made.choices][:2] == ["stage_1.text_encoder", "stage_1.unet"]
    assert all(choice.way.tile is None for choice in made.choices)
    assert all(choice.precision.quantization != "int4" for choice in made.choices)


def test_a_larger_card_is_never_slower(plans: dict[int, Plan]) -> None:
    assert all(more.seconds <= less.seconds for less, more in pairwise(plans.values()))
    assert {choice.place for choice in plans[80].choices} == {"card"}
    assert {choice.precision for choice in plans[80].choices} == {Precision("bfloat16")}


def test_a_card_that_is_too_small_is_told_what_would_do(parts: list[Part]) -> None:
    with pytest.raises(ValueError, match=r"0.5 GB of VRAM is too little for this: the smallest that works is 0.\d GB"):
        plan(parts, Budget(vram="0.5GB", ram="64GB"), ANY_CARD)


def test_a_plan_is_made_for_the_call_that_it_is_told_of() -> None:
    models = ["DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0"]

    def peak(**call: Any) -> int:
        sizing = Sizing.of_models(models, machine=ANY_CARD, workload=Workload(**call))
        return plan(sizing.parts(), Budget(vram="80GB", ram="64GB"), ANY_CARD, count=call.get("count", 1)).vram_peak

    assert peak(size=64) < peak() < peak(size=(512, 512)) < peak(size=(512, 512), count=4)
    guided = Sizing.of_models(models, machine=ANY_CARD, workload=Workload(guidance=(1.0, None), steps=(7,))).parts()
    assert [(part.passes, part.ways[0].rows) for part in guided if part.name.endswith("unet")] == [(7, 1), (50, 2)]


def test_a_folder_says_itself_what_it_holds(folders: dict[str, Path], loaded: dict[str, Any]) -> None:
    found = of_folder(folders["one"])
    assert set(found.components) == {"text_encoder", "unet", "safety_checker"}
    for name, one in found.components.items():
        network = getattr(loaded["one"], name)
        assert sum(prod(tensor.shape) for tensor in one.tensors) == pytest.approx(
            sum(p.numel() for p in network.parameters()), abs=400
        )


@pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this torch lays no weights out anew")
@pytest.mark.parametrize("name", ["stage I", "stage II", "stage III"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_is_laid_out_anew_is_as_large_as_the_plan_says(name: str, on_cpu: bool) -> None:
    network = UNet2DConditionModel(**SMALL[name]).eval()
    tensors = tuple(Stored(key, tuple(p.shape), 2 * p.numel()) for key, p in network.named_parameters())
    weights = tuple(_weights(Described("UNet2DConditionModel", SMALL[name], tensors), on_cpu=on_cpu))
    part = Part("unet", weights, (Precision("float32"),), 1, ())
    ready = network.ready(Switches.best_for("cpu" if on_cpu else "cuda"))
    assert ready is not None
    copies = [one.weight.nbytes for one in ready.projections if one is not None]
    for layer in (*ready.resnets, *ready.convolutions):
        for one in (layer, *vars(layer).values()):
            if isinstance(one, PackedConv | PackedDoubling):
                copies.append(one.weight.nbytes * (16 / 9 if isinstance(one, PackedDoubling) else 1))
    assert part.copied_bytes(Precision("float32")) == pytest.approx(sum(copies), rel=1e-6)
    assert MOST_PACKED_BYTES == convolution.MOST_PACKED_BYTES / 2


def test_the_built_in_cascade_is_sized_with_its_own_presets() -> None:
    from importlib.resources import files

    sizing = Sizing.of_models([str(files("floyd") / "mini")], machine=cpu())
    assert {part.name: part.passes for part in sizing.parts() if part.name.endswith("unet")} == {
        "stage_1.unet": 27, "stage_2.unet": 12, "stage_3.unet": 8,
    }  # fmt: skip


@pytest.mark.parametrize("half", ["bfloat16", "float32"])
def test_without_a_card_no_network_is_planned_in_a_precision_that_is_emulated(half: str) -> None:
    parts = Sizing.of_models(LARGE, machine=replace(cpu(), half=half)).parts()
    assert {p.dtype for part in parts for p in part.precisions} == {"float32", half}
    for part in parts:
        assert len(set(part.precisions)) == len(part.precisions)
    unet = next(part for part in parts if part.name == "stage_1.unet")
    assert unet.precisions[-1] == Precision("float32", "int8")


def test_what_is_neither_here_nor_known_is_refused_with_what_is_known(no_network: None) -> None:
    with pytest.raises(ValueError, match=r"'some/model' is not on this machine.*IF-I-XL"):
        described("some/model")
    assert {known(model).components["unet"].class_name for model in KNOWN_IDS} == {"UNet2DConditionModel"}  # type: ignore[union-attr]
    assert known("some/model") is None
    assert len(KNOWN_IDS) == len(PRESETS)
