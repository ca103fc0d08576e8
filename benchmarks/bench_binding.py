"""What the built-in text encoder tells of pairs of colour and shape that it never met.

    python benchmarks/bench_binding.py [--model FOLDER] [--captions 2400] [--prompts 1600]

A linear readout of the nouns' states learns shape and colour from training's captions, and is asked of fresh prompts'
nouns: of known pairs, and of held-out ones. What is hard to read there is hard to paint for a stage I.

M nouns  E width
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write
from torch import Tensor, nn

from floyd.apps.evaluate import prompts
from floyd.apps.mini.data import scenes_at
from floyd.apps.mini.text import Scenes, embedded, nouns_of, tokenized
from floyd.scenes.scene import HELD_OUT, SHAPES, THING_COLORS, Thing

SEED = 99  # of captions that are none of the encoder's own training
BATCH = 96
NOUNS = {"shape": SHAPES, "color": THING_COLORS}


def states(encoder: Any, tokenizer: Any, scenes: Scenes) -> tuple[Tensor, list[Thing]]:
    """The state of every noun, [M, E], and the things that they name."""
    state_ME, things = [], []
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        texts = [caption.text for _, caption in part]
        rows, columns, named = nouns_of(part, tokenized(tokenizer, texts)["offset_mapping"])
        state_ME.append(embedded(encoder, tokenizer, texts)[rows, columns])
        things += named
    return torch.cat(state_ME), things


def readout(state_ME: Tensor, label_M: Tensor, count: int) -> nn.Linear:
    """Logistic regression."""
    linear = nn.Linear(state_ME.shape[1], count)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(state_ME), label_M) + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


def labels(things: list[Thing], name: str) -> Tensor:
    return torch.tensor([NOUNS[name].index(getattr(thing, name)) for thing in things])


def measured(folder: Path, num_captions: int, num_prompts: int) -> dict[str, Any]:
    from transformers import T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    known_ME, known = states(encoder, tokenizer, scenes_at(SEED, 0, num_captions))
    asked = [(one.scene, one.caption) for one in prompts(num_prompts, seed=SEED) if one.split == "held_out"]
    asked_ME, things = states(encoder, tokenizer, asked)
    mean_E, std_E = known_ME.mean(0), known_ME.std(0)
    is_held_M = torch.tensor([(thing.color, thing.shape) in HELD_OUT for thing in things])
    figures: dict[str, Any] = {"held_out": {"nouns": int(is_held_M.sum())}, "known": {"nouns": int((~is_held_M).sum())}}
    for name, values in NOUNS.items():
        linear = readout((known_ME - mean_E) / std_E, labels(known, name), len(values))
        with torch.no_grad():
            is_right_M = linear((asked_ME - mean_E) / std_E).argmax(1) == labels(things, name)
        figures["held_out"][name] = float(is_right_M[is_held_M].float().mean())
        figures["known"][name] = float(is_right_M[~is_held_M].float().mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    built_in = Path(str(files("floyd") / "mini" / "stage_1"))
    parser.add_argument("--model", type=Path, nargs="*", default=[built_in], help="with text_encoder and tokenizer")
    parser.add_argument("--captions", type=int, default=2400)
    parser.add_argument("--prompts", type=int, default=1600)
    options = parser.parse_args()
    rows = {}
    for folder in options.model:
        name = "built-in" if folder.resolve() == built_in.resolve() else folder.name
        rows[name] = measured(folder, options.captions, options.prompts)
        for kind, row in rows[name].items():
            print(f"{name:12} {kind:9} {row['nouns']:4} nouns  shape {row['shape']:6.1%}  colour {row['color']:6.1%}")
    print(write("binding", rows))


if __name__ == "__main__":
    main()
