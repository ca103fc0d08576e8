"""How many steps and how much guidance: one value for all stages of a cascade, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

MOST_STAGES = 3

V = TypeVar("V", int | str, float)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Empty: the checkpoint's own, or else the stage's."""

    steps: tuple[int | str, ...] = ()  # a number, or the name of a table such as "fast27"
    guidance: tuple[float, ...] = ()

    @classmethod
    def parsed(cls, *, steps: str | None = None, guidance: str | None = None) -> Self:
        """From "50" or "50,20,12"."""
        return cls(
            steps=_parsed("steps", steps, _step, "a number, or a table's name such as fast27"),
            guidance=_parsed("guidance", guidance, float, "a number"),
        )

    def options(self, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The arguments that each of the stages is told; values for stages that do not run are left over."""
        options: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
        for stage, steps in _spread("steps", self.steps, stages).items():
            options[stage]["num_inference_steps" if isinstance(steps, int) else "timesteps"] = steps
        for stage, guidance in _spread("guidance", self.guidance, stages).items():
            options[stage]["guidance_scale"] = guidance
        return options


def merged(preset: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller says over what the checkpoint says; a number of steps is stronger than a stored table."""
    is_counted = "num_inference_steps" in told
    return {**{key: value for key, value in preset.items() if not (is_counted and key == "timesteps")}, **told}


def _step(text: str) -> int | str:
    return text if text[:1].isalpha() else int(text)


def _parsed(name: str, text: str | None, read: Callable[[str], V], kind: str) -> tuple[V, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    try:
        values = tuple(read(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{name} must be {kind}, or one for each stage as in 50,20,12; got {text!r}.") from error
    if len(values) > MOST_STAGES:
        raise ValueError(f"{name} takes at most {MOST_STAGES} values, one for each stage; got {text!r}.")
    return values


def _spread(name: str, values: tuple[V, ...], stages: Sequence[str]) -> dict[str, V]:
    if not values:
        return {}
    if len(values) == 1:
        return dict.fromkeys(stages, values[0])
    if len(values) < len(stages):
        given = ",".join(map(str, values))
        raise ValueError(f"{name} must be one value, or {len(stages)}, for {', '.join(stages)}; got {given}.")
    return dict(zip(stages, values, strict=False))
