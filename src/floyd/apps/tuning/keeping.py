"""DreamBooth's pictures of what is to be kept: the model's own, painted before it is trained (arXiv:2208.12242)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from floyd.apps.tuning.models import Models
from floyd.store.files import made, replacing
from floyd.training.data.sources import METADATA

AT_ONCE = 8  # pictures of a prompt


def painted(models: Models, prompts: Sequence[str], num: int, folder: Path, seed: int, device: str) -> Iterator[int]:
    """Paint what the folder does not hold yet, yielding how many pictures each batch had."""
    wanted = {f"{i:05}.png": prompts[i % len(prompts)] for i in range(num)}
    missing = [name for name in wanted if not (made(folder) / name).is_file()]
    if missing:
        cascade = models.cascade(models.stage).to(device)
        side = list(cascade.sizes.values())[-1]
        for prompt in prompts:
            own = [name for name in missing if wanted[name] == prompt]
            for name, count in _runs(own, len(prompts)):
                first = int(name.removesuffix(".png"))
                result = cascade(prompt, size=side, seed=seed + first, count=count)
                for i, picture in enumerate(result.images):
                    with replacing(folder / f"{first + i * len(prompts):05}.png") as temporary:
                        picture.save(temporary, format="PNG")
                yield count
    with replacing(folder / METADATA) as temporary:
        lines = [json.dumps({"file_name": name, "text": prompt}) for name, prompt in wanted.items()]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _runs(names: Sequence[str], stride: int) -> Iterator[tuple[str, int]]:
    """Names a stride apart, together: the first one, and how many."""
    numbers = [int(name.removesuffix(".png")) for name in names]
    start = 0
    while start < len(numbers):
        stop = start + 1
        while stop < len(numbers) and stop - start < AT_ONCE and numbers[stop] == numbers[stop - 1] + stride:
            stop += 1
        yield names[start], stop - start
        start = stop
