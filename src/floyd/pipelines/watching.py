"""Looking over the painter's shoulder: callbacks after each step, and an end that comes from another thread.

B images  C channels  H height  W width  L text tokens  D text width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from floyd.diffusion.engine import STOP, Change, Verdict
from floyd.diffusion.guidance import Predict
from floyd.diffusion.timesteps import Step
from floyd.pipelines.options import CHAIN_NAMES, Options
from floyd.text.prompts import PromptPair


class Interrupts:
    """The calls under way on one pipeline. Each has an end of its own: none outlasts its call."""

    def __init__(self) -> None:
        self._ends: set[Event] = set()
        self._lock = Lock()

    @contextmanager
    def call(self) -> Iterator[Event]:
        """Set from outside, the event asks the call within the block to come to its end."""
        end = Event()
        with self._lock:
            self._ends.add(end)
        try:
            yield end
        finally:
            with self._lock:
                self._ends.discard(end)

    def end_all(self) -> int:
        """Ask every call under way to end; returns how many there are."""
        with self._lock:
            for end in self._ends:
                end.set()
            return len(self._ends)

    @property
    def is_ending(self) -> bool:
        with self._lock:
            return any(end.is_set() for end in self._ends)


class Watcher:
    """What `denoise` calls after each step of one call: the progress bar, the callbacks, the interrupt."""

    def __init__(
        self,
        pipeline: Any,
        options: Options,
        text: PromptPair,
        *,
        predict_for: Callable[[PromptPair], Predict],
        tick: Callable[[], Any],
        end: Event,
    ) -> None:
        self._pipeline, self._options = pipeline, options
        self._text = text  # as the network reads it now
        self._predict_for, self._tick, self._end = predict_for, tick, end
        self._places = count()

    def __call__(self, step: Step, x_BCHW: Tensor, clean_BCHW: Tensor) -> Change | Verdict | None:
        self._tick()
        i = next(self._places)
        change = self._changed(i, step.t, x_BCHW, clean_BCHW)
        if isinstance(change, Change) and change.x_BCHW is not None:
            x_BCHW = change.x_BCHW
        callback = self._options.callback
        if callback is not None and i % self._options.callback_steps == 0 and callback(i, step.t, x_BCHW) is STOP:
            return STOP
        return STOP if self._end.is_set() else change

    def _changed(self, i: int, t: int, x_BCHW: Tensor, clean_BCHW: Tensor) -> Change | Verdict | None:
        """What `callback_on_step_end` says; it is handed copies, so only what it returns counts."""
        callback = self._options.callback_on_step_end
        if callback is None:
            return None
        now = {
            **dict.fromkeys(CHAIN_NAMES, x_BCHW),
            "clean": clean_BCHW,
            "prompt_embeds": self._text.positive,
            "negative_prompt_embeds": self._text.negative,
        }
        asked = {name: now[name] for name in self._options.tensor_inputs}
        answer = callback(self._pipeline, i, t, {name: None if x is None else x.clone() for name, x in asked.items()})
        if answer is None or answer is STOP:
            return answer
        returned = _checked(answer, asked)
        return Change(x_BCHW=_chain(returned), predict=self._reread(returned))

    def _reread(self, returned: Mapping[str, Tensor]) -> Predict | None:
        """The network with the text that came back; None if it is what the network reads already."""
        positive = returned.get("prompt_embeds", self._text.positive)
        negative = returned.get("negative_prompt_embeds", self._text.negative)
        if _same(positive, self._text.positive) and _same(negative, self._text.negative):
            return None
        self._text = PromptPair(positive, negative)
        return self._predict_for(self._text)


def _checked(answer: Any, asked: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors of an answer, each of the shape it had, in the precision and place it had."""
    if not isinstance(answer, Mapping):
        raise TypeError(
            "callback_on_step_end must return a dict of the tensors to go on with, None to change nothing or STOP to "
            f"end the chain, got {type(answer).__name__}."
        )
    if unknown := sorted(str(name) for name in answer if name not in asked):
        raise ValueError(
            f"callback_on_step_end returned {', '.join(unknown)}, which it did not ask for: name it in "
            f"callback_on_step_end_tensor_inputs, now {', '.join(asked) or 'empty'}."
        )
    returned = {}
    for name, value in answer.items():
        given = asked[name]
        if given is None and value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"callback_on_step_end returned {name} as {type(value).__name__}; it must be a tensor.")
        if given is None:
            raise ValueError(f"callback_on_step_end returned {name}, of which a call without guidance has none.")
        if value.shape != given.shape:
            raise ValueError(
                f"callback_on_step_end returned {name} of shape {list(value.shape)}; it must keep {list(given.shape)}."
            )
        returned[name] = value.detach().to(given)
    clean = asked.get("clean")
    if "clean" in returned and not _same(returned["clean"], clean):
        raise ValueError(f"callback_on_step_end changed clean, which is only to be read; change {CHAIN_NAMES[0]}.")
    return returned


def _chain(returned: Mapping[str, Tensor]) -> Tensor | None:
    return next((returned[name] for name in CHAIN_NAMES if name in returned), None)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
