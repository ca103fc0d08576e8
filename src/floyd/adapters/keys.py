"""What one key of a LoRA file says. Every key is read by itself: files of the incumbent mix formats.

Names in, names out: no tensors, no networks, no disk.

    unet.P.lora_A.weight                             PEFT, and what floyd writes
    unet.P.lora.down.weight                          mid-2023
    unet.P.lora_linear_layer.down.weight             mid-2023, text encoders
    unet.Q.processor.to_k_lora.down.weight           spring 2023: the layer's name is part of the ending
    lora_unet_P_with_underscores.lora_down.weight    kohya, with `.alpha` beside
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Literal, NamedTuple, cast

Role = Literal["down", "up", "alpha"]  # A, B and alpha of W + alpha / rank * B @ A

UNET, TEXT_ENCODER = "unet", "text_encoder"
COMPONENTS = (UNET, TEXT_ENCODER)


class Key(NamedTuple):
    component: str | None  # None: the key does not say
    path: str  # of the layer, as the file calls it
    role: Role
    is_flat: bool = False  # the path has "_" where the network's has "."


_SPRING_2023 = r"(?P<parent>.+?)(?:\.processor)?\.(?P<leaf>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora"
_ENDINGS = [
    re.compile(pattern)
    for pattern in (
        r"(?P<path>.+)\.lora_(?P<role>A|B)(?:\.[^.]+)?\.weight",  # perhaps with the adapter's name
        r"(?P<path>.+)\.lora\.(?P<role>down|up)\.weight",
        r"(?P<path>.+)\.lora_linear_layer\.(?P<role>down|up)\.weight",
        _SPRING_2023 + r"\.(?P<role>down|up)\.weight",
        r"(?P<path>.+)\.lora_(?P<role>down|up)\.weight",
        r"(?P<path>.+)\.(?P<role>alpha)",
    )
]
_ROLES = {"A": "down", "B": "up"}
_FLAT = {"lora_unet_": UNET, "lora_te_": TEXT_ENCODER, "lora_te1_": TEXT_ENCODER}
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.")  # of peft, torch.compile and data parallelism

# How other files, or other generations of transformers, call the same layer: an ending, and its names.
_ALIASES = {
    "to_q": ("q_proj", "q"),
    "to_k": ("k_proj", "k"),
    "to_v": ("v_proj", "v"),
    "to_out": ("to_out.0", "out_proj", "o"),
}
_OUTER = "text_model."  # CLIP's network, of which today's text encoder is the inside

_LOOKS_LIKE = [
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        (r"lora_magnitude_vector|dora_scale", "DoRA, which floyd does not have; train it as plain LoRA"),
        (r"lokr_|hada_|oft_|boft_|ia3_|vera_|glora", "an adapter of another kind than LoRA (LoKr, LoHa, OFT, ...)"),
        (r"\.lora_B\b.*\.bias$|\.lora\.up\.bias$|\.lora_up\.bias$", "LoRA with a bias, which floyd does not have"),
        (r"\.diff(_b)?$", "a full difference of weights, not a low-rank one"),
        (r"^lora_te[23]_|^text_encoder_[23]\.", "the second text encoder of another family (SDXL, SD3, Flux)"),
        (r"(double|single|joint)_(transformer_)?blocks", "a diffusion transformer (Flux, SD3), not a UNet"),
        (r"(^|[._])(input|output|middle)_blocks?[._]", "the block names of Stable Diffusion's original code"),
        (r"^(transformer|prior|controlnet)[._]", "a component that IF does not have"),
        (r"attn[12][._]|transformer_blocks", "Stable Diffusion's UNet, or that of stage III"),
    )
]


def read_key(name: str) -> Key | None:
    """Component, layer and role; None for what is no key of LoRA."""
    match = next((found for ending in _ENDINGS if (found := ending.fullmatch(name))), None)
    if match is None:
        return None
    parts = match.groupdict()
    path = parts["path"] if "path" in parts else f"{parts['parent']}.{parts['leaf']}"
    role = cast("Role", _ROLES.get(parts["role"], parts["role"]))
    for start, component in _FLAT.items():
        if path.startswith(start):
            return Key(component, path.removeprefix(start), role, is_flat=True)
    path = _unwrapped(path)
    for component in COMPONENTS:
        if path.startswith(f"{component}."):
            return Key(component, _unwrapped(path.removeprefix(f"{component}.")), role)
    return Key(None, path, role)


def _unwrapped(path: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if path.startswith(w)), None):
        path = path.removeprefix(wrapper)
    return path


def layer_of(key: Key, layers: Collection[str]) -> str | None:
    """The layer that a key means, among those that a network has."""
    named: Mapping[str, str] = {flat(layer): layer for layer in layers} if key.is_flat else {}
    for path in _candidates(key.path):
        found = named.get(flat(path)) if key.is_flat else path if path in layers else None
        if found is not None:
            return found
    return None


def flat(path: str) -> str:
    """As kohya writes it."""
    return path.replace(".", "_")


def _candidates(path: str) -> Iterator[str]:
    """What a file's path may be called here, the likeliest first."""
    outer = flat(_OUTER) if "." not in path else _OUTER
    for inside in dict.fromkeys((path, path.removeprefix(outer), outer + path)):
        yield inside
        for ending, names in _ALIASES.items():
            if inside.endswith(ending):
                yield from (inside.removesuffix(ending) + name for name in names)


def looks_like(name: str, layers: Iterable[str] = ()) -> str:
    """A guess at what an unusable key is, for complaints; empty if there is none."""
    if meaning := next((meaning for pattern, meaning in _LOOKS_LIKE if pattern.search(name)), None):
        return f"it looks like {meaning}"
    key = read_key(name)
    if key is None:
        is_weight = name.endswith((".weight", ".bias"))
        return "it looks like a weight of a whole network, not of LoRA" if is_weight else ""
    names = {flat(layer): layer for layer in layers} if key.is_flat else {layer: layer for layer in layers}
    close = get_close_matches(key.path, names, n=1, cutoff=0.6)
    return f"the nearest layer here is {names[close[0]]}" if close else ""
