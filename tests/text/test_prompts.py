"""Prompts become the embeddings that the incumbent makes of them, bit for bit in float32."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from diffusers import IFPipeline, StableDiffusionUpscalePipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from floyd.text.prompts import PromptPair, embed, embed_clip, encode_clip_prompt, encode_prompt, tokenize

CPU = torch.device("cpu")
LONG = "a photo of the kangaroo wearing an orange hoodie " * 12 + "the end"


@pytest.fixture(scope="module")
def t5_parts(t5_tokenizer: T5Tokenizer, t5: T5EncoderModel) -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer, "text_encoder": t5}


@pytest.fixture(scope="module")
def clip_parts(clip_tokenizer: CLIPTokenizer, clip: CLIPTextModel) -> dict[str, Any]:
    return {"tokenizer": clip_tokenizer, "text_encoder": clip}


@pytest.fixture(scope="module")
def incumbent(t5_parts: dict[str, Any]) -> IFPipeline:
    return IFPipeline(
        **t5_parts,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def incumbent_upscaler(clip_parts: dict[str, Any]) -> StableDiffusionUpscalePipeline:
    return StableDiffusionUpscalePipeline(**clip_parts, vae=None, unet=None, low_res_scheduler=None, scheduler=None)


def rows(count: int, tokens: int = 77, seed: int = 0) -> Tensor:
    return torch.randn(count, tokens, 32, generator=torch.Generator().manual_seed(seed))


def assert_same(pair: PromptPair, expected: tuple[Tensor, Tensor | None]) -> None:
    assert torch.equal(pair.positive, expected[0])
    if expected[1] is None:
        assert pair.negative is None
    else:
        assert pair.negative is not None
        assert torch.equal(pair.negative, expected[1])


CALLS: list[dict[str, Any]] = [
    {"prompt": "a photo of a Cat,on the tree"},
    {"prompt": "A Cat,on the tree", "clean_caption": True, "negative_prompt": "'Ugly',blurry"},
    {"prompt": ["a cat", "a red dog with an orange hoodie"]},
    {"prompt": ["a cat", "a red dog"], "num_images_per_prompt": 3},
    {"prompt": ["a cat", "a red dog"], "negative_prompt": ["ugly", ""], "num_images_per_prompt": 2},
    {"prompt": "a cat", "negative_prompt": "blurry"},
    {"prompt": "a cat", "negative_prompt": "blurry", "do_classifier_free_guidance": False},
    {"prompt": "a cat", "negative_prompt_embeds": rows(1), "do_classifier_free_guidance": False},
    {"prompt": "a cat", "negative_prompt_embeds": rows(1)},
    {"prompt": ""},
    {"prompt": LONG, "negative_prompt": LONG},
    {"prompt_embeds": rows(2)},
    {"prompt_embeds": rows(2, tokens=16), "num_images_per_prompt": 2},
    {"prompt_embeds": rows(1, tokens=16), "negative_prompt": "an ugly blurry photo"},
    {"prompt_embeds": rows(2), "negative_prompt": ["ugly", "blurry"]},
    {"prompt_embeds": rows(2), "negative_prompt_embeds": rows(2, seed=1), "num_images_per_prompt": 2},
    {"prompt_embeds": rows(2).double(), "negative_prompt_embeds": rows(2, seed=1).half()},
]


@pytest.mark.parametrize("call", CALLS)
def test_t5_embeddings_equal_the_incumbents(call: dict[str, Any], t5_parts: dict, incumbent: IFPipeline) -> None:
    expected = incumbent.encode_prompt(**{"prompt": None, **call})
    assert_same(encode_prompt(**call, **t5_parts), expected)


@pytest.mark.parametrize(
    "call",
    [call for call in CALLS if "clean_caption" not in call and call.get("negative_prompt_embeds") is None]
    + [
        {"prompt": "a cat", "clip_skip": 0},
        {"prompt": "A Cat", "clip_skip": 1, "negative_prompt": "ugly"},
        {"prompt": ["a cat", "a dog"], "clip_skip": 3, "num_images_per_prompt": 2},
        {"prompt": "a cat", "negative_prompt_embeds": rows(1, tokens=20)},
    ],
)
def test_clip_embeddings_equal_the_incumbents(
    call: dict[str, Any],
    clip_parts: dict,
    clip: CLIPTextModel,
    incumbent_upscaler: StableDiffusionUpscalePipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if call.get("clip_skip") is not None:  # the incumbent looks for the norm where an older transformers has it
        monkeypatch.setitem(clip.__dict__, "text_model", clip)
    call = {key: value[:, :20] if isinstance(value, Tensor) else value for key, value in call.items()}
    told = {"do_classifier_free_guidance": True, "num_images_per_prompt": 1, "prompt": None, **call}
    with torch.no_grad():
        expected = incumbent_upscaler.encode_prompt(device=CPU, **told)
    if not told["do_classifier_free_guidance"]:
        expected = (expected[0], None)
    assert_same(encode_clip_prompt(**call, **clip_parts), expected)


def test_the_attention_mask_reaches_clip_only_where_its_config_asks_for_it(
    clip_parts: dict, clip: CLIPTextModel, incumbent_upscaler: StableDiffusionUpscalePipeline
) -> None:
    unmasked = encode_clip_prompt("a cat", **clip_parts)
    clip.config.use_attention_mask = True
    try:
        with torch.no_grad():
            expected = incumbent_upscaler.encode_prompt("a cat", CPU, 1, True)
        masked = encode_clip_prompt("a cat", **clip_parts)
    finally:
        del clip.config.use_attention_mask
    assert_same(masked, expected)
    assert not torch.equal(masked.positive, unmasked.positive)


def test_padding_positions_carry_states_that_depend_on_the_prompt_alone(t5_parts: dict) -> None:
    short, long = (embed(["a cat"], *t5_parts.values(), max_length=length) for length in (20, 77))
    assert torch.allclose(short, long[:, :20], atol=1e-5)  # the padding is masked inside T5 ...
    assert short[:, -1].abs().max() > 0.1  # ... and has a state of its own


def test_padding_is_masked_inside_t5(t5_parts: dict) -> None:
    ids_BL, _ = tokenize(["a cat"], t5_parts["tokenizer"], max_length=77, encoder_name="T5")
    with torch.no_grad():
        unmasked = t5_parts["text_encoder"](ids_BL)[0]
    assert not torch.allclose(embed(["a cat"], *t5_parts.values()), unmasked, atol=1e-3)


def test_a_single_negative_text_holds_for_every_prompt(t5_parts: dict) -> None:
    alone = encode_prompt("a cat", negative_prompt="ugly", **t5_parts).negative
    assert alone is not None
    for call in ({"prompt_embeds": rows(3)}, {"prompt": ["a", "b", "c"]}):
        pair = encode_prompt(negative_prompt="ugly", num_images_per_prompt=2, **call, **t5_parts)
        assert pair.negative is not None
        assert pair.negative.shape == (6, 77, 32)
        assert torch.allclose(pair.negative, alone.expand(6, -1, -1), atol=1e-5)


def test_images_of_one_prompt_stand_beside_each_other(t5_parts: dict) -> None:
    embeds = rows(2)
    pair = encode_prompt(prompt_embeds=embeds, num_images_per_prompt=2, **t5_parts)
    assert torch.equal(pair.positive, embeds[[0, 0, 1, 1]])


def test_a_pair_unpacks_into_positive_and_negative_and_cannot_be_changed(t5_parts: dict) -> None:
    pair = encode_prompt("a cat", **t5_parts)
    positive, negative = pair
    assert positive is pair.positive
    assert negative is pair.negative
    with pytest.raises(FrozenInstanceError):
        pair.positive = rows(1)  # type: ignore[misc]


def test_embeddings_need_no_gradient(t5_parts: dict, t5: T5EncoderModel) -> None:
    t5.requires_grad_(True)
    try:
        assert not encode_prompt("a cat", **t5_parts).positive.requires_grad
    finally:
        t5.requires_grad_(False)


def test_the_dtype_is_the_encoders_then_the_unets_then_the_embeddings_own(t5_parts: dict) -> None:
    def dtypes(**call: Any) -> set[torch.dtype]:
        pair = encode_prompt(prompt_embeds=rows(1).half(), negative_prompt_embeds=rows(1).half(), **call)
        assert pair.negative is not None
        return {pair.positive.dtype, pair.negative.dtype}

    assert dtypes(**t5_parts, unet_dtype=torch.bfloat16) == {torch.float32}
    assert dtypes(unet_dtype=torch.bfloat16) == {torch.bfloat16}
    assert dtypes() == {torch.float16}


def test_embeddings_go_to_the_asked_device_and_else_stay_together(t5_parts: dict) -> None:
    pair = encode_prompt(prompt_embeds=rows(1), negative_prompt_embeds=rows(1), device="meta")
    assert {pair.positive.device.type, pair.negative.device.type if pair.negative is not None else ""} == {"meta"}
    assert embed(["a cat"], *t5_parts.values(), device="meta", dtype=torch.float16).dtype == torch.float16
    pair = encode_prompt(prompt_embeds=rows(1, tokens=4).to("meta"), **t5_parts)
    assert pair.negative is not None
    assert pair.negative.device.type == "meta"


@pytest.mark.parametrize(
    "missing", [{"text_encoder": None}, {"tokenizer": None}, {"text_encoder": None, "tokenizer": None}]
)
@pytest.mark.parametrize("said", [{"prompt": "a cat"}, {"prompt_embeds": rows(1)}])
@pytest.mark.parametrize("encode", [encode_prompt, encode_clip_prompt])
def test_a_text_without_its_reader_is_refused_with_a_way_out(
    encode: Any, said: dict[str, Any], missing: dict[str, Any], t5_parts: dict
) -> None:
    with pytest.raises(ValueError, match=r"text needs .*Pass prompt_embeds.*text_encoder"):
        encode(**said, **{**t5_parts, **missing})


def test_embeddings_alone_need_no_reader() -> None:
    assert encode_prompt(prompt_embeds=rows(1), do_classifier_free_guidance=False).negative is None
    assert encode_prompt(prompt_embeds=rows(1), negative_prompt_embeds=rows(1)).negative is not None


REFUSED = [
    ({"prompt": ["a", "b"], "negative_prompt": ["ugly"]}, "negative_prompt has 1 texts for 2 prompts"),
    ({"prompt": "a", "negative_prompt": ["ugly", "blurry"]}, "negative_prompt has 2 texts for 1 prompts"),
    ({"prompt": ["a", "b"], "negative_prompt_embeds": rows(1)}, "has 1 rows for 2 prompts"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be an int of at least 1, got 0"),
    ({"prompt": "a", "num_images_per_prompt": None}, "num_images_per_prompt must be .* got None"),
    ({"prompt": "a", "prompt_embeds": rows(1)}, "both given"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_a_request_that_cannot_be_met_is_refused(call: dict[str, Any], message: str, t5_parts: dict) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(**call, **t5_parts)


@pytest.mark.parametrize("clip_skip", [-1, 4])
def test_clip_skip_must_leave_a_state(clip_skip: int, clip_parts: dict) -> None:
    with pytest.raises(ValueError, match=rf"clip_skip must be in \[0, 3\], got {clip_skip}"):
        encode_clip_prompt("a cat", clip_skip=clip_skip, **clip_parts)


@pytest.mark.parametrize(("encode", "name", "limit"), [(encode_prompt, "T5", 77), (encode_clip_prompt, "CLIP", 20)])
def test_a_text_that_is_cut_is_named_in_one_warning(
    encode: Any,
    name: str,
    limit: int,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = request.getfixturevalue("t5_parts" if name == "T5" else "clip_parts")
    with caplog.at_level(logging.WARNING):
        encode(["a cat", LONG], **parts)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{name} reads {limit} tokens here")
    assert message.endswith("the end']")
    assert "cat" not in message


def test_a_text_of_just_the_limit_draws_no_warning(t5_parts: dict, caplog: pytest.LogCaptureFixture) -> None:
    length = len(t5_parts["tokenizer"](LONG)["input_ids"])
    with caplog.at_level(logging.WARNING):
        embed([LONG], *t5_parts.values(), max_length=length)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        embed([LONG], *t5_parts.values(), max_length=length - 1)
    assert len(caplog.records) == 1


def test_ids_and_mask_equal_those_of_a_tokenizer_that_cuts_and_pads_itself(
    t5_tokenizer: T5Tokenizer, clip_tokenizer: CLIPTokenizer
) -> None:
    texts = ["", "a cat", "the red dog holding a sign", LONG]
    for tokenizer in (t5_tokenizer, clip_tokenizer):
        for length in (2, 7, 20, 77):
            options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            expected = tokenizer(texts, **options)
            ids_BL, mask_BL = tokenize(texts, tokenizer, max_length=length, encoder_name="")
            assert torch.equal(ids_BL, expected.input_ids)
            assert torch.equal(mask_BL, expected.attention_mask)


def test_two_threads_may_share_a_tokenizer(t5_tokenizer: T5Tokenizer) -> None:
    def ids_of(length: int) -> Tensor:
        return tokenize(["the red dog " * length] * 20, t5_tokenizer, max_length=length, encoder_name="T5")[0]

    lengths = [8, 16, 32, 77] * 10
    quiet = {length: ids_of(length) for length in set(lengths)}
    with ThreadPoolExecutor(8) as pool:
        for length, ids_BL in zip(lengths, pool.map(ids_of, lengths), strict=True):
            assert torch.equal(ids_BL, quiet[length])


def test_a_tokenizer_without_padding_is_refused(t5_tokenizer: T5Tokenizer) -> None:
    tokenizer = copy.deepcopy(t5_tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        tokenize(["a cat"], tokenizer, max_length=8, encoder_name="T5")


def test_clip_reads_as_many_tokens_as_it_has_positions_when_the_tokenizer_names_no_limit(
    clip_parts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed_clip(["a cat"], *clip_parts.values())
    monkeypatch.setattr(clip_parts["tokenizer"], "model_max_length", 10**30)
    assert torch.equal(embed_clip(["a cat"], *clip_parts.values()), expected)
    assert expected.shape == (1, 20, 32)


def test_states_that_are_not_finite_are_refused(t5_tokenizer: T5Tokenizer, t5: T5EncoderModel) -> None:
    """A float16 that overflows, or weights that were read without their scales: every picture would be black."""
    broken = copy.deepcopy(t5)
    broken.encoder.final_layer_norm.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"not finite.*float32.*bfloat16"):
        embed(["a cat"], t5_tokenizer, broken)
