"""What the six pipelines of IF share: three of stage I, three of stage II.

B images  C channels  H height  W width
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from floyd.adapters.calls import call_scale
from floyd.adapters.tokens import FILE_NAME, read_rows
from floyd.diffusion.canvas import Canvas
from floyd.diffusion.repaint import NoisedCanvas, by_the_table, resampled
from floyd.images.composite import each, size_of
from floyd.images.mask import softened
from floyd.images.resize import resize_short_side, short_side_size
from floyd.pipelines.apart import steady
from floyd.pipelines.finish import Finished
from floyd.pipelines.keeping import Kept
from floyd.pipelines.options import MAX_SIDE, Options, check_noise_level, check_size, dtype_of, truth
from floyd.pipelines.output import IFInpaintingOutput, IFPipelineOutput
from floyd.pipelines.painter import Painter
from floyd.pipelines.pictures import masks, pictures
from floyd.pipelines.task import LowRes, Task
from floyd.pipelines.timed import part_of
from floyd.text.prompts import T5_TOKENS, PromptPair, encode_prompt
from floyd.text.tokens import teach

log = logging.getLogger(__name__)

ROUNDING = 8  # of the longer side of a PIL picture, as in the incumbent


class IFStage(Painter):
    """T5 embeddings and a canvas in, pixels out."""

    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "unet",
        "scheduler",
        "safety_checker",
        "feature_extractor",
        "watermarker",
    )
    optional_components: ClassVar[frozenset[str]] = frozenset(
        {"tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"}
    )
    value_names: ClassVar[tuple[str, ...]] = ("requires_safety_checker",)

    tokenizer: Any
    text_encoder: Any

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        watermarker: Any,
        requires_safety_checker: bool = True,
    ) -> None:
        self._register(locals(), requires_safety_checker=requires_safety_checker)
        self._check_safety(requires_safety_checker)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clean_caption: bool = False,
        *,
        batch_invariant: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The prompt's and the negative prompt's embeddings, to be passed to all stages; T5 can then be deleted.

        `clean_caption` is off here and on in the call, as in the incumbent: encoded here, a prompt is only lower-cased.
        """
        lending = self._lent_encoder(
            prompt_embeds, negative_prompt_embeds, is_guided=do_classifier_free_guidance, is_steady=batch_invariant
        )
        with part_of(self, "text"), lending as lent, steady(batch_invariant):
            pair = encode_prompt(
                prompt,
                tokenizer=self.tokenizer,
                text_encoder=lent.encoder,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                do_classifier_free_guidance=do_classifier_free_guidance,
                num_images_per_prompt=num_images_per_prompt,
                clean_caption=clean_caption,
                device=self._device_for(self.unet, self.text_encoder) if device is None else device,
                unet_dtype=None if self.unet is None else dtype_of(self.unet),
                one_by_one=batch_invariant,
                recall=lent.recall,
            )
        return pair.positive, pair.negative

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | Mapping[str, Tensor],
        token: str | None = None,
        *,
        weight_name: str = FILE_NAME,
    ) -> list[str]:
        """Give the tokenizer and the text encoder words that were learned (arXiv:2208.01618); they are returned.

        From a file, a folder, a repository of the hub or a state dict {token: embedding}; `token` renames the only one.
        Whoever shares these components knows the words, too.
        """
        self._need("tokenizer", "text_encoder")
        rows = read_rows(pretrained_model_name_or_path, token=token, weight_name=weight_name)
        teach(self.tokenizer, self.text_encoder, rows)
        return list(rows)

    def _call(self, arguments: Mapping[str, Any]) -> IFPipelineOutput | tuple[Any, Any, Any]:
        with part_of(self, "other"):
            task, x_BCHW = self._run(arguments)
            safety, is_steady = task.options.safety, task.options.batch_invariant
            done = self.finished(x_BCHW, safety, batch_invariant=is_steady, colors_BCHW=task.colors)
            with steady(is_steady):
                output = _output(task, done)
        if task.options.return_dict:
            return output
        return output.images, output.nsfw_detected, output.watermark_detected

    def _num_tokens(self) -> int:
        return T5_TOKENS

    def _prepared(
        self,
        options: Options,
        canvas: Canvas,
        *,
        strength: float = 1.0,
        low_res: LowRes | None = None,
        kept: Kept | None = None,
        resamples: int = 1,
    ) -> Task:
        """The end of every `_task`: only here, after all checks, is the text read."""
        sampler, steps = self.steps_for(options, strength)
        steps = resampled(steps, resamples)
        canvas = canvas.widened(self._size_multiple())
        if resamples > 1:
            sampler, canvas = by_the_table(sampler), NoisedCanvas.of(canvas)
        with call_scale(options.lora_scale):
            text = PromptPair(*self.encode_prompt(**self._text_of(options)))
        return Task(options=options, text=text, canvas=canvas, steps=steps, sampler=sampler, low_res=low_res, kept=kept)

    def _text_of(self, options: Options) -> dict[str, Any]:
        return {
            "prompt": options.prompt,
            "do_classifier_free_guidance": options.is_guided,
            "num_images_per_prompt": options.num_images_per_prompt,
            "negative_prompt": options.negative_prompt,
            "prompt_embeds": options.prompt_embeds,
            "negative_prompt_embeds": options.negative_prompt_embeds,
            "clean_caption": options.clean_caption,
            "batch_invariant": options.batch_invariant,
        }

    @property
    def _channels(self) -> int:
        return int(self.unet.config.in_channels)

    def _blank(self, options: Options, height: int | None, width: int | None) -> Canvas:
        side = self.unet.config.sample_size
        rows = check_size("height", side if height is None else height)
        columns = check_size("width", side if width is None else width)
        device = self._device_for(self.unet)
        return Canvas.blank(options.num_images, rows, columns, self._channels, device=device)

    def _painted(self, image: Any, options: Options, name: str) -> Canvas:
        """A given picture as canvas; PIL pictures are brought to the stage's size."""
        x_BCHW = pictures(image, options, name=name, resize=self._resize(name))
        _check_sides(name, x_BCHW.shape[3], x_BCHW.shape[2])
        return Canvas(x_BCHW.to(self._device_for(self.unet)))

    def _masked(self, arguments: Mapping[str, Any], options: Options, name: str) -> tuple[Canvas, Kept]:
        """The canvas of an inpainting, and what will be put back; a mask is as large as the picture, or is made so."""
        image, mask_image, feather = (arguments[key] for key in (name, "mask_image", "feather"))
        picture_BCHW = self._painted(image, options, name).picture_BCHW
        size = (picture_BCHW.shape[2], picture_BCHW.shape[3])
        if not isinstance(feather, int) or isinstance(feather, bool) or not 0 <= feather <= min(size):
            raise ValueError(
                f"feather must be a number of pixels in [0, {min(size)}], an int; got {feather!r}. It is counted at "
                "the size of this stage."
            )
        given = sorted({size_of(picture) for picture in each(image)})
        mask_B1HW = masks(mask_image, options, size, shapes=given, resize=self._resize("mask_image"))
        soft_B1HW = softened(mask_B1HW, feather) if feather else None
        canvas = Canvas(picture_BCHW, mask_B1HW=mask_B1HW, soft_B1HW=soft_B1HW)
        return canvas, Kept.of(image, mask_image, canvas)

    def _resize(self, name: str) -> Callable[[Any], Any]:
        side = self.unet.config.sample_size

        def resize(picture: Any) -> Any:
            _check_sides(name, *short_side_size(picture.width, picture.height, side, multiple=ROUNDING))
            return resize_short_side(picture, side, multiple=ROUNDING)

        return resize


