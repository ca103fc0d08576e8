"""What the stages share: a task, checked and encoded, becomes a picture.

B images  C channels  H height  W width  L text tokens  D text width  K all branches' images
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.conditioning import Conditioning, low_res_condition
from floyd.diffusion.engine import STOP, Moved, OnStep, denoise, moves
from floyd.diffusion.guidance import Guidance, Network, Predict
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Sampler
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.finish import Finished, Judge
from floyd.pipelines.options import Options, StageOptions, dtype_of, with_defaults
from floyd.store.layout import uncompiled
from floyd.text.prompts import PromptPair

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LowRes:
    """A super-resolution stage's input: the previous stage's picture, one for each image, and how much to noise it."""

    picture_BCHW: Tensor
    level: int
    schedule: NoiseSchedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One call: all of it checked, the text read, nothing painted."""

    options: Options
    text: PromptPair
    canvas: Canvas
    steps: tuple[Step, ...]
    sampler: Sampler
    low_res: LowRes | None = None
    start_BCHW: Tensor | None = None  # instead of a draw


@dataclass(frozen=True, eq=False)
class Chain:
    """Everything that `denoise` is handed."""

    x_BCHW: Tensor
    predict: Predict
    sampler: Sampler
    steps: tuple[Step, ...]
    canvas: Canvas
    noise: Noise

    def run(self, on_step: OnStep | None = None) -> Tensor:
        return denoise(self.x_BCHW, self.predict, self.sampler, self.steps, self.canvas, self.noise, on_step)

    def moves(self) -> Iterator[Moved]:
        """The same, one step at a time, for whoever wants to watch or to stop."""
        return moves(self.x_BCHW, self.predict, self.sampler, self.steps, self.canvas, self.noise)


class Painter(DiffusionPipeline):
    """A pipeline whose call is one stage: text and canvas in, pictures out."""

    draws_low_res_first: ClassVar[bool] = False  # the order of the draws is part of what a seed means

    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    watermarker: Any

    def task(self, **options: Unpack[StageOptions]) -> Task:
        """What a call with these arguments would paint; `watch` it, or stop it half-way."""
        return self._task(with_defaults(self.__call__, options))

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        raise NotImplementedError

    def watch(self, task: Task) -> Generator[Moved]:
        """Paint, one step at a time; closing the iterator stops. The last `x_BCHW` is for `finished`."""
        with self._placement.use(self.unet) as unet:
            yield from self._chain(task, unet).moves()

    @torch.no_grad()
    def finished(self, x_BCHW: Tensor) -> Finished:
        """What `watch` ended with as pictures, looked at by the safety checker."""
        return self._judge().look(x_BCHW)

    def _denoised(self, task: Task) -> Tensor:
        with self._placement.use(self.unet) as unet, self.progress_bar(total=len(task.steps)) as bar:
            return self._chain(task, unet).run(_reporter(task.options, bar.update))

    @torch.no_grad()
    def _chain(self, task: Task, unet: Any) -> Chain:
        """Draws the canvas, then the low-resolution picture's noise, or the reverse if the class says so."""
        noise = Noise(task.options.generator)
        if self.draws_low_res_first:
            extra = _low_res(task, noise)
            x_BCHW = _first(task, noise)
        else:
            x_BCHW = _first(task, noise)
            extra = _low_res(task, noise)
        positive, negative = (None if text is None else Conditioning(text, *extra) for text in task.text)
        assert positive is not None
        guidance = Guidance.classifier_free(positive, negative, task.options.guidance_scale)
        predict = guidance.predictor(network(unet, guidance.joined, task.options.cross_attention_kwargs))
        return Chain(x_BCHW, predict, task.sampler, task.steps, task.canvas, noise)

    def _judge(self) -> Judge:
        return Judge(self.safety_checker, self.feature_extractor, self.watermarker, self._placement)

    def _check_safety(self, requires_safety_checker: bool) -> None:
        """For constructors."""
        if self.safety_checker is not None and self.feature_extractor is None:
            raise ValueError(
                f"{type(self).__name__} was given a safety_checker but no feature_extractor, which prepares its "
                "pictures. Pass both, or safety_checker=None."
            )
        if self.safety_checker is None and requires_safety_checker:
            log.warning(
                "%s has no safety checker: its pictures are unfiltered. The licence of the IF weights asks for the "
                "filter wherever results reach the public; pass requires_safety_checker=False if this is intended.",
                type(self).__name__,
            )

    def _need(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"This {type(self).__name__} was built without its {name}, which the call needs.")

    def _size_multiple(self) -> int:
        """How often the network halves the picture."""
        levels: int = len(self.unet.config.block_out_channels)
        return 2 ** (levels - 1)

    def steps_for(self, options: Options, strength: float = 1.0) -> tuple[Sampler, tuple[Step, ...]]:
        """A sampler for this call, and the moves it will make."""
        if options.timesteps is not None:
            table, num_steps = self.scheduler.timesteps_for(timesteps=options.timesteps), None
        else:
            table, num_steps = self.scheduler.timesteps_for(options.num_inference_steps), options.num_inference_steps
        return self.scheduler.sampler(num_steps, eta=options.eta), self.scheduler.steps(table, strength)

    @property
    def noise_levels(self) -> int:
        """How many noise levels there are for the picture to enlarge; 0 where none is enlarged."""
        return 0


