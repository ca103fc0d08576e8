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

    _check_embeds("prompt_embeds", prompt_embeds)
    _check_embeds("negative_prompt_embeds", negative_prompt_embeds)
    if prompt_embeds is None or negative_prompt_embeds is None:
        return
    if prompt_embeds.shape != negative_prompt_embeds.shape:
        raise ValueError(
            f"prompt_embeds and negative_prompt_embeds must have the same shape, got {tuple(prompt_embeds.shape)} "
            f"and {tuple(negative_prompt_embeds.shape)}."
        )


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


def _check_embeds(name: str, embeds: Any) -> None:
    if embeds is None:
        return
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_described(embeds)}.")
    if embeds.ndim != 3:
        raise ValueError(f"{name} must have the axes [prompts, tokens, width], got the shape {tuple(embeds.shape)}.")


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {' and '.join(kinds)}" if kinds else f"an empty {type(value).__name__}"
    return type(value).__name__