class IFSuperResolutionStage(IFStage):
    """The same, with a small picture to enlarge."""

    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "unet",
        "scheduler",
        "image_noising_scheduler",
        "safety_checker",
        "feature_extractor",
        "watermarker",
    )

    image_noising_scheduler: Any

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        scheduler: Any,
        image_noising_scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        watermarker: Any,
        requires_safety_checker: bool = True,
    ) -> None:
        self._register(locals(), requires_safety_checker=requires_safety_checker)
        self._check_safety(requires_safety_checker)
        channels = None if unet is None else unet.config.in_channels
        if channels not in (None, 6):
            log.warning(
                "%s enlarges pictures, which takes a network of 6 input channels; this one has %s. Is it a stage I?",
                type(self).__name__,
                channels,
            )

    @property
    def _channels(self) -> int:
        return int(self.unet.config.in_channels) // 2

    def _options(self, arguments: Mapping[str, Any]) -> Options:
        self._need("image_noising_scheduler")
        return super()._options(arguments)

    def _low_res(self, image: Any, options: Options, noise_level: int, *, color_fix: bool = False) -> LowRes:
        truth("color_fix", color_fix)
        level = check_noise_level(noise_level, self.noise_levels)
        x_BCHW = pictures(image, options).to(self._device_for(self.unet))
        return LowRes(x_BCHW, level, self.image_noising_scheduler.schedule, color_fix)

    @property
    def noise_levels(self) -> int:
        return len(self.image_noising_scheduler.schedule)

    def _enlarged_size(self, low_res_BCHW: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        """The sides of the result: the picture's shape, unless both are given; the network's size unless one is."""
        rows, columns = low_res_BCHW.shape[-2:]
        if height is not None:
            check_size("height", height)
        if width is not None:
            check_size("width", width)
        if height is None and width is None:
            factor = self.unet.config.sample_size / min(rows, columns)
        else:
            factor = width / columns if height is None else height / rows  # type: ignore[operator]
        own_height, own_width = (max(1, round(length * factor)) for length in (rows, columns))
        if max(own_height, own_width) > MAX_SIDE and (height is None or width is None):
            raise ValueError(
                f"image is {columns}x{rows} px (width x height), which would become {own_width}x{own_height}; a side "
                f"may have {MAX_SIDE} px at most. Pass height and width, or another picture."
            )
        return height or own_height, width or own_width


def _check_sides(name: str, width: int, height: int) -> None:
    check_size(f"The width of {name} at this stage", width)
    check_size(f"The height of {name} at this stage", height)


def _output(task: Task, done: Finished) -> IFPipelineOutput:
    kind, kept = task.options.output_type, task.kept
    told: dict[str, Any] = {
        "nsfw_detected": done.nsfw,
        "watermark_detected": done.watermarked,
        "nsfw_scores": done.nsfw_scores,
        "watermark_scores": done.watermark_scores,
    }
    if kept is None:
        return IFPipelineOutput(done.images(kind), **told)
    return IFInpaintingOutput(kept.images(done, kind), **told, enlarged=partial(kept.full_size, done, kind))
