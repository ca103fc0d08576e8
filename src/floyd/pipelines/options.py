"""The arguments that all pipelines' calls share, and the calls that are refused before any work is done."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, Self, TypedDict, get_args

import torch
from torch import Generator, Tensor

from floyd.text.checks import batch_size, check_prompts

OUTPUT_TYPES = ("pil", "np", "pt")
MAX_SIDE = 4096  # of a canvas; more is likelier a slip than a wish, and no memory is large enough

Action = Literal["black", "blur", "flag", "raise"]  # what is done with a picture that looks unsafe
ACTIONS: tuple[Action, ...] = get_args(Action)

StepEnd = Callable[[Any, int, int, dict[str, Tensor | None]], Any]
CHAIN_NAMES = ("x", "latents")  # what is painted on: our word, and the incumbent's in all its pipelines
TENSOR_INPUTS = (*CHAIN_NAMES, "clean", "prompt_embeds", "negative_prompt_embeds")


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
    callback_on_step_end: StepEnd | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    safety: Action
    batch_invariant: bool
    guidance_interval: Sequence[int] | None


class StageOptions(CallOptions, total=False):
    """And what single stages take besides."""

    image: Any
    original_image: Any
    mask_image: Any
    strength: float
    height: int | None
    width: int | None
    noise_level: int
    color_fix: bool
    latents: Tensor | None
    clip_skip: int | None
    feather: int
    resamples: int


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
    callback_on_step_end: StepEnd | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    safety: Action = "black"
    batch_invariant: bool = False
    guidance_interval: Sequence[int] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From a call's arguments, those of the single stages left out."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in names})

    def __post_init__(self) -> None:
        check_prompts(self.prompt, self.negative_prompt, self.prompt_embeds, self.negative_prompt_embeds)
        positive("callback_steps", self.callback_steps)
        positive("num_images_per_prompt", self.num_images_per_prompt)
        if self.timesteps is None:
            positive("num_inference_steps", self.num_inference_steps)
        finite("guidance_scale", self.guidance_scale)
        check_interval(self.guidance_interval)
        if not 0 <= finite("eta", self.eta) <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}.")
        truth("return_dict", self.return_dict)
        truth("clean_caption", self.clean_caption)
        truth("batch_invariant", self.batch_invariant)
        if self.safety not in ACTIONS:
            raise ValueError(f"safety must be one of {', '.join(ACTIONS)}, got {self.safety!r}.")
        self._check_generators()
        self._check_attention()
        self._check_callbacks()

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def guided_times(self) -> range | None:
        """The timesteps of training at which there is guidance; None is all."""
        return None if self.guidance_interval is None else range(*self.guidance_interval)

    @property
    def lora_scale(self) -> float:
        """How many times as strongly LoRA acts in this call."""
        return lora_scale(self.cross_attention_kwargs)

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

    @property
    def tensor_inputs(self) -> tuple[str, ...]:
        """What `callback_on_step_end` is handed; a callback object of the incumbent's says it itself."""
        return tuple(getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs))

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

    def check_device(self, device: torch.device) -> None:
        """A generator on an accelerator cannot draw for another; one on the CPU serves all."""
        generators = self.generator if isinstance(self.generator, Sequence) else [self.generator]
        for generator in generators:
            if generator is not None and generator.device.type not in ("cpu", device.type):
                raise ValueError(
                    f"generator lies on {generator.device.type}, the network on {device.type}; make it with "
                    f"torch.Generator({device.type!r}), or on the CPU, which serves every device."
                )

    def _check_attention(self) -> None:
        told = {} if self.cross_attention_kwargs is None else self.cross_attention_kwargs
        if not isinstance(told, Mapping):
            raise TypeError(f"cross_attention_kwargs must be a dict, got {type(told).__name__}.")
        if unknown := set(told) - {"scale"}:
            raise ValueError(
                f"cross_attention_kwargs may hold 'scale', the weight of LoRA; got {', '.join(map(repr, unknown))}."
            )
        finite("cross_attention_kwargs['scale']", told.get("scale", 1))

    def _check_callbacks(self) -> None:
        wanted = {"callback": "(i, t, x)", "callback_on_step_end": "(pipeline, i, t, callback_kwargs)"}
        for name, signature in wanted.items():
            if (given := getattr(self, name)) is not None and not callable(given):
                raise TypeError(f"{name} must be callable with {signature}, got {type(given).__name__}.")
        name, names = "callback_on_step_end_tensor_inputs", self.callback_on_step_end_tensor_inputs
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"{name} must be a list of names, got {names!r}.")
        if unknown := [given for given in self.tensor_inputs if given not in TENSOR_INPUTS]:
            raise ValueError(
                f"{name} may hold {', '.join(TENSOR_INPUTS)}; got {', '.join(str(given) for given in unknown)}."
            )
        if len(set(CHAIN_NAMES) & set(self.tensor_inputs)) > 1:
            raise ValueError(f"{name}: {' and '.join(CHAIN_NAMES)} are two names of one tensor; ask for one of them.")


def lora_scale(attention: Mapping[str, Any] | None) -> float:
    """What `cross_attention_kwargs` says of LoRA."""
    return float((attention or {}).get("scale", 1))


def positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r} ({type(value).__name__}).")


def finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_noise_level(level: Any, limit: int, name: str = "noise_level") -> int:
    if isinstance(level, bool) or not isinstance(level, Integral) or not 0 <= int(level) < limit:
        raise ValueError(f"{name} must be an int in [0, {limit}), got {level!r}.")
    return int(level)


def check_interval(value: Any, limit: int | None = None) -> None:
    """The timesteps of training from the first number on and below the second; what `limit` is, a scheduler knows."""
    if value is None:
        return
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if is_pair and all(isinstance(t, Integral) and not isinstance(t, bool) for t in value):
        low, high = value
        if 0 <= low < high and (limit is None or high <= limit):
            return
    raise ValueError(
        "guidance_interval must be None or two whole timesteps of training, (low, high) with 0 <= low < high"
        f"{'' if limit is None else f' <= {limit}'}; got {value!r}."
    )


def check_size(name: str, value: Any, largest: int = MAX_SIDE) -> int:
    """Any number of pixels that a canvas may have along one side."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= largest:
        raise ValueError(f"{name} must be a number of pixels in [1, {largest}], an int; got {value!r}.")
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