def _first(task: Task, noise: Noise) -> Tensor:
    if task.start_BCHW is not None:
        return task.start_BCHW
    return task.canvas.first(task.sampler.schedule, task.steps[0].t, noise)


def _low_res(task: Task, noise: Noise) -> tuple[Tensor, Tensor] | tuple[()]:
    if task.low_res is None:
        return ()
    size = task.canvas.picture_BCHW.shape[-2:]
    return low_res_condition(task.low_res.picture_BCHW, size, task.low_res.level, task.low_res.schedule, noise)


def network(unet: Any, told: Conditioning, attention: Mapping[str, Any] | None = None) -> Network:
    """The UNet as the engine calls it. The text is read once; x is cast to the network's precision at its border."""
    dtype = dtype_of(unet, told.text_BLD.dtype)
    text_BLD, level_B = told.text_BLD.to(dtype), told.noise_level_B

    is_ours = hasattr(type(uncompiled(unet)), "read")
    if is_ours and (attention or {}).get("scale", 1) != 1:
        log.warning("cross_attention_kwargs['scale'] is the weight of LoRA, of which this network has none.")
    if is_ours and not _is_compiled(unet):
        context = unet.read(text_BLD, level_B)
        return lambda x_KCHW, t, joined: unet.step(joined.takes(x_KCHW).to(dtype), _time(t, x_KCHW), context)

    extra: dict[str, Any] = {} if level_B is None else {"class_labels": level_B}
    if attention and not is_ours:
        extra["cross_attention_kwargs"] = dict(attention)

    def call(x_KCHW: Tensor, t: int, joined: Conditioning) -> Tensor:
        sample = joined.takes(x_KCHW).to(dtype)
        out: Tensor = unet(sample, _time(t, x_KCHW), encoder_hidden_states=text_BLD, return_dict=False, **extra)[0]
        return out

    return call


def _is_compiled(unet: Any) -> bool:
    """A compiled network must be called as it was compiled, whole; its methods would run the slow original."""
    return uncompiled(unet) is not unet or getattr(unet, "_compiled_call_impl", None) is not None


def _time(t: int, like: Tensor) -> Tensor:
    return torch.tensor(t, device=like.device)  # a tensor, so that a compiled network is not compiled for every number


def _reporter(options: Options, tick: Callable[[], Any]) -> OnStep:
    """The callback of the incumbent's signature, (i, t, x); returning STOP ends the chain."""
    places = count()

    def on_step(step: Step, x_BCHW: Tensor, clean_BCHW: Tensor) -> Any:
        tick()
        i = next(places)
        if options.callback is not None and i % options.callback_steps == 0:
            verdict = options.callback(i, step.t, x_BCHW)
            return STOP if verdict is STOP else None
        return None

    return on_step
