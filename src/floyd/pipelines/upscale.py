"""Stage III: from 256 px to 1024 px with the x4 upscaler, a latent model.

The loop is the same as that of the other stages; what it paints on are latents, decoded at the end. The low-resolution
picture enters at its own size, noised, beside the latents.

B images  C channels  H height  W width  Z latent channels  h, w of the latent
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor

from floyd.adapters.attached import heeds_calls
from floyd.adapters.calls import call_scale
from floyd.diffusion.canvas import Canvas
from floyd.engines.registry import Decoder, decoder_for, engine_names
from floyd.models.vae import AutoencoderKL
from floyd.pipelines.apart import steady
from floyd.pipelines.finish import Finished
from floyd.pipelines.memory import Managed
from floyd.pipelines.options import (
    Action,
    Options,
    StepEnd,
    check_noise_level,
    check_size,
    dtype_of,
    finite,
    lora_scale,
    truth,
)
from floyd.pipelines.output import StableDiffusionPipelineOutput
from floyd.pipelines.painter import Painter
from floyd.pipelines.pictures import pictures
from floyd.pipelines.task import LowRes, Task
from floyd.pipelines.timed import decoding, part_of
from floyd.runtime.sleeping import wake
from floyd.text.prompts import PromptPair, clip_tokens, encode_clip_prompt

if TYPE_CHECKING:
    from floyd.images.convert import Pictures

__all__ = ["StableDiffusionPipelineOutput", "StableDiffusionUpscalePipeline"]

log = logging.getLogger(__name__)

SCALING_FACTOR = (
    0.08333  # of the latents; early copies of the checkpoint do not say it, and the incumbent knows no other
)


class StableDiffusionUpscalePipeline(Painter):
    """Four times the side of a picture, guided by a prompt that CLIP reads."""

    component_names: ClassVar[tuple[str, ...]] = (
        "vae",
        "text_encoder",
        "tokenizer",
        "unet",
        "low_res_scheduler",
        "scheduler",
        "safety_checker",
        "feature_extractor",
        "watermarker",
    )
    optional_components: ClassVar[frozenset[str]] = frozenset({"safety_checker", "feature_extractor", "watermarker"})
    value_names: ClassVar[tuple[str, ...]] = ("max_noise_level",)
    draws_low_res_first: ClassVar[bool] = True
    more_output_types: ClassVar[tuple[str, ...]] = ("latent",)

    vae: Any
    text_encoder: Any
    tokenizer: Any
    low_res_scheduler: Any
    _decoder: Decoder | None = None  # what the engine has for the VAE

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        low_res_scheduler: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        watermarker: Any = None,
        max_noise_level: int = 350,
    ) -> None:
        self._register(locals(), max_noise_level=max_noise_level)
        self._check_safety(requires_safety_checker=False)
        factor = SCALING_FACTOR if vae is None else vae.config.scaling_factor
        if factor != SCALING_FACTOR:
            log.warning("The VAE's scaling_factor is %s; stage III uses %s all the same.", factor, SCALING_FACTOR)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        batch_invariant: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """CLIP's embeddings of the prompt and the negative prompt. The argument order is the incumbent's."""
        scale = 1.0 if lora_scale is None else finite("lora_scale", lora_scale)
        if scale != 1 and not heeds_calls(self.text_encoder):
            log.warning("lora_scale is the strength of LoRA, and none acts on the text encoder: no effect.")
        lending = self._lent_encoder(
            prompt_embeds, negative_prompt_embeds, is_guided=do_classifier_free_guidance, is_steady=batch_invariant
        )
        with part_of(self, "text"), lending as lent, steady(batch_invariant), call_scale(scale):
            pair = encode_clip_prompt(
                prompt,
                tokenizer=self.tokenizer,
                text_encoder=lent.encoder,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                do_classifier_free_guidance=do_classifier_free_guidance,
                num_images_per_prompt=num_images_per_prompt,
                clip_skip=clip_skip,
                device=self._device_for(self.unet, self.text_encoder) if device is None else device,
                unet_dtype=None if self.unet is None else dtype_of(self.unet),
                one_by_one=batch_invariant,
                recall=lent.recall,
            )
        return pair.positive, pair.negative

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Tensor], Any] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
        color_fix: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple[Any, Any]:
        """Enlarge four times.

        `image`: PIL pictures, arrays in [0, 1] or tensors in [-1, 1], one for each prompt. `noise_level` in
        [0, max_noise_level]: how much noise to add to it; more leaves more to invent. `latents`: start from these
        instead of noise. `output_type`: "pil", "np", "pt" (both in [0, 1]) or "latent" (not decoded). `clip_skip`:
        leave out so many of CLIP's last layers. `color_fix` needs pixels, so no "latent". The others are described at
        the head of `floyd.pipelines.deepfloyd_if`.
        """
        with part_of(self, "other"):
            return self._call(locals())

    def _call(self, arguments: Mapping[str, Any]) -> StableDiffusionPipelineOutput | tuple[Any, Any]:
        task, x_BZhw = self._run(arguments)
        options = task.options
        if options.output_type == "latent" and self.safety_checker is None:
            output = StableDiffusionPipelineOutput(x_BZhw)
        else:
            told: dict[str, Any] = {"batch_invariant": options.batch_invariant, "colors_BCHW": task.colors}
            done = self.finished(x_BZhw, options.safety, **told)
            output = StableDiffusionPipelineOutput(
                _images(x_BZhw, done, options.output_type),
                done.nsfw,
                watermark_detected=done.watermarked,
                nsfw_scores=done.nsfw_scores,
                watermark_scores=done.watermark_scores,
            )
        return output if options.return_dict else (output.images, output.nsfw_content_detected)

    def enable_vae_tiling(self, *, side: int = 128) -> None:
        """Decode large pictures in overlapping tiles of `side` latents, four times as many pixels."""
        self._need("vae")
        self.vae.enable_tiling(side=side)

    def disable_vae_tiling(self) -> None:
        self._need("vae")
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode one picture of a batch at a time."""
        self._need("vae")
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._need("vae")
        self.vae.disable_slicing()

    def manage(self, memory: Managed) -> None:
        super().manage(memory)
        choice = memory.choice("vae")
        if choice is not None and self.vae is not None:
            self.vae.tile_side, self.vae.is_sliced = choice.way.tile, choice.max_rows == 1

    def use_less(self, *, is_planned: bool) -> None:
        super().use_less(is_planned=is_planned)
        if not is_planned and isinstance(self.vae, AutoencoderKL):
            self.vae.is_sliced = True
            self.vae.tile_side = min(self.vae.tile_side or 128, 128)

    def use_engine(self, engine: str | None, **options: Any) -> None:
        """From now on run the UNet's steps, and with "winograd" the VAE's decoder, by another engine; None: by neither.

        "auto" is "winograd" for each of both where it runs. EngineError: the engine that was named cannot run here, or
        not these networks, and nothing has changed.
        """
        decoder = None
        if engine is not None and engine in engine_names() and isinstance(self.vae, AutoencoderKL):
            decoder = decoder_for(engine, self.vae)
        super().use_engine(engine, **options)
        self._decoder = decoder

    @torch.no_grad()
    def decode(self, x_BZhw: Tensor) -> Tensor:
        """Latents to pixels, [-1, 1] and a little beyond. A VAE that overflows in float16 works in float32."""
        self._need("vae")
        overflows = dtype_of(self.vae) == torch.float16 and self.vae.config.force_upcast
        if overflows:
            wake(self.vae)
        vae = deepcopy(self.vae).float() if overflows else self.vae  # the component itself never changes
        with part_of(self, "vae", count=1), self._placement.use(vae) as ready:
            z_BZhw = (x_BZhw / SCALING_FACTOR).to(self._placement.device_of(ready), dtype_of(ready))
            decoding(ready, z_BZhw)
            by = self._decoder_of(ready)
            if by is None and self.switches.channels_last:
                z_BZhw = z_BZhw.contiguous(memory_format=torch.channels_last)
            x_BCHW: Tensor = (ready.decode(z_BZhw) if by is None else ready.decode(z_BZhw, by=by)).sample
        return x_BCHW.float()

    def _decoder_of(self, vae: Any) -> Decoder | None:
        """What the engine that runs the UNet has for the VAE; None: the VAE decodes itself."""
        if self._engine is None or not isinstance(vae, AutoencoderKL):
            return None
        decoder = decoder_for(self._engine[0], vae, self._decoder)
        self._decoder = decoder or self._decoder
        return decoder

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        self._need("vae", "low_res_scheduler")
        options = self._options(arguments)
        low_res = self._low_res(arguments["image"], options, arguments["noise_level"], arguments["color_fix"])
        sampler, steps = self.steps_for(options)
        device = low_res.picture_BCHW.device
        height, width = low_res.picture_BCHW.shape[-2:]
        canvas = Canvas.blank(options.num_images, height, width, self.vae.config.latent_channels, device=device)
        self.check_clip_skip(arguments["clip_skip"])
        start_BZhw = _start(arguments["latents"], canvas.picture_BCHW)
        self._check_channels(canvas.picture_BCHW.shape[1] + low_res.picture_BCHW.shape[1])
        positive, negative = self.encode_prompt(
            options.prompt,
            num_images_per_prompt=options.num_images_per_prompt,
            do_classifier_free_guidance=options.is_guided,
            negative_prompt=options.negative_prompt,
            prompt_embeds=options.prompt_embeds,
            negative_prompt_embeds=options.negative_prompt_embeds,
            lora_scale=self.text_lora_scale(options.cross_attention_kwargs),
            clip_skip=arguments["clip_skip"],
            batch_invariant=options.batch_invariant,
        )
        return Task(
            options=options,
            text=PromptPair(positive, negative),
            canvas=canvas,
            steps=steps,
            sampler=sampler,
            low_res=low_res,
            start_BCHW=start_BZhw,
        )

    def text_lora_scale(self, attention: Mapping[str, Any] | None) -> float | None:
        """A call's strength of LoRA as `encode_prompt` is told it: not at all where CLIP has none."""
        return lora_scale(attention) if heeds_calls(self.text_encoder) else None

    def _num_tokens(self) -> int:
        return clip_tokens(self.tokenizer, self.text_encoder)

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Before any text is read, and also if none will be."""
        if clip_skip is None:
            return
        if not isinstance(clip_skip, int) or isinstance(clip_skip, bool):
            raise TypeError(f"clip_skip must be an int or None, got {clip_skip!r}.")
        layers = None if self.text_encoder is None else self.text_encoder.config.num_hidden_layers
        if clip_skip < 0 or (layers is not None and clip_skip > layers):
            raise ValueError(f"clip_skip must be in [0, {'...' if layers is None else layers}], got {clip_skip}.")

    def _low_res(self, image: Any, options: Options, noise_level: int, color_fix: bool) -> LowRes:
        truth("color_fix", color_fix)
        if color_fix and options.output_type == "latent":
            raise ValueError('color_fix changes pixels, and output_type="latent" has none: leave one of them out.')
        level = check_noise_level(noise_level, self.noise_levels)
        x_BCHW = pictures(image, options)
        for side, length in zip(("height", "width"), x_BCHW.shape[2:], strict=True):
            check_size(f"The {side} of image", length)
        if isinstance(image, Tensor) and bool((x_BCHW >= 0).all()):
            log.warning(
                "image is a tensor without a negative value. Tensors are read as [-1, 1]: if this one is in [0, 1], "
                "pass 2 * image - 1."
            )
        return LowRes(x_BCHW.to(self._device_for(self.unet)), level, self.low_res_scheduler.schedule, color_fix)

    @property
    def factor(self) -> int:
        """How many times larger a picture becomes: a latent covers so many pixels."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def noise_levels(self) -> int:
        return min(int(self.config.max_noise_level) + 1, len(self.low_res_scheduler.schedule))

    def _check_channels(self, channels: int) -> None:
        wanted = self.unet.config.in_channels
        if channels != wanted:
            raise ValueError(
                f"The UNet reads {wanted} channels, but latents and picture have {channels}: "
                "unet and vae are not of one upscaler."
            )


def _images(x_BZhw: Tensor, done: Finished, output_type: str) -> Any:
    """What the caller asked for; latents of a hidden picture are zeros, "pt" is in [0, 1] here."""
    if output_type == "latent":
        hidden_B111 = torch.tensor(done.hidden, device=x_BZhw.device).view(-1, 1, 1, 1)
        return x_BZhw.masked_fill(hidden_B111, 0.0)
    return done.unit() if output_type == "pt" else done.images(output_type)


def _start(latents: Tensor | None, blank_BZhw: Tensor) -> Tensor | None:
    if latents is None:
        return None
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents must be a tensor of floats, got {getattr(latents, 'dtype', type(latents).__name__)}.")
    if latents.shape != blank_BZhw.shape:
        raise ValueError(f"latents must have the shape {list(blank_BZhw.shape)}, got {list(latents.shape)}.")
    if not bool(latents.isfinite().all()):
        raise ValueError("latents must be finite numbers; some of these are not.")
    return latents.to(blank_BZhw)
