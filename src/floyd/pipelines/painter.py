"""What the stages share: a task, checked and encoded, becomes a picture.

B images  C channels  H height  W width  L text tokens  D text width  K all branches' images
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor

from floyd.adapters.attached import heeds_calls
from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.engine import Moved
from floyd.diffusion.guidance import Guidance, Network, Predict
from floyd.diffusion.noise import Noise
from floyd.diffusion.repaint import repainting
from floyd.diffusion.samplers import Sampler
from floyd.diffusion.timesteps import Step
from floyd.engines.registry import AUTO, BEST, engine_for
from floyd.images.colors import with_colors_of
from floyd.pipelines.apart import Apart, each, predictor, steady
from floyd.pipelines.finish import Finished, Judge
from floyd.pipelines.lora import LoraPipeline
from floyd.pipelines.memory import Managed, first_line, make_room, restore, second_try, states_of
from floyd.pipelines.network import Networks, is_compiled, is_ours
from floyd.pipelines.options import Action, Options, StageOptions, check_interval, with_defaults
from floyd.pipelines.task import Chain, Task, first, low_res
from floyd.pipelines.timed import part_of, timed_network, timed_predict
from floyd.pipelines.watching import Interrupts, Watcher
from floyd.runtime.clock import in_part, passed_on
from floyd.runtime.profile import Profile
from floyd.store.layout import uncompiled
from floyd.text.prompts import PromptPair

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


class Painter(LoraPipeline, ABC):
    """A pipeline whose call is one stage: text and canvas in, pictures out.

    `max_rows` is how many rows of a batch the UNet is given at once, a picture with guidance being two; None is all.
    """

    draws_low_res_first: ClassVar[bool] = False  # the order of the draws is part of what a seed means
    more_output_types: ClassVar[tuple[str, ...]] = ()
    max_rows: int | None = None

    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    watermarker: Any

    def _register(self, components: Mapping[str, Any], **values: Any) -> None:
        super()._register(components, **values)
        self._interrupts = Interrupts()

    def task(self, **options: Unpack[StageOptions]) -> Task:
        """What a call with these arguments would paint; `watch` it, or stop it half-way."""
        arguments = with_defaults(self.__call__, options)
        with part_of(self, "other"), steady(arguments["batch_invariant"] is True):
            return self._task(arguments)

    @abstractmethod
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Paint: each pipeline names its arguments and their defaults here."""

    @abstractmethod
    def _task(self, arguments: Mapping[str, Any]) -> Task:
        """A call's arguments, all of them checked, as what is to be painted."""

    def watch(self, task: Task) -> Generator[Moved]:
        """Paint, one step at a time; closing the iterator stops. The last `x_BCHW` is for `finished`."""
        with part_of(self, "other"), self._interrupts.call() as end:
            states = states_of(task.options.generator)
            try:
                yield from passed_on(self._watched(task, end))
                return
            except torch.OutOfMemoryError as error:
                told = first_line(error)
            make_room(self, told)
            restore(task.options.generator, states)
            yield from passed_on(self._watched(task, end))  # from the first step on

    def _watched(self, task: Task, end: Event) -> Generator[Moved]:
        with self._placement.use(self.unet) as unet:
            for moved in self._chain(task, unet).moves():
                yield moved
                if end.is_set():
                    return

    @torch.no_grad()
    def finished(
        self,
        x_BCHW: Tensor,
        safety: Action = "black",
        *,
        before: Finished | None = None,
        batch_invariant: bool = False,
        colors_BCHW: Tensor | None = None,
    ) -> Finished:
        """What `watch` ended with as pictures, looked at by the safety checker.

        `before`: the same pictures before they were enlarged; what was unsafe then is treated as unsafe now.
        `colors_BCHW`: the task's.
        """

        def finish() -> Finished:
            pixels_BCHW = each(self.decode, x_BCHW) if batch_invariant else self.decode(x_BCHW)
            with steady(batch_invariant):
                pixels_BCHW = with_colors_of(colors_BCHW, pixels_BCHW)
                return self._judge(one_by_one=batch_invariant).look(pixels_BCHW, safety, before=before)

        with part_of(self, "other"):
            return second_try(self, finish)

    @torch.no_grad()
    def preview(
        self,
        clean_BCHW: Tensor,
        safety: Action = "black",
        *,
        before: Finished | None = None,
        colors_BCHW: Tensor | None = None,
    ) -> list[Image]:
        """Pictures of the "clean" that a callback is handed. What is unsafe is treated as in the end, but not told."""
        with part_of(self, "other"):
            pixels_BCHW = with_colors_of(colors_BCHW, self.decode(clean_BCHW))
            return self._judge().look(pixels_BCHW, safety, before=before, is_preview=True).pil()

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """From what is painted on to pixels."""
        return x_BCHW

    def use_engine(self, engine: str | None, **options: Any) -> None:
        """From now on run the UNet's steps by another engine, "winograd" or "openvino"; None: by the UNet itself.

        "auto" is the fastest that computes the same: "winograd" where it can run the network as it is at a call, or
        else the UNet itself. EngineError: the engine that was named cannot run here, or not this network, and nothing
        has changed.
        """
        self._need("unet")
        self._engine = None if engine is None else (engine, options, engine_for(engine, self.unet, **options))

    @property
    def engine(self) -> str | None:
        """The name of what would run the UNet's steps in its place, as things are."""
        if self._engine is None or self._running(self.unet) is self.unet:
            return None
        return BEST if self._engine[0] == AUTO else self._engine[0]

    def _running(self, unet: Any) -> Any:
        """What takes the UNet's place; made anew if the pipeline was given another UNet."""
        if self._engine is None:
            return unet
        name, options, made = self._engine
        is_compiled_instead = name == AUTO and (self.switches.compiled or is_compiled(unet))
        engine = None if is_compiled_instead else engine_for(name, unet, made, **options)
        if engine is None:
            return unet
        self._engine = (name, options, engine)
        return engine

    def profile(self, *, floor: bool = True) -> Profile:
        """Where the time goes: `with pipe.profile() as profile:`, calls, and after the block `print(profile)`."""
        return Profile(floor=floor)

    def interrupt(self) -> None:
        """End every call under way on this pipeline, from any thread, after the step it is at.

        A call so ended returns the clean picture predicted so far. Calls that begin later are not affected.
        """
        if not self._interrupts.end_all():
            log.info("Nothing is being painted by this %s: there is nothing to interrupt.", type(self).__name__)

    def compile(self) -> None:
        """Let the network's step be compiled at the next call: once, for all steps and prompts of one size.

        On the CPU by torch.compile; on CUDA the same, and recorded as a graph. Other devices are left as they are.
        """
        device = self._device_for(self.unet)
        self.switches = self.switches.when_compiled(device)
        if not self.switches.compiled:
            log.info("torch.compile is not worth its time on %s: nothing is compiled.", device.type)

    @property
    def _interrupt(self) -> bool:
        """The incumbent's switch: `pipe._interrupt = True` in a callback ends the call."""
        return self._interrupts.is_ending

    @_interrupt.setter
    def _interrupt(self, is_ending: bool) -> None:
        if is_ending:
            self.interrupt()

    def _run(self, arguments: Mapping[str, Any]) -> tuple[Task, Tensor]:
        """A call but for its end."""
        with self._interrupts.call() as end, steady(arguments["batch_invariant"] is True):
            task = self._task(arguments)
            return task, second_try(self, lambda: self._denoised(task, end), generators=task.options.generator)

    def _denoised(self, task: Task, end: Event) -> Tensor:
        with self._placement.use(self.unet) as unet, self.progress_bar(total=len(task.steps)) as bar:
            chain = self._chain(task, unet)
            watcher = Watcher(self, task.options, task.text, predict_for=chain.predict_for, tick=bar.update, end=end)
            return chain.run(watcher)

    @torch.no_grad()
    def _chain(self, task: Task, unet: Any) -> Chain:
        """Draws the canvas, then the low-resolution picture's noise, or the reverse if the class says so."""
        noise, is_apart = Noise(task.options.generator), task.options.batch_invariant
        unet = self._running(unet)
        with steady(is_apart):
            if self.draws_low_res_first:
                extra = low_res(task, noise)
                x_BCHW = first(task, noise)
            else:
                x_BCHW = first(task, noise)
                extra = low_res(task, noise)

        options, switches, timesteps = task.options, self.switches, [step.t for step in task.steps]

        @torch.no_grad()
        @in_part("prepare")
        def predict_for(text: PromptPair) -> Predict:
            networks = Networks.of(unet, switches, attention=options.cross_attention_kwargs)
            positive, negative = (None if own is None else Conditioning(own, *extra) for own in text)
            assert positive is not None
            guidance = Guidance.classifier_free(positive, negative, options.guidance_scale, options.guided_times)
            return timed_predict(guidance.over(timesteps, partial(self._predictor, networks, is_apart=is_apart)))

        sampler = Apart.of(task.sampler, len(x_BCHW)) if is_apart else task.sampler
        sampler = repainting(sampler, task.canvas)
        return Chain(x_BCHW, predict_for(task.text), sampler, task.steps, task.canvas, noise, predict_for)

    def _predictor(
        self, networks: Networks, guidance: Guidance, timesteps: Sequence[int], *, is_apart: bool
    ) -> Predict:
        networks = networks.at(timesteps)

        def told(conditioning: Conditioning, max_rows: int | None = None) -> Network:
            return timed_network(networks.told(conditioning, max_rows), networks.unet)

        if is_apart:
            return predictor(guidance, told)
        return guidance.predictor(told(guidance.joined, self.max_rows))

    def manage(self, memory: Managed) -> None:
        super().manage(memory)
        choice = memory.choice("unet")
        self.max_rows = None if choice is None else choice.max_rows

    def use_less(self, *, is_planned: bool) -> None:
        """After memory ran out: what the plan says now, and where there is none the smallest pieces."""
        if is_planned and self.memory is not None:
            self.manage(self.memory)
        else:
            self.max_rows = 1

    def _judge(self, *, one_by_one: bool = False) -> Judge:
        return Judge(self.safety_checker, self.feature_extractor, self.watermarker, self._placement, one_by_one)

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

    def _options(self, arguments: Mapping[str, Any]) -> Options:
        """A call's arguments, checked by themselves and against the components; no text is read, nothing drawn."""
        self._need("unet", "scheduler")
        options = Options.of(arguments)
        options.check_output_type(*self.more_output_types)
        options.check_device(self._device_for(self.unet))
        if options.reads_text:
            self._need("tokenizer", "text_encoder")
        if self.safety_checker is not None:
            self._need("feature_extractor")
        elif options.safety != "black":
            raise ValueError(
                f"safety={options.safety!r} needs a safety_checker, of which this {type(self).__name__} has none: "
                "load one, or leave safety out."
            )
        self._check_embeds(options)
        if options.lora_scale != 1 and is_ours(self.unet) and not self._heeds_calls():
            log.warning("cross_attention_kwargs['scale'] is the strength of LoRA, and none acts here: no effect.")
        return options

    def _heeds_calls(self) -> bool:
        """Whether LoRA acts on any network; all of them are asked, for that prepares them."""
        heeding = [heeds_calls(uncompiled(getattr(self, name))) for name in ("unet", "text_encoder")]
        return any(heeding)

    def _check_embeds(self, options: Options) -> None:
        """Given embeddings against the network that reads them, and against the text that will stand beside them."""
        config, width = self.unet.config, None
        for key in ("encoder_hid_dim", "cross_attention_dim"):
            width = getattr(config, key, None) if width is None else width
        given = {"prompt_embeds": options.prompt_embeds, "negative_prompt_embeds": options.negative_prompt_embeds}
        for name, embeds in given.items():
            if embeds is not None and isinstance(width, int) and embeds.shape[2] != width:
                raise ValueError(
                    f"{name} are {embeds.shape[2]} wide, this network reads {width}; make them with encode_prompt of "
                    "a pipeline that has the same text encoder."
                )
        negative = options.negative_prompt_embeds
        if options.prompt is not None and options.is_guided and negative is not None:
            tokens = self._num_tokens()
            if negative.shape[1] != tokens:
                raise ValueError(
                    f"negative_prompt_embeds have {negative.shape[1]} tokens, but a prompt is read as {tokens}."
                )

    @abstractmethod
    def _num_tokens(self) -> int:
        """As how many tokens a prompt is read."""

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
        check_interval(options.guidance_interval, self.scheduler.config.num_train_timesteps)
        if options.timesteps is not None:
            table, num_steps = self.scheduler.timesteps_for(timesteps=options.timesteps), None
        else:
            table, num_steps = self.scheduler.timesteps_for(options.num_inference_steps), options.num_inference_steps
        return self.scheduler.sampler(num_steps, eta=options.eta), self.scheduler.steps(table, strength)

    @property
    def noise_levels(self) -> int:
        """How many noise levels there are for the picture to enlarge; 0 where none is enlarged."""
        return 0
