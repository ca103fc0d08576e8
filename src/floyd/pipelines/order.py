"""What one call of a cascade asks for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from floyd.pipelines.options import ACTIONS, Action, Options, check_noise_level, positive, truth, with_defaults
from floyd.pipelines.painter import Painter
from floyd.pipelines.sizes import Sides
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.text.checks import check_prompts

# Arguments of the stages that are not a caller's to set in `options` or a checkpoint's to set in its presets.
_OURS = frozenset(
    {
        "prompt",
        "negative_prompt",
        "prompt_embeds",
        "negative_prompt_embeds",
        "num_images_per_prompt",
        "image",
        "generator",
    }
    | {"output_type", "return_dict", "callback", "callback_steps", "clean_caption", "latents", "height", "width"}
    | {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "safety", "batch_invariant"}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """A call, checked."""

    prompt: str
    negative_prompt: str | None
    clean_caption: bool
    seeds: tuple[int, ...]
    stages: Mapping[str, Mapping[str, Any]]  # the arguments of each stage that runs, without text and picture
    sizes: Mapping[str, Sides]
    free_text_encoder: bool
    safety: Action
    batch_invariant: bool

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise TypeError(f"{name} of a cascade is one str, got {type(text).__name__}.")
        check_prompts(self.prompt, self.negative_prompt)
        truth("clean_caption", self.clean_caption)
        truth("free_text_encoder", self.free_text_encoder)
        truth("batch_invariant", self.batch_invariant)


def arguments_of(
    stages: Mapping[str, Painter],
    presets: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    *,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """What each of the named stages is told, checked."""
    options = {} if options is None else options
    if not isinstance(options, Mapping) or not all(isinstance(told, Mapping) for told in options.values()):
        raise TypeError(f"options must be a dict of dicts, by stage, got {options!r}.")
    if unknown := set(options) - set(stages):
        raise ValueError(f"options are by stage, {', '.join(stages)}; got {', '.join(map(str, unknown))}.")
    steps_of = _by_stage("steps", steps, names, len(stages))
    guidance_of = _by_stage("guidance", guidance, names, len(stages))
    is_one = isinstance(guidance_interval, list | tuple) and any(isinstance(t, Integral) for t in guidance_interval)
    interval_of = _by_stage("guidance_interval", guidance_interval, names, len(stages), is_one=is_one)
    arguments = {}
    for name in names:
        told = _steps(steps_of[name])
        told |= _present(guidance_scale=guidance_of[name], guidance_interval=interval_of[name])
        told |= dict(options.get(name, {}))
        arguments[name] = checked(name, stages[name], merged(presets.get(name, {}), told))
    return arguments


def checked(name: str, stage: Painter, told: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse, before anything runs, what the stage would refuse."""
    if own := set(told) & _OURS:
        raise ValueError(f"{', '.join(sorted(own))} of {name} is what the cascade itself decides.")
    options = Options.of({**with_defaults(stage.__call__, told), "prompt": ""})
    stage.steps_for(options)
    if (level := told.get("noise_level")) is not None:
        check_noise_level(level, stage.noise_levels, f"noise_level of {name}")
    truth(f"color_fix of {name}", told.get("color_fix", False))
    if isinstance(stage, StableDiffusionUpscalePipeline):
        stage.check_clip_skip(told.get("clip_skip"))
    return dict(told)


def checked_safety(safety: Action, stages: Mapping[str, Painter]) -> Action:
    """`stages`: those that run."""
    if safety not in ACTIONS:
        raise ValueError(f"safety must be one of {', '.join(ACTIONS)}, got {safety!r}.")
    if safety != "black" and all(stage.safety_checker is None for stage in stages.values()):
        raise ValueError(f"safety={safety!r} needs a safety_checker, which none of {', '.join(stages)} has.")
    return safety


def seeds_of(seed: Any, count: Any) -> tuple[int, ...]:
    """One for each image."""
    positive("count", count)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) < 0:
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}.")
    return tuple(int(seed) + i for i in range(count))


def _by_stage(name: str, value: Any, names: Sequence[str], num_stages: int, *, is_one: bool = False) -> dict[str, Any]:
    """One value for all stages, or one for each; a list is one if that `is_one`."""
    if is_one or not isinstance(value, list | tuple):
        return dict.fromkeys(names, value)
    if len(value) not in (len(names), num_stages):
        raise ValueError(
            f"{name} must be one value or {len(names)}, one for each of {', '.join(names)}; got {value!r}."
        )
    return dict(zip(names, value, strict=False))


def merged(preset: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller said over what the checkpoint says; a number of steps is stronger than a stored table."""
    if "num_inference_steps" in told:
        preset = {key: value for key, value in preset.items() if key != "timesteps"}
    return {**preset, **told}


def _steps(value: Any) -> dict[str, Any]:
    """A number, a respacing string or a table, as the stages name them."""
    if value is None:
        return {}
    if isinstance(value, Integral):
        positive("steps", value)
        return {"num_inference_steps": int(value)}
    if not isinstance(value, str | Sequence):
        raise TypeError(f"steps must be a number, a respacing string or a sequence of them by stage, got {value!r}.")
    return {"timesteps": value}


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
