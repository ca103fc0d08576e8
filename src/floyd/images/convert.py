"""Pictures of every kind to what the engine paints on, and back.

B images  C channels  H height  W width

Inside floyd pixels are float32 in [-1, 1]. What comes in:

    PIL picture             any mode; turned upright, made RGB
    numpy array             [H, W, C] or [B, H, W, C]; uint8 in 0..255, or floats in `value_range`
    torch tensor            [C, H, W] or [B, C, H, W]; uint8 in 0..255, or floats in `value_range`
    a list of any of these  of one size, joined to one batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from floyd.images.modes import to_rgb, upright

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]
OutputType = Literal["pil", "np", "pt"]

SIGNED = (-1.0, 1.0)
UNIT = (0.0, 1.0)


def to_tensor(
    images: Pictures,
    *,
    resize: Callable[[Image.Image], Image.Image] | None = None,
    value_range: tuple[float, float] = SIGNED,
    name: str = "image",
) -> Tensor:
    """One float32 batch [B, 3, H, W] in [-1, 1].

    Only PIL pictures pass through `resize`: arrays and tensors are taken at the size they have. `value_range` is what
    the caller says of float arrays and tensors; nothing is guessed from their values, and values far outside raise.
    """
    items: Sequence[Picture] = images if isinstance(images, Sequence) else [images]
    return joined([_batch(item, resize=resize, value_range=value_range, name=name) for item in items], name=name)


def joined(parts: Sequence[Tensor], *, name: str) -> Tensor:
    """All as one batch, if they are of one size."""
    if not parts:
        raise ValueError(f"{name} is an empty list: pass at least one.")
    if len(sizes := {tuple(part.shape[2:]) for part in parts}) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(f"All of {name} must have one size, got {shown} (width x height).")
    return torch.cat(list(parts))


def check_range(low: float, high: float, value_range: tuple[float, float], *, name: str) -> None:
    """Samplers and filters overshoot a little, which is no error; another convention of values is."""
    slack = (value_range[1] - value_range[0]) / 2
    if not value_range[0] - slack <= low <= high <= value_range[1] + slack:  # not-a-number fails this, too
        raise ValueError(f"The values of {name} must lie in {list(value_range)}, got {low:.3g} to {high:.3g}.")


def from_numpy(array: np.ndarray, *, name: str) -> Tensor:
    """A copy as a tensor, whatever the byte order, the strides or the width of its floats."""
    if array.dtype.kind == "f":
        array = array.astype(np.float64 if array.dtype.itemsize > 4 else f"f{array.dtype.itemsize}")
    elif array.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"{name} must hold uint8 (0..255) or floats, or booleans in a mask, got {array.dtype}.")
    return torch.from_numpy(array.copy())


def check_not_empty(picture: Image.Image, *, name: str) -> None:
    if 0 in picture.size:
        raise ValueError(f"{name} is empty: it is {picture.width}x{picture.height} px (width x height).")


def to_unit(x_BCHW: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], with what lies outside cut off."""
    return (x_BCHW.float() / 2 + 0.5).clamp(0, 1)


def to_output(x_BCHW: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    """What the caller gets: PIL pictures, an array [B, H, W, C] in [0, 1], or the tensor as it is, in [-1, 1]."""
    if output_type == "pil":
        return pt_to_pil(x_BCHW)
    if output_type == "np":
        return pt_to_numpy(x_BCHW)
    if output_type == "pt":
        return x_BCHW
    raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}.")


def pt_to_numpy(x_BCHW: Tensor) -> np.ndarray:
    """From [-1, 1] to an array [B, H, W, C], float32 in [0, 1]."""
    return to_unit(x_BCHW).permute(0, 2, 3, 1).cpu().numpy()


def pt_to_pil(images: Tensor) -> list[Image.Image]:
    """From [-1, 1], [B, C, H, W] or [C, H, W], to PIL pictures."""
    if images.ndim not in (3, 4):
        raise ValueError(f"images must be [C, H, W] or [B, C, H, W], got {list(images.shape)}.")
    return numpy_to_pil(pt_to_numpy(images if images.ndim == 4 else images[None]))


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """From [0, 1] (or uint8), [B, H, W, C] or [H, W, C], to PIL pictures: one channel is gray, three RGB, four RGBA."""
    images_BHWC = images[None] if images.ndim == 3 else images
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] not in (1, 3, 4):
        raise ValueError(f"images must be [B, H, W, C] or [H, W, C] of 1, 3 or 4 channels, got {list(images.shape)}.")
    if images_BHWC.dtype != np.uint8:
        check_range(float(images_BHWC.min()), float(images_BHWC.max()), UNIT, name="images")
        images_BHWC = (images_BHWC.clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images_BHWC]


def _batch(
    item: Picture,
    *,
    resize: Callable[[Image.Image], Image.Image] | None,
    value_range: tuple[float, float],
    name: str,
) -> Tensor:
    if isinstance(item, Image.Image):
        check_not_empty(item, name=name)
        picture = to_rgb(upright(item))
        x_BHWC = np.asarray(picture if resize is None else resize(picture))[None]
        return _signed(torch.from_numpy(x_BHWC.copy()).permute(0, 3, 1, 2), value_range, name)
    if isinstance(item, np.ndarray):
        if item.ndim not in (3, 4):
            raise ValueError(f"An array in {name} must be [H, W, C] or [B, H, W, C], got {list(item.shape)}.")
        x_BCHW = from_numpy(np.moveaxis(item, -1, -3), name=name)
    elif isinstance(item, Tensor):
        if item.ndim not in (3, 4):
            raise ValueError(f"A tensor in {name} must be [C, H, W] or [B, C, H, W], got {list(item.shape)}.")
        x_BCHW = item
    else:
        raise TypeError(f"{name} must be PIL pictures, numpy arrays or tensors, got {type(item).__name__}.")
    return _rgb(_signed(x_BCHW if x_BCHW.ndim == 4 else x_BCHW[None], value_range, name), item, name)


def _signed(x_BCHW: Tensor, value_range: tuple[float, float], name: str) -> Tensor:
    if not x_BCHW.numel():
        raise ValueError(f"{name} is empty: its shape is {list(x_BCHW.shape)}.")
    if x_BCHW.dtype == torch.uint8:
        return (x_BCHW.float() / 127.5 - 1).contiguous()
    if not x_BCHW.is_floating_point():
        raise TypeError(f"{name} must hold uint8 (0..255) or floats, got {x_BCHW.dtype}.")
    low, high = x_BCHW.float().aminmax()
    check_range(low.item(), high.item(), value_range, name=name)
    return x_BCHW.float() if value_range == SIGNED else _stretched(x_BCHW.float(), *value_range)


def _stretched(x_BCHW: Tensor, low: float, high: float) -> Tensor:
    return 2 * ((x_BCHW - low) / (high - low)) - 1


def _rgb(x_BCHW: Tensor, given: Picture, name: str) -> Tensor:
    channels = x_BCHW.shape[1]
    if channels not in (1, 3):
        axes = "a tensor's stand before height and width" if isinstance(given, Tensor) else "an array's stand last"
        advice = " Leave the fourth out if it is transparency." if channels == 4 else ""
        raise ValueError(
            f"{name} must have 3 channels (or 1, for gray), got {channels} in {list(given.shape)}: {axes}.{advice}"  # type: ignore[union-attr]
        )
    return x_BCHW.expand(-1, 3, -1, -1)
