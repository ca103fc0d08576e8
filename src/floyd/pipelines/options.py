"""The arguments that all pipelines' calls share, and the calls that are refused before any work is done."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict

import torch
from torch import Generator, Tensor

from floyd.text.checks import batch_size, check_prompts

OUTPUT_TYPES = ("pil", "np", "pt")


class CallOptions(TypedDict, total=False):
    """The same names as `Options`, for editors: a test keeps them equal."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    num_images_per_prompt: int
    num_inference_steps: int
    timesteps: Iterable[int] | str | None
    guidance_scale: float
    eta: float
    generator: Generator | list[Generator] | None
    output_type: str
    return_dict: bool
    callback: Callable[[int, int, Tensor], Any] | None
    callback_steps: int
    clean_caption: bool
    cross_attention_kwargs: dict[str, Any] | None


class StageOptions(CallOptions, total=False):
    """And what single stages take besides."""

    image: Any
    original_image: Any
    mask_image: Any
    strength: float
    height: int | None
    width: int | None
    noise_level: int
    latents: Tensor | None
    clip_skip: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What every stage may be told. The defaults of a stage are those of its `__call__`."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    num_images_per_prompt: int = 1
    num_inference_steps: int
    timesteps: Iterable[int] | str | None = None  # a table, or a respacing string of the original; wins over the number
    guidance_scale: float
    eta: float = 0.0
    generator: Generator | Sequence[Generator] | None = None
    output_type: str = "pil"
    return_dict: bool = True
    callback: Callable[[int, int, Tensor], Any] | None = None
    callback_steps: int = 1
    clean_caption: bool = True
    cross_attention_kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From a call's arguments, those of the single stages left out."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in names})

    def __post_init__(self) -> None:
        check_prompts(self.prompt, self.negative_prompt, self.prompt_embeds, self.negative_prompt_embeds)
        positive("callback_steps", self.callback_steps)
        positive("num_images_per_prompt", self.num_images_per_prompt)
        if not isinstance(self.guidance_scale, int | float) or not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale!r}.")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable with (i, t, x), got {type(self.callback).__name__}.")
        self._check_generators()
        self._check_attention()

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def num_prompts(self) -> int:
        return batch_size(self.prompt, self.prompt_embeds)

    @property
    def num_images(self) -> int:
        return self.num_prompts * self.num_images_per_prompt

    @property
    def reads_text(self) -> bool:
        """Whether a text encoder is needed at all."""
        return self.prompt is not None or (self.is_guided and self.negative_prompt_embeds is None)

    def check_output_type(self, *more: str) -> None:
        allowed = (*OUTPUT_TYPES, *more)
        if self.output_type not in allowed:
            raise ValueError(f"output_type must be one of {', '.join(allowed)}, got {self.output_type!r}.")

    def _check_generators(self) -> None:
        generator = self.generator
        if generator is None or isinstance(generator, Generator):
            return
        if not isinstance(generator, list | tuple) or not all(isinstance(g, Generator) for g in generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}.")
        if len(generator) not in (1, self.num_images):
            raise ValueError(
                f"Got {len(generator)} generators for {self.num_images} images "
                f"({self.num_prompts} prompts x {self.num_images_per_prompt}); pass one, or one per image."
            )

    def _check_attention(self) -> None:
        if unknown := set(self.cross_attention_kwargs or {}) - {"scale"}:
            raise ValueError(f"cross_attention_kwargs may hold 'scale', the weight of LoRA; got {sorted(unknown)}.")


def positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r} ({type(value).__name__}).")


def check_noise_level(level: Any, limit: int, name: str = "noise_level") -> int:
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < limit:
        raise ValueError(f"{name} must be an int in [0, {limit}), got {level!r}.")
    return level


def check_size(name: str, value: Any, multiple: int) -> int:
    """A side that the network can halve as often as it has levels."""
    positive(name, value)
    if value % multiple:
        below = value // multiple * multiple
        near = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise ValueError(f"{name} must be a multiple of {multiple} for this network, got {value}; {near} would do.")
    return int(value)


def with_defaults(call: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with every default filled in; a name it does not take is a TypeError."""
    signature = inspect.signature(call)
    if unknown := sorted(set(given) - set(signature.parameters)):
        owner = type(getattr(call, "__self__", call)).__name__
        raise TypeError(f"{owner} does not take {', '.join(unknown)}; it takes {', '.join(signature.parameters)}.")
    bound = signature.bind(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


def dtype_of(module: Any, default: torch.dtype = torch.float32) -> torch.dtype:
    dtype = getattr(module, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else default
