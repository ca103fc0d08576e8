"""What `from_pretrained` is asked for, by component: quantization, and how near the built-in networks stay under it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from floyd import Cascade, DiffusionPipeline
from floyd.pipelines.loading import Request
from floyd.runtime.quantize import nbytes, quantization_of

PROMPTS = ["a large red circle above a small blue square on a white background", "three green triangles", ""]


@cache
def built_in(quantization: str | None) -> Cascade:
    return Cascade.built_in(quantization=quantization)


def networks(cascade: Cascade) -> dict[str, Any]:
    return {f"{stage}.{name}": part for stage, pipe in cascade.stages.items() for name, part in pipe._modules()}


def read(cascade: Cascade) -> Tensor:
    positive, _ = cascade.stages["stage_1"].encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    return positive


@pytest.mark.parametrize(("name", "least"), [("int8", 0.999), ("fp8", 0.999), ("int4", 0.99)])
def test_the_built_in_t5_says_nearly_the_same(name: str, least: float) -> None:
    likeness = torch.cosine_similarity(read(built_in(None)), read(built_in(name)), dim=-1)
    assert float(likeness.mean()) >= least
    assert float(likeness.min()) >= 1 - 5 * (1 - least)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.03), ("fp8", 0.08), ("int4", 0.25)])
@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_the_built_in_unets_predict_nearly_the_same(stage: str, name: str, most: float) -> None:
    text = read(built_in(None))[:1]
    plain, few = (built_in(kind).stages[stage].unet for kind in (None, name))
    x = torch.randn(1, plain.config.in_channels, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = None if plain.class_embedding is None else torch.tensor([50])
    with torch.no_grad():
        for t in (900, 300):
            before, after = (unet(x, t, text, labels).sample for unet in (plain, few))
            assert float((after - before).norm() / before.norm()) < most


def test_a_name_is_for_text_encoders_and_unets() -> None:
    told = {name: quantization_of(part) for name, part in networks(built_in("int8")).items()}
    assert {name for name, how in told.items() if how == "int8"} == {
        "stage_1.text_encoder", "stage_1.unet", "stage_2.unet", "stage_3.text_encoder", "stage_3.unet"
    }  # fmt: skip
    assert told["stage_3.vae"] is None
    sizes = {kind: sum(map(nbytes, networks(built_in(kind)).values())) for kind in (None, "int8", "int4")}
    assert sizes["int8"] < 0.35 * sizes[None]  # float32, and the tables of the small text encoders stay
    assert sizes["int4"] < 0.7 * sizes["int8"]


def test_quantization_may_differ_by_component() -> None:
    told = {"default": "fp8", "unet": "int8", "text_encoder": None, "vae": "int8"}
    cascade = Cascade.built_in(quantization=told)
    assert {name: quantization_of(part) for name, part in networks(cascade).items()} == {
        "stage_1.text_encoder": None, "stage_1.unet": "int8", "stage_2.unet": "int8",
        "stage_3.text_encoder": None, "stage_3.unet": "int8", "stage_3.vae": "int8",
    }  # fmt: skip
    assert Request(source="x", quantization={"default": "fp8"}).quantization_of("text_encoder") == "fp8"
    assert Request(source="x", quantization={"default": "fp8"}).quantization_of("vae") is None


def test_what_no_component_is_called_and_what_no_scheme_is_called_is_refused() -> None:
    with pytest.raises(ValueError, match="got transformer"):
        DiffusionPipeline.from_pretrained("nowhere", quantization={"transformer": "int8"})
    with pytest.raises(ValueError, match="one of int8, fp8, int4, or None; got 'int2'"):
        DiffusionPipeline.from_pretrained("nowhere", quantization="int2")
    with pytest.raises(TypeError, match="a name, or names by component"):
        DiffusionPipeline.from_pretrained("nowhere", quantization=8)  # type: ignore[arg-type]


def test_a_quantized_cascade_paints_is_cast_and_comes_back_from_disk(tmp_path: Path) -> None:
    cascade = Cascade.built_in(quantization={"text_encoder": "int4", "unet": "int8"})
    call: dict[str, Any] = {"seed": 3, "steps": 2, "size": cascade.sizes["stage_1"]}
    before = cascade(PROMPTS[0], **call).images[0]
    cascade.save_pretrained(tmp_path)
    again = Cascade.from_pretrained(tmp_path)
    assert again(PROMPTS[0], **call).images[0].tobytes() == before.tobytes()
    again.to(torch.bfloat16)
    assert networks(again)["stage_1.unet"].dtype == torch.bfloat16
    assert quantization_of(networks(again)["stage_1.unet"]) == "int8"
    again(PROMPTS[0], **call)
