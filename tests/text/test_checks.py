"""What may be said together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from floyd.text.checks import batch_size, check_prompts

EMBEDS = torch.zeros(2, 77, 8)

ALLOWED: list[dict[str, Any]] = [
    {"prompt": "a cat"},
    {"prompt": ""},
    {"prompt": ["a cat", "a dog"]},
    {"prompt": ["a cat", "a dog"], "negative_prompt": "ugly"},
    {"prompt": "a cat", "negative_prompt": ["ugly"]},
    {"prompt": "a cat", "negative_prompt_embeds": EMBEDS[:1]},
    {"prompt": ["a cat", "a dog"], "negative_prompt": ["ugly", ""]},
    {"prompt": "a 🐈 cat"},
    {"prompt_embeds": EMBEDS},
    {"prompt_embeds": EMBEDS, "negative_prompt": "ugly"},
    {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS},
]

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "Neither"),
    ({"negative_prompt": "ugly"}, ValueError, "Neither"),
    ({"prompt": "a cat", "prompt_embeds": EMBEDS}, ValueError, "both given"),
    ({"prompt": 3}, ValueError, "str or a non-empty list of str, got int"),
    ({"prompt": []}, ValueError, "an empty list"),
    ({"prompt": ["a cat", None]}, ValueError, "a list of NoneType and str"),
    ({"prompt": "a cat", "negative_prompt": 3}, TypeError, "negative_prompt must be a str"),
    (
        {"prompt": "a cat", "negative_prompt": "ugly", "negative_prompt_embeds": EMBEDS},
        ValueError,
        "negative_prompt and negative_prompt_embeds",
    ),
    ({"prompt_embeds": [[0.0]]}, TypeError, "prompt_embeds must be a torch.Tensor"),
    ({"prompt_embeds": EMBEDS[0]}, ValueError, r"\[prompts, tokens, width\], got the shape \(77, 8\)"),
    ({"prompt": "a cat", "negative_prompt_embeds": EMBEDS[0]}, ValueError, "negative_prompt_embeds must have the axes"),
    (
        {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:1]},
        ValueError,
        r"same shape, got \(2, 77, 8\) and \(1, 77, 8\)",
    ),
    ({"prompt": "a cat", "negative_prompt_embeds": EMBEDS}, ValueError, "has 2 rows for 1 prompts"),
    ({"prompt": ["a", "b"], "negative_prompt": ["ugly"]}, ValueError, "negative_prompt has 1 texts for 2 prompts"),
    ({"prompt_embeds": EMBEDS[:0]}, ValueError, r"prompt_embeds is empty: its shape is \(0, 77, 8\)"),
    ({"prompt_embeds": EMBEDS.long()}, TypeError, "prompt_embeds must hold floats.*got torch.int64"),
    ({"prompt_embeds": EMBEDS * float("nan")}, ValueError, "prompt_embeds must be finite"),
    ({"prompt": "a \ud83d cat"}, ValueError, "prompt holds half of a surrogate pair"),
    ({"prompt": "a", "negative_prompt": ["\udc08"]}, ValueError, "negative_prompt holds half of a surrogate pair"),
]


@pytest.mark.parametrize("said", ALLOWED, ids=lambda said: "+".join(said))
def test_a_clear_request_is_allowed(said: dict[str, Any]) -> None:
    check_prompts(**{"prompt": None, **said})


@pytest.mark.parametrize(("said", "error", "message"), REFUSED)
def test_an_unclear_request_is_refused_with_its_reason(
    said: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_prompts(**{"prompt": None, **said})


def test_a_batch_counts_prompts_or_rows_of_embeddings() -> None:
    assert batch_size("a cat", None) == 1
    assert batch_size(["a cat", "a dog", ""], None) == 3
    assert batch_size(None, EMBEDS) == 2
    with pytest.raises(ValueError, match="Neither"):
        batch_size(None, None)
