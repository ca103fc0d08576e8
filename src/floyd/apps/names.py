"""Short names for whole cascades."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_UPSCALER = "stabilityai/stable-diffusion-x4-upscaler"
CASCADES = {
    "if-m": ("DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0", _UPSCALER),
    "if-l": ("DeepFloyd/IF-I-L-v1.0", "DeepFloyd/IF-II-L-v1.0", _UPSCALER),
    "if-xl": ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0", _UPSCALER),
}


def expanded(models: Sequence[str]) -> list[str]:
    """Folders and ids, with a cascade's three for its short name; none twice. A folder of that name goes before it."""
    named = [each for model in models for each in ((model,) if Path(model).exists() else CASCADES.get(model, (model,)))]
    return list(dict.fromkeys(named))
