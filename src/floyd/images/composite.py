"""What was painted, put into the picture that it was painted for.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from floyd.images.convert import SIGNED, UNIT, Picture, Pictures, numpy_to_pil, pt_to_numpy, to_tensor
from floyd.images.mask import Mask, mask_to_tensor, softened
from floyd.images.modes import to_rgb, upright

Painted = list[Image.Image] | np.ndarray | Tensor
LIMITS = {"pil": (0.0, 255.0), "np": UNIT, "pt": (-torch.inf, torch.inf)}


def put_back(
    painted: Image.Image | Painted,
    picture: Pictures,
    mask_image: Mask | Sequence[Mask],
    *,
    feather: int = 0,
    value_range: tuple[float, float] | None = None,
) -> Painted:
    """The given pictures at their own size, with what was painted where the mask is white.

    What the mask keeps is the picture's to the last bit, in the kind of what was painted: 8-bit RGB of PIL pictures,
    [0, 1] of arrays [B, H, W, C], [-1, 1] of tensors [B, C, H, W]. What was painted may be of another size than the
    picture, from any stage; `feather` is over how many pixels within the white part it fades in. One picture and one
    mask serve all that was painted of them; several are repeated as prompts are.

    `value_range` is that of a painted tensor: (-1, 1), what stages I and II call "pt", or (0, 1), what stage III calls
    so. What comes back is in [-1, 1]. Without it a tensor that could be either is refused.
    """
    kind, parts = _each_painted(painted, value_range)
    if isinstance(feather, bool) or not isinstance(feather, int) or feather < 0:
        raise ValueError(f"feather must be a number of pixels, an int of at least 0, got {feather!r}.")
    pictures = repeated(each(picture), len(parts), "picture")
    masks = repeated(each_mask(mask_image), len(parts), "mask_image")
    done = [_put(x, _as(kind, own), mask, feather, kind) for x, own, mask in zip(parts, pictures, masks, strict=True)]
    if kind == "pil":
        return [Image.fromarray(x.permute(1, 2, 0).round().byte().cpu().numpy()) for x in done]
    if len({x.shape for x in done}) > 1:
        raise ValueError("The given pictures have several sizes, which one array cannot hold: paint with 'pil'.")
    return torch.stack(done) if kind == "pt" else np.stack([x.permute(1, 2, 0).numpy() for x in done])


def each(pictures: Pictures) -> list[Picture]:
    """One by one: a batch taken apart."""
    items: Sequence[Any] = pictures if isinstance(pictures, Sequence) else [pictures]
    return [one for item in items for one in (item if getattr(item, "ndim", 3) == 4 else [item])]


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width, upright."""
    if isinstance(picture, Image.Image):
        turned = upright(picture)
        return turned.height, turned.width
    height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.shape[-3:-1]
    return int(height), int(width)


def _put(x_CHW: Tensor, own_CHW: Tensor, mask: Mask, feather: int, kind: str) -> Tensor:
    size = (own_CHW.shape[1], own_CHW.shape[2])
    own_CHW = own_CHW.to(x_CHW.device)
    mask_1HW = softened(mask_to_tensor(mask, size=size), feather)[0].to(x_CHW)
    if x_CHW.shape[1:] != own_CHW.shape[1:]:
        large_CHW = F.interpolate(x_CHW[None].cpu(), size, mode="bicubic", antialias=True)[0]
        x_CHW = large_CHW.clamp(*LIMITS[kind]).to(x_CHW.device)
    return torch.where(mask_1HW == 0, own_CHW, (1 - mask_1HW) * own_CHW + mask_1HW * x_CHW)


def _each_painted(painted: Any, value_range: tuple[float, float] | None) -> tuple[str, list[Tensor]]:
    """Of which kind, and each as float32 [C, H, W] in the range of its kind."""
    if value_range not in (None, SIGNED, UNIT):
        raise ValueError(f"value_range must be (-1, 1) or (0, 1), got {value_range!r}.")
    if isinstance(painted, Tensor):
        if value_range is None and painted.is_floating_point() and bool((painted >= 0).all()):
            raise ValueError(
                'painted is a tensor without a negative value: say value_range=(0, 1) if it is stage III\'s "pt", '
                "(-1, 1) if it is another stage's and as bright as that."
            )
        return "pt", list(to_tensor(painted, value_range=value_range or SIGNED, name="painted"))
    if value_range is not None:
        raise ValueError("value_range is that of a painted tensor: PIL pictures and arrays have only one.")
    if isinstance(painted, np.ndarray):
        return "np", [_as("np", one) for one in each(painted)]
    return "pil", [_as("pil", one) for one in each(painted)]


def _as(kind: str, picture: Picture) -> Tensor:
    """One picture as float32 [C, H, W] in the range of that kind, exactly where the kinds allow it."""
    if kind == "pt":
        return to_tensor(picture, value_range=UNIT if isinstance(picture, np.ndarray) else SIGNED)[0]
    if isinstance(picture, Image.Image):
        picture = np.asarray(to_rgb(upright(picture)))
    elif isinstance(picture, Tensor):
        picture = _bytes(picture) if picture.dtype == torch.uint8 else pt_to_numpy(to_tensor(picture))[0]
    to_tensor(picture, value_range=UNIT)  # refuses what is no picture
    x_HWC = picture if picture.dtype == np.uint8 else picture.astype(np.float32).clip(0, 1)
    if kind == "np":
        x_HWC = x_HWC if x_HWC.dtype != np.uint8 else x_HWC.astype(np.float32) / 255
    elif x_HWC.dtype != np.uint8:
        x_HWC = np.asarray(to_rgb(numpy_to_pil(x_HWC)[0]))
    return torch.from_numpy(x_HWC.astype(np.float32)).permute(2, 0, 1).expand(3, -1, -1)


def _bytes(picture_CHW: Tensor) -> np.ndarray:
    return picture_CHW.cpu().numpy().transpose(1, 2, 0)


def each_mask(mask_image: Mask | Sequence[Mask]) -> list[Mask]:
    items: Sequence[Any] = mask_image if isinstance(mask_image, Sequence) else [mask_image]
    flat = [item[..., 0] if isinstance(item, np.ndarray) and item.ndim == 4 else item for item in items]
    return [one for item in flat for one in (item if getattr(item, "ndim", 2) > 2 else [item])]


def repeated(items: list[Any], count: int, name: str) -> list[Any]:
    """As prompts are: p0 p0 p1 p1."""
    if not items or count % len(items):
        raise ValueError(f"Got {len(items)} of {name} for {count} painted: give one for all, or one for each.")
    return [item for item in items for _ in range(count // len(items))]
