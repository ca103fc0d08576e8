"""The built-in text encoder: a small T5 that learns, before any picture is drawn, to understand captions.

It is frozen afterwards, as IF's T5 is. What it must know is asked of the tokens themselves: the noun of each thing must
tell that thing's shape, colour, size and place, every token the background, and the mean of all what is there.

B captions  L tokens  E width  M nouns
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.apps.mini.data import scenes_at
from floyd.scenes.captions import Caption
from floyd.scenes.scene import BACKGROUND_COLORS, SHAPES, SIZES, THING_COLORS, Scene, Thing
from floyd.training.loop import LoopConfig, Losses, Phase, device_of

CONFIG: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
    "is_encoder_decoder": False,
    "use_cache": False,
}
LENGTH = 77
PLACES = 8  # bins along each side
# Of the labels (arXiv:1512.00567). All wrong answers are then to be equally unlikely: without it a color speaks against
# the shapes that it never occurred with, and a noun of such a pair does not tell its shape.
SMOOTHING = 0.1
LOOP = LoopConfig(
    phases=(  # `size` is the number of tokens: few words first, then padded as the pipelines pad
        Phase(num_steps=1250, batch_size=96, size=40, rate=3e-3, last_rate=1.5e-3),
        Phase(num_steps=330, batch_size=96, size=LENGTH, rate=1.5e-3, last_rate=5e-5),
    ),
    ema_decay=0.99,
    weight_decay=0.01,
    precision="fp32",
    seed=11,
)


def build_encoder(vocab_size: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(LOOP.seed)
    return T5EncoderModel(T5Config(**CONFIG, vocab_size=vocab_size))


def tokenized(tokenizer: Any, texts: list[str], length: int = LENGTH) -> Any:
    """Token ids, mask and character offsets, padded as the pipelines pad."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True)


def embedded(encoder: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """[B, 77, E], as `encode_prompt` gives it."""
    batch = tokenized(tokenizer, texts)
    device = device_of(encoder)
    ids_BL, mask_BL = (torch.tensor(batch[key], device=device) for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        return encoder(ids_BL, attention_mask=mask_BL)[0]


class Reader(nn.Module):
    """The encoder and the questions it is asked while it learns."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        width: int = CONFIG["d_model"]
        self.noun_heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in _NOUN_HEADS.items()})
        self.token_heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in _TOKEN_HEADS.items()})
        self.mean_heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in _MEAN_HEADS.items()})

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.encoder(ids_BL, attention_mask=mask_BL)[0]


_NOUN_HEADS = {"shape": len(SHAPES), "color": len(THING_COLORS), "size": len(SIZES), "x": PLACES, "y": PLACES}
_TOKEN_HEADS = {"background": len(BACKGROUND_COLORS), "second": len(BACKGROUND_COLORS) + 1}
_MEAN_HEADS = {
    "count": 3,
    **{f"shape_{i}": len(SHAPES) for i in range(3)},
    **{f"color_{i}": len(THING_COLORS) for i in range(3)},
}


def reading_loss(tokenizer: Any) -> Any:
    """The loss of `Reader` for `Trainer`."""

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        assert isinstance(model, Reader)
        scenes = scenes_at(LOOP.seed, step, phase.batch_size)
        batch = tokenized(tokenizer, [caption.text for _, caption in scenes], phase.size)
        device = device_of(model)
        ids_BL, mask_BL = (torch.tensor(batch[key], device=device) for key in ("input_ids", "attention_mask"))
        text_BLE = model(ids_BL, mask_BL)
        return {
            "nouns": _noun_loss(model, text_BLE, scenes, batch["offset_mapping"]),
            "tokens": _token_loss(model, text_BLE, scenes),
            "mean": _mean_loss(model, text_BLE, scenes),
        }

    return loss_of


Scenes = list[tuple[Scene, Caption]]
IGNORED = -100


def nouns_of(scenes: Scenes, offsets: list[list[tuple[int, int]]]) -> tuple[list[int], list[int], list[Thing]]:
    """Of every noun, M in all: its caption, the last of its tokens, and the thing that it names."""
    rows, columns, things = [], [], []
    for row, (scene, caption) in enumerate(scenes):
        for start, end, index in caption.nouns:
            rows.append(row)
            columns.append(max(i for i, (a, b) in enumerate(offsets[row]) if a < end and b > start))
            things.append(scene.things[index])
    return rows, columns, things


def _noun_loss(model: Reader, text_BLE: Tensor, scenes: Scenes, offsets: list[list[tuple[int, int]]]) -> Tensor:
    rows, columns, things = nouns_of(scenes, offsets)
    targets = []
    for thing in things:
        place = [min(int(value * PLACES), PLACES - 1) for value in (thing.x, thing.y)]
        looks = [SHAPES.index(thing.shape), THING_COLORS.index(thing.color), SIZES.index(thing.size)]
        targets.append([*looks, *place])
    noun_ME, target_M5 = text_BLE[rows, columns], torch.tensor(targets, device=text_BLE.device)
    losses = [_cross_entropy(head(noun_ME), target_M5[:, i]) for i, head in enumerate(model.noun_heads.values())]
    return torch.stack(losses).sum()


def _token_loss(model: Reader, text_BLE: Tensor, scenes: Scenes) -> Tensor:
    first, second = [], []
    for scene, caption in scenes:
        is_said = caption.claims.background is not None
        background = scene.background
        first.append(BACKGROUND_COLORS.index(background.color) if is_said else IGNORED)
        is_plain = background.second_color is None
        end = 0 if is_plain else 1 + BACKGROUND_COLORS.index(str(background.second_color))
        second.append(end if is_said else IGNORED)
    losses = []
    for head, target in zip(model.token_heads.values(), (first, second), strict=True):
        logits_NX = head(text_BLE).flatten(0, 1)
        target_N = torch.tensor(target, device=text_BLE.device).repeat_interleave(text_BLE.shape[1])
        losses.append(_cross_entropy(logits_NX, target_N))
    return torch.stack(losses).sum()


def _mean_loss(model: Reader, text_BLE: Tensor, scenes: Scenes) -> Tensor:
    """Things in the order of mention, asked of the mean of all tokens, padding included: what the UNet pools."""
    targets: dict[str, list[int]] = {name: [] for name in _MEAN_HEADS}
    for _, caption in scenes:
        things = caption.claims.things
        targets["count"].append(len(things) - 1)
        for i in range(3):
            targets[f"shape_{i}"].append(SHAPES.index(things[i].shape) if i < len(things) else IGNORED)
            targets[f"color_{i}"].append(THING_COLORS.index(things[i].color) if i < len(things) else IGNORED)
    mean_BE = text_BLE.mean(1)
    losses = [
        _cross_entropy(head(mean_BE), torch.tensor(targets[name], device=mean_BE.device))
        for name, head in model.mean_heads.items()
    ]
    return torch.stack(losses).mean()


def _cross_entropy(logits_NX: Tensor, target_N: Tensor) -> Tensor:
    """Nothing, rather than not a number, where the whole batch is silent about it."""
    if bool((target_N == IGNORED).all()):
        return logits_NX.sum() * 0
    return F.cross_entropy(logits_NX, target_N, ignore_index=IGNORED, label_smoothing=SMOOTHING)
