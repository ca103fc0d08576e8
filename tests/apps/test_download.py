from __future__ import annotations

import json
from typing import Any

import pytest
from tests.hub_stub import Hub

from floyd.apps.download import left_out, lines, next_command, plans
from floyd.store.download import Plan, fetch

T5, CLIP = ["transformers", "T5EncoderModel"], ["transformers", "CLIPTextModel"]
UNET, CHECKER = ["diffusers", "UNet2DConditionModel"], ["deepfloyd_if", "IFSafetyChecker"]
TOKENIZER = ["transformers", "T5Tokenizer"]


def repository(class_name: str, **components: Any) -> dict[str, bytes]:
    """Weights of a hundred bytes for every component, in two variants and two formats."""
    files = {"model_index.json": json.dumps({"_class_name": class_name, **components}).encode()}
    for name, kind in components.items():
        if kind == TOKENIZER:
            files[f"{name}/spiece.model"] = b"words"
            continue
        files[f"{name}/config.json"] = f"{class_name} {name}".encode()
        for base in ("model", "model.fp16"):
            for suffix in ("safetensors", "bin"):
                files[f"{name}/{base}.{suffix}"] = f"{class_name} {name} {base} {suffix}".encode().ljust(100)
    return files


STAGE_ONE = repository("IFPipeline", text_encoder=T5, tokenizer=TOKENIZER, unet=UNET, safety_checker=CHECKER)
STAGE_TWO = repository(
    "IFSuperResolutionPipeline", text_encoder=T5, tokenizer=TOKENIZER, unet=UNET, safety_checker=CHECKER
)
STAGE_THREE = repository("StableDiffusionUpscalePipeline", text_encoder=CLIP, unet=UNET)


@pytest.fixture(autouse=True)
def models(hub: Hub) -> Hub:
    hub.repositories["DeepFloyd/IF-I-XL-v1.0"] = STAGE_ONE
    hub.repositories["DeepFloyd/IF-II-L-v1.0"] = STAGE_TWO
    hub.repositories["stabilityai/stable-diffusion-x4-upscaler"] = STAGE_THREE
    hub.repositories["org/other"] = STAGE_ONE
    return hub


def folders(plan: Plan) -> list[str]:
    return sorted({file.name.partition("/")[0] for file in plan.files if "/" in file.name})


def test_a_cascade_has_its_text_encoder_and_its_safety_checker_once() -> None:
    first, second, third = plans(["if-xl"], variant="fp16")
    assert folders(first) == ["safety_checker", "text_encoder", "tokenizer", "unet"]
    assert folders(second) == ["tokenizer", "unet"]
    assert folders(third) == ["text_encoder", "unet"]  # one of its own
    assert left_out(second) == ["text_encoder", "safety_checker"]
    assert all(
        ".bin" not in f.name and "model.safetensors" not in f.name for p in (first, second, third) for f in p.files
    )


@pytest.mark.parametrize("named", [["DeepFloyd/IF-II-L-v1.0"], ["DeepFloyd/IF-II-L-v1.0", "DeepFloyd/IF-I-XL-v1.0"]])
def test_a_second_stage_that_nobody_lends_to_is_whole(named: list[str]) -> None:
    assert folders(plans(named)[0]) == ["safety_checker", "text_encoder", "tokenizer", "unet"]


def test_two_first_stages_are_both_whole() -> None:
    assert [left_out(plan) for plan in plans(["DeepFloyd/IF-I-XL-v1.0", "org/other"])] == [[], []]


def test_what_the_first_leaves_out_it_cannot_lend() -> None:
    first, second, third = plans(["if-xl"], without=["safety_checker"])
    assert [left_out(plan) for plan in (first, second)] == [["safety_checker"], ["text_encoder", "safety_checker"]]
    assert left_out(third) == []
    both = plans(["DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0"], without=["text_encoder"])
    assert [left_out(plan) for plan in both] == [["text_encoder"], ["text_encoder", "safety_checker"]]


def test_named_components_are_fetched_whoever_lends() -> None:
    both = plans(["DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0"], components=["text_encoder"])
    assert [folders(plan) for plan in both] == [["text_encoder"], ["text_encoder"]]


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        (["if-xl"], {"revision": "main"}, "A revision is one model's, and these are 3"),
        (["if-xl"], {"components": ["unet"], "without": ["vae"]}, "either the components to fetch or those to leave"),
        (["if-xl"], {"without": ["vae"]}, "no component vae"),
        (["if-xs"], {}, "neither an existing folder nor a hub id"),
    ],
)
def test_a_wrong_wish_is_refused(named: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plans(named, **options)


def test_the_list_has_every_file_and_the_sum() -> None:
    told = lines(plans(["DeepFloyd/IF-I-XL-v1.0"], variant="fp16", without=["safety_checker"]))
    size = len(STAGE_ONE["model_index.json"]) + 100 + 100 + 5 + 23 + 15
    assert told[0] == f"DeepFloyd/IF-I-XL-v1.0: 6 files, {size} B, of which 0 B are here"
    assert [line.split()[:3] for line in told[2:4]] == [
        ["100", "B", "text_encoder/model.fp16.safetensors"],
        ["100", "B", "unet/model.fp16.safetensors"],
    ]
    assert told[-2].split() == ["without", "safety_checker"]
    assert told[-1].startswith(f"to fetch: {size} B; free: ")


def test_the_list_says_what_is_here(hub: Hub) -> None:
    [plan] = plans(["org/other"], variant="fp16")
    fetch(plan)
    file = next(f for f in plan.files if f.name == "unet/model.fp16.safetensors")
    assert file.digest is not None
    (plan.folder / file.name).unlink()
    (plan.blobs / file.digest).rename(plan.blobs / f"{file.digest}.incomplete")
    (plan.blobs / f"{file.digest}.incomplete").write_bytes(bytes(40))
    told = lines([plan])
    assert "    100 B  unet/model.fp16.safetensors  (40 B are here)" in told
    assert "    100 B  text_encoder/model.fp16.safetensors  (here)" in told
    assert told[-1].startswith("to fetch: 60 B;")


def test_a_mirror_without_sizes_is_listed_as_such(hub: Hub) -> None:
    hub.lists_sizes = False
    told = lines(plans(["org/other"]))
    assert "whose sizes this hub does not tell" in told[0]
    assert all(line.split()[0] == "?" for line in told[1:-1])


def test_the_next_command_draws_with_what_was_fetched() -> None:
    cascade = plans(["if-xl"], variant="fp16")
    assert next_command(["if-xl"], cascade, "fp16") == (
        'floyd generate "a photo of a red panda" --model if-xl --variant fp16 --dtype float16'
    )
    assert next_command(["if-xl"], cascade, None) == 'floyd generate "a photo of a red panda" --model if-xl'
    assert next_command(["a/b"], cascade[1:], None) is None
