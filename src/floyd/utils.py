"""The helpers that scripts written for the incumbent import from its `utils`, under the same names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from floyd.images.convert import numpy_to_pil, pt_to_pil
    from floyd.images.grid import make_image_grid
    from floyd.images.load import load_image

__all__ = ["load_image", "make_image_grid", "numpy_to_pil", "pt_to_pil"]

_ROOMS = {
    "load_image": "floyd.images.load",
    "make_image_grid": "floyd.images.grid",
    "numpy_to_pil": "floyd.images.convert",
    "pt_to_pil": "floyd.images.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return __all__
