"""Which combinations of prompts and ready-made embeddings make sense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

Texts: TypeAlias = str | Sequence[str]


def check_prompts(
    prompt: Texts | None,
    negative_prompt: Texts | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless the four say one thing each, once."""
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("prompt and prompt_embeds were both given; pass only one of them.")
    if prompt is None and prompt_embeds is None:
        raise ValueError("Neither prompt nor prompt_embeds was given; pass one of them.")
    if prompt is not None and not _is_texts(prompt):
        raise ValueError(f"prompt must be a str or a non-empty list of str, got {_described(prompt)}.")

    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("negative_prompt and negative_prompt_embeds were both given; pass only one of them.")
    if negative_prompt is not None and not _is_texts(negative_prompt):
        raise TypeError(f"negative_prompt must be a str or a non-empty list of str, got {_described(negative_prompt)}.")

    _check_letters("prompt", prompt)
    _check_letters("negative_prompt", negative_prompt)

    _check_embeds("prompt_embeds", prompt_embeds)
    _check_embeds("negative_prompt_embeds", negative_prompt_embeds)
    given = [embeds for embeds in (prompt_embeds, negative_prompt_embeds) if embeds is not None]
    if len({embeds.shape for embeds in given}) > 1:
        raise ValueError(
            f"prompt_embeds and negative_prompt_embeds must have the same shape, got {tuple(given[0].shape)} "
            f"and {tuple(given[1].shape)}."
        )
    _check_counts(batch_size(prompt, prompt_embeds), negative_prompt, negative_prompt_embeds)


def batch_size(prompt: Texts | None, prompt_embeds: Tensor | None) -> int:
    """How many prompts there are, before any is repeated for several images."""
    if prompt_embeds is not None:
        return prompt_embeds.shape[0]
    if prompt is None:
        raise ValueError("Neither prompt nor prompt_embeds was given; pass one of them.")
    return 1 if isinstance(prompt, str) else len(prompt)


def _is_texts(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _check_letters(name: str, texts: Texts | None) -> None:
    """Half of a surrogate pair is no letter, and no tokenizer can read it."""
    for text in [texts] if isinstance(texts, str) else texts or ():
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} holds half of a surrogate pair, which is no letter: {text!r}. Leave it out.")


def _check_embeds(name: str, embeds: Any) -> None:
    if embeds is None:
        return
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_described(embeds)}.")
    if not embeds.is_floating_point():
        raise TypeError(f"{name} must hold floats, as encode_prompt gives them, got {embeds.dtype}.")
    if embeds.ndim != 3:
        raise ValueError(f"{name} must have the axes [prompts, tokens, width], got the shape {tuple(embeds.shape)}.")
    if 0 in embeds.shape:
        raise ValueError(f"{name} is empty: its shape is {tuple(embeds.shape)}.")
    if not embeds.is_meta and not bool(embeds.isfinite().all()):
        raise ValueError(f"{name} must be finite numbers; some are not. Did the text encoder run in float16?")


def _check_counts(count: int, negative_prompt: Texts | None, negative_prompt_embeds: Tensor | None) -> None:
    """One negative text may hold for all prompts; a list has one for each."""
    if isinstance(negative_prompt, str) or negative_prompt is None:
        given = count if negative_prompt_embeds is None else len(negative_prompt_embeds)
        if given != count:
            raise ValueError(f"negative_prompt_embeds has {given} rows for {count} prompts; pass one for each.")
    elif len(negative_prompt) != count:
        raise ValueError(
            f"negative_prompt has {len(negative_prompt)} texts for {count} prompts; pass one for each, or one str for "
            "all."
        )


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {' and '.join(kinds)}" if kinds else f"an empty {type(value).__name__}"
    return type(value).__name__
