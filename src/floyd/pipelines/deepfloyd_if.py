"""The pipelines of DeepFloyd IF: text to image, image to image and inpainting, each in two stages.

A class says what its task is: which canvas, which low-resolution picture, how many steps. How it is painted is the same
for all. The arguments of every call, in the incumbent's order:

    prompt, negative_prompt                  a text or a list; `prompt_embeds`, `negative_prompt_embeds` instead
    image, original_image                    PIL pictures of any mode and size, which are brought to the stage's size;
                                             arrays [B, H, W, C] or [H, W, C] in [0, 1] and tensors [B, C, H, W] or
                                             [C, H, W] in [-1, 1], which keep theirs; uint8 is in 0..255
    mask_image                               white, 1 or True where to repaint, from one half on: PIL pictures, arrays
                                             or tensors [H, W] or [B, H, W]; of the picture's shape, at any size
    num_inference_steps, timesteps           a number of steps, or a table (`fast27_timesteps`) or respacing string
    guidance_scale                           how far to go from the negative prompt to the prompt; 1 or less: not at all
    strength                                 in (0, 1]: how much of the noise to add to a given picture, and to remove
    noise_level                              in [0, 1000): how much noise to add to the picture that is enlarged
    num_images_per_prompt                    images of one prompt stand beside each other
    height, width                            any number of pixels; the network's own size unless given. An enlarged
                                             picture keeps the shape of the small one unless both are given
    eta                                      for DDIM: 0 draws no noise, 1 as much as DDPM
    generator                                one for all, or a list of one per image, which makes images independent
    output_type                              "pil", "np" (in [0, 1]) or "pt" (in [-1, 1], what the next stage takes)
    return_dict                              False: a tuple
    callback, callback_steps                 called as (i, t, x) at every so many steps; returning STOP ends the chain
    clean_caption                            clean the prompt as the captions of the training data were
    cross_attention_kwargs                   {"scale": weight of LoRA}

and, by name alone, what the incumbent does not take:

    callback_on_step_end                     called as (pipe, i, t, tensors) after every step; what it returns of them
                                             is gone on with, None changes nothing, STOP ends the chain
    callback_on_step_end_tensor_inputs       which: "x" (or "latents"), "clean" (the picture x is heading for, which
                                             `pipe.preview` shows), "prompt_embeds", "negative_prompt_embeds"
    safety                                   what is done with a picture that the safety checker finds unsafe: "black",
                                             "blur", "flag" (nothing but telling) or "raise"
    batch_invariant                          every bit of an image depends on its own prompt and draws alone, not on the
                                             rest of the batch or the number of threads: all networks see one image and
                                             one branch of the guidance at a time, on one CPU thread (calls at the same
                                             time keep theirs); a batch takes as long as its images one by one
    guidance_interval                        (low, high): guide only at timesteps of training from low on and below
                                             high, of 1000, the largest the noisiest; at others a step is half the work.
                                             Without guidance there is nothing that it could restrict
    color_fix                                large areas get their colours from the picture that is enlarged, edges and
                                             texture stay the network's (StableSR); super-resolution without a mask
    feather                                  over so many pixels, at the size of the stage, what is repainted fades in
                                             from the edge of what is kept; inpainting alone
    resamples                                1: what is kept stays clean at every noise level; more: it is noised like
                                             the rest, and every step is made so many times (RePaint); inpainting alone

A network halves its picture several times. What does not divide is painted on a canvas that is a little larger, whose
margin is cut off in the end. What an inpainting keeps is the given picture's to the last bit, at the size of the stage
in `images` and at the picture's own size in `full_size()` of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor

from floyd.diffusion.timesteps import TABLES
from floyd.models.safety import IFSafetyChecker
from floyd.models.watermark import IFWatermarker
from floyd.pipelines.if_stages import IFStage, IFSuperResolutionStage
from floyd.pipelines.options import Action, StepEnd
from floyd.pipelines.output import IFPipelineOutput
from floyd.pipelines.task import Task

if TYPE_CHECKING:
    from floyd.images.convert import Pictures
    from floyd.images.mask import Mask

__all__ = [
    "IFImg2ImgPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingPipeline",
    "IFInpaintingSuperResolutionPipeline",
    "IFPipeline",
    "IFPipelineOutput",
    "IFSafetyChecker",
    "IFSuperResolutionPipeline",
    "IFWatermarker",
    "fast27_timesteps",
    "smart27_timesteps",
    "smart50_timesteps",
    "smart100_timesteps",
    "smart185_timesteps",
    "super27_timesteps",
    "super40_timesteps",
    "super100_timesteps",
]

# Lists, as scripts expect them.
fast27_timesteps = list(TABLES["fast27"])
smart27_timesteps = list(TABLES["smart27"])
smart50_timesteps = list(TABLES["smart50"])
smart100_timesteps = list(TABLES["smart100"])
smart185_timesteps = list(TABLES["smart185"])
super27_timesteps = list(TABLES["super27"])
super40_timesteps = list(TABLES["super40"])
super100_timesteps = list(TABLES["super100"])

Texts = str | list[str] | None
Generators = Generator | list[Generator] | None
Callback = Callable[[int, int, Tensor], Any]
Result = IFPipelineOutput | tuple[Any, Any, Any]


class IFPipeline(IFStage):
    """Stage I: from a prompt to a picture of 64 px."""

    def __call__(
        self,
        prompt: Texts = None,
        num_inference_steps: int = 100,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
    ) -> Result:
        """Paint. The arguments are described at the head of `floyd.pipelines.deepfloyd_if`."""
        return self._call(locals())

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        options = self._options(arguments)
        return self._prepared(options, self._blank(options, arguments["height"], arguments["width"]))


class IFImg2ImgPipeline(IFStage):
    """Stage I, starting from a picture: a variation of it, at 64 px on its short side."""

    def __call__(
        self,
        prompt: Texts = None,
        image: Pictures | None = None,
        strength: float = 0.7,
        num_inference_steps: int = 80,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 10.0,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
    ) -> Result:
        """Repaint. The arguments are described at the head of `floyd.pipelines.deepfloyd_if`."""
        return self._call(locals())

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        options = self._options(arguments)
        canvas = self._painted(arguments["image"], options, "image")
        return self._prepared(options, canvas, strength=arguments["strength"])


class IFInpaintingPipeline(IFStage):
    """Stage I, repainting the white part of a mask, at 64 px on the picture's short side."""

    def __call__(
        self,
        prompt: Texts = None,
        image: Pictures | None = None,
        mask_image: Mask | list[Mask] | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
        feather: int = 0,
        resamples: int = 1,
    ) -> Result:
        """Repaint within the mask. The arguments are described at the head of `floyd.pipelines.deepfloyd_if`."""
        return self._call(locals())

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        options = self._options(arguments)
        canvas, kept = self._masked(arguments, options, "image")
        return self._prepared(
            options, canvas, strength=arguments["strength"], kept=kept, resamples=arguments["resamples"]
        )


