"""What the six pipelines of IF share: three of stage I, three of stage II.

B images  C channels  H height  W width
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.images.resize import resize_short_side
from floyd.pipelines.options import Options, check_noise_level, check_size, dtype_of
from floyd.pipelines.output import IFPipelineOutput
from floyd.pipelines.painter import LowRes, Painter, Task
from floyd.pipelines.pictures import masks, pictures
from floyd.text.prompts import PromptPair, encode_prompt

log = logging.getLogger(__name__)

ROUNDING = 8  # of the longer side of a given picture, or the network's own multiple where that is larger


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
    ) -> tuple[Tensor, Tensor | None]:
        """The prompt's and the negative prompt's embeddings, to be passed to all stages; T5 can then be deleted.

        `clean_caption` is off here and on in the call, as in the incumbent: encoded here, a prompt is only lower-cased.
        """
        with self._placement.use(self.text_encoder) as text_encoder:
            pair = encode_prompt(
                prompt,
                tokenizer=self.tokenizer,
                text_encoder=text_encoder,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                do_classifier_free_guidance=do_classifier_free_guidance,
                num_images_per_prompt=num_images_per_prompt,
                clean_caption=clean_caption,
                device=self._device_for(self.unet, self.text_encoder) if device is None else device,
                unet_dtype=None if self.unet is None else dtype_of(self.unet),
            )
        return pair.positive, pair.negative

    def _call(self, arguments: Mapping[str, Any]) -> IFPipelineOutput | tuple[Any, Any, Any]:
        task = self._task(arguments)
        done = self.finished(self._denoised(task))
        output = IFPipelineOutput(done.images(task.options.output_type), done.nsfw, done.watermarked)
        if task.options.return_dict:
            return output
        return output.images, output.nsfw_detected, output.watermark_detected

    def _options(self, arguments: Mapping[str, Any]) -> Options:
        self._need("unet", "scheduler")
        options = Options.of(arguments)
        options.check_output_type()
        if options.reads_text:
            self._need("tokenizer", "text_encoder")
        return options

    def _prepared(
        self, options: Options, canvas: Canvas, *, strength: float = 1.0, low_res: LowRes | None = None
    ) -> Task:
        """The end of every `_task`: only here, after all checks, is the text read."""
        sampler, steps = self.steps_for(options, strength)
        for name, side in zip(("height", "width"), canvas.picture_BCHW.shape[-2:], strict=True):
            check_size(name, side, self._size_multiple())
        text = PromptPair(*self.encode_prompt(**self._text_of(options)))
        return Task(options=options, text=text, canvas=canvas, steps=steps, sampler=sampler, low_res=low_res)

    def _text_of(self, options: Options) -> dict[str, Any]:
        return {
            "prompt": options.prompt,
            "do_classifier_free_guidance": options.is_guided,
            "num_images_per_prompt": options.num_images_per_prompt,
            "negative_prompt": options.negative_prompt,
            "prompt_embeds": options.prompt_embeds,
            "negative_prompt_embeds": options.negative_prompt_embeds,
            "clean_caption": options.clean_caption,
        }

    @property
    def _channels(self) -> int:
        return int(self.unet.config.in_channels)

    def _blank(self, options: Options, height: int | None, width: int | None) -> Canvas:
        side = self.unet.config.sample_size
        multiple = self._size_multiple()
        rows = check_size("height", side if height is None else height, multiple)
        columns = check_size("width", side if width is None else width, multiple)
        device = self._device_for(self.unet)
        return Canvas.blank(options.num_images, rows, columns, self._channels, device=device)

    def _painted(self, image: Any, options: Options, name: str) -> Canvas:
        """A given picture as canvas; PIL pictures are brought to the stage's size."""
        x_BCHW = pictures(image, options, name=name, resize=self._resize())
        return Canvas(x_BCHW.to(self._device_for(self.unet)))

    def _masked(self, image: Any, mask_image: Any, options: Options, name: str) -> Canvas:
        canvas = self._painted(image, options, name)
        mask_B1HW = masks(mask_image, options, canvas.picture_BCHW.shape[-2:], resize=self._resize())
        return Canvas(canvas.picture_BCHW, mask_B1HW=mask_B1HW.to(canvas.picture_BCHW.device))

    def _resize(self) -> Callable[[Any], Any]:
        multiple = max(ROUNDING, self._size_multiple())
        return partial(resize_short_side, side=self.unet.config.sample_size, multiple=multiple)


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

    def _low_res(self, image: Any, options: Options, noise_level: int) -> LowRes:
        level = check_noise_level(noise_level, self.noise_levels)
        x_BCHW = pictures(image, options).to(self._device_for(self.unet))
        return LowRes(x_BCHW, level, self.image_noising_scheduler.schedule)

    @property
    def noise_levels(self) -> int:
        return len(self.image_noising_scheduler.schedule)

    def _enlarged_size(self, low_res_BCHW: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        """The sides of the result; where none is given, the picture's shape is kept."""
        side, multiple = self.unet.config.sample_size, self._size_multiple()
        rows, columns = low_res_BCHW.shape[-2:]
        if height is not None and width is not None:
            return height, width
        if rows == columns:
            return height or side, width or side
        short = min(rows, columns)
        own_height, own_width = (_nearest(side * length / short, multiple) for length in (rows, columns))
        return height or own_height, width or own_width


def _nearest(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple
