"""How many steps, how much guidance and when: one value for all stages of a cascade, or one for each; and colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

MOST_STAGES = 3

Interval = tuple[int, int]
V = TypeVar("V", int | str, float, Interval)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Empty: the checkpoint's own, or else the stage's."""

    steps: tuple[int | str, ...] = ()  # a number, or the name of a table such as "fast27"
    guidance: tuple[float, ...] = ()
    guidance_interval: tuple[Interval, ...] = ()
    color_fix: bool | None = None  # for every stage that enlarges

    @classmethod
    def parsed(
        cls,
        *,
        steps: str | None = None,
        guidance: str | None = None,
        guidance_interval: str | None = None,
        color_fix: bool | None = None,
    ) -> Self:
        """From "50" or "50,20,12"; intervals from "200-800" or "200-800,0-1000,0-1000"."""
        return cls(
            steps=_parsed("steps", steps, _step, "a number, or a table's name such as fast27", "50,20,12"),
            guidance=_parsed("guidance", guidance, float, "a number", "7,4,1.5"),
            guidance_interval=_parsed(
                "guidance_interval", guidance_interval, _interval, "two timesteps as in 200-800", "200-800,0-600,0-1000"
            ),
            color_fix=color_fix,
        )

    def options(self, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The arguments that each of the stages is told; values for stages that do not run are left over."""
        options: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
        for stage, steps in _spread("steps", self.steps, stages).items():
            options[stage]["num_inference_steps" if isinstance(steps, int) else "timesteps"] = steps
        for stage, guidance in _spread("guidance", self.guidance, stages).items():
            options[stage]["guidance_scale"] = guidance
        for stage, interval in _spread("guidance_interval", self.guidance_interval, stages).items():
            options[stage]["guidance_interval"] = interval
        for stage in stages[1:] if self.color_fix is not None else ():
            options[stage]["color_fix"] = self.color_fix
        return options


def _step(text: str) -> int | str:
    return text if text[:1].isalpha() else int(text)


def _interval(text: str) -> Interval:
    low, high = (int(part) for part in text.split("-"))
    return low, high


def said(interval: Interval) -> str:
    """As `Settings.parsed` reads it."""
    return f"{interval[0]}-{interval[1]}"


def _parsed(name: str, text: str | None, read: Callable[[str], V], kind: str, several: str) -> tuple[V, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    try:
        values = tuple(read(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{name} must be {kind}, or one for each stage as in {several}; got {text!r}.") from error
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