class IFSuperResolutionPipeline(IFSuperResolutionStage):
    """Stage II: from 64 px to 256 px."""

    def __call__(
        self,
        prompt: Texts = None,
        height: int | None = None,
        width: int | None = None,
        image: Pictures | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 4.0,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        noise_level: int = 250,
        clean_caption: bool = True,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
        color_fix: bool = False,
    ) -> Result:
        """Enlarge. The arguments are described at the head of `floyd.pipelines.deepfloyd_if`."""
        return self._call(locals())

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        options = self._options(arguments)
        image, level, color_fix = (arguments[name] for name in ("image", "noise_level", "color_fix"))
        low_res = self._low_res(image, options, level, color_fix=color_fix)
        size = self._enlarged_size(low_res.picture_BCHW, arguments["height"], arguments["width"])
        return self._prepared(options, self._blank(options, *size), low_res=low_res)


class IFImg2ImgSuperResolutionPipeline(IFSuperResolutionStage):
    """Stage II of a variation: from 64 px to 256 px, starting from the original picture."""

    def __call__(
        self,
        image: Pictures,
        original_image: Pictures | None = None,
        strength: float = 0.8,
        prompt: Texts = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 4.0,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        noise_level: int = 250,
        clean_caption: bool = True,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
        color_fix: bool = False,
    ) -> Result:
        """Enlarge a variation. The arguments are described at the head of `floyd.pipelines.deepfloyd_if`."""
        return self._call(locals())

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        options = self._options(arguments)
        image, level, color_fix = (arguments[name] for name in ("image", "noise_level", "color_fix"))
        low_res = self._low_res(image, options, level, color_fix=color_fix)
        canvas = self._painted(arguments["original_image"], options, "original_image")
        return self._prepared(options, canvas, strength=arguments["strength"], low_res=low_res)


class IFInpaintingSuperResolutionPipeline(IFSuperResolutionStage):
    """Stage II of an inpainting: from 64 px to 256 px, keeping the black part of the mask as it was."""

    def __call__(
        self,
        image: Pictures,
        original_image: Pictures | None = None,
        mask_image: Mask | list[Mask] | None = None,
        strength: float = 0.8,
        prompt: Texts = None,
        num_inference_steps: int = 100,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 4.0,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        noise_level: int = 0,
        clean_caption: bool = True,
        *,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        safety: Action = "black",
        batch_invariant: bool = False,
        guidance_interval: tuple[int, int] | None = None,
        feather: int = 0,
        resamples: int = 1,
    ) -> Result:
        """Enlarge within the mask. The arguments are described at the head of `floyd.pipelines.deepfloyd_if`."""
        return self._call(locals())

    def _task(self, arguments: Mapping[str, Any]) -> Task:
        options = self._options(arguments)
        low_res = self._low_res(arguments["image"], options, arguments["noise_level"])
        canvas, kept = self._masked(arguments, options, "original_image")
        return self._prepared(
            options,
            canvas,
            strength=arguments["strength"],
            low_res=low_res,
            kept=kept,
            resamples=arguments["resamples"],
        )
