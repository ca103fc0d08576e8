"""The pictures and masks that a call brings along, one for each image that will be painted.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from floyd.images.convert import SIGNED, UNIT, to_tensor
from floyd.images.mask import mask_to_tensor
from floyd.pipelines.options import Options


def pictures(
    image: Any, options: Options, *, name: str = "image", resize: Callable[[Any], Any] | None = None
) -> Tensor:
    """Pictures of any kind, one for each prompt.

    Arrays are in [0, 1], as `output_type="np"` gives them, tensors in [-1, 1].
    """
    if image is None:
        raise ValueError(f"{name} is missing: pass a picture for each prompt.")
    items = list(image) if isinstance(image, list | tuple) else [image]
    if not items:
        raise ValueError(f"{name} is an empty list: pass a picture for each prompt.")
    parts = [
        to_tensor(item, resize=resize, value_range=UNIT if isinstance(item, np.ndarray) else SIGNED, name=name)
        for item in items
    ]
    if len(sizes := {tuple(part.shape[2:]) for part in parts}) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(f"All pictures of {name} must have one size, got {shown} (width x height).")
    return per_image(torch.cat(parts), options, name)


def masks(
    mask_image: Any,
    options: Options,
    size: tuple[int, int],
    *,
    shapes: Sequence[tuple[int, int]] = (),
    resize: Callable[[Any], Any] | None = None,
) -> Tensor:
    """Masks of any kind, 1 where to repaint: one for each prompt, or one for all.

    All are brought to `size`, (height, width), if they have its shape or that of one of `shapes`.
    """
    if mask_image is None:
        raise ValueError("mask_image is missing: pass a mask, white where the picture is to be repainted.")
    mask_B1HW = mask_to_tensor(mask_image, resize=resize, size=size, shapes=shapes)
    return mask_B1HW if len(mask_B1HW) == 1 else per_image(mask_B1HW, options, "mask_image")


def per_image(x_BCHW: Tensor, options: Options, name: str) -> Tensor:
    """Repeated as prompts are: p0 p0 p1 p1."""
    if len(x_BCHW) != options.num_prompts:
        raise ValueError(f"{name} holds {len(x_BCHW)} pictures for {options.num_prompts} prompts; pass one for each.")
    return x_BCHW.repeat_interleave(options.num_images_per_prompt, dim=0)
