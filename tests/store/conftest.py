"""A small network with everything the store must carry, and a hub on localhost."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub_stub import COMMIT, Hub, files_in, fill_cache, serving
from torch import nn

from floyd.store.config import Config
from floyd.store.pretrained import Model

__all__ = ["COMMIT", "Hub", "files_in", "fill_cache"]


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    width: int = 4
    depths: tuple[int, ...] = (1, 2)


class Toy(Model):
    """Weights, a stored buffer of bytes, and a buffer that is computed and not stored."""

    config_class = ToyConfig
    config: ToyConfig
    mark: torch.Tensor
    ramp: torch.Tensor

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.layer = nn.Linear(self.config.width, 3)
        self.scale = nn.Parameter(torch.ones(self.config.width))
        self.register_buffer("mark", torch.zeros(2, 2))
        self.register_buffer("ramp", torch.arange(4.0), persistent=False)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    model = Toy(width=5)
    model.mark.fill_(7)
    return model


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Equal weights under equal names, of which transformers has two for what a T5 looks tokens up in."""
    a, b = ({k: w for k, w in it.state_dict().items() if k != "encoder.embed_tokens.weight"} for it in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


WORDS = (
    "a photo of the kangaroo wearing an orange hoodie and blue sunglasses standing in front eiffel tower holding sign "
    "that says very deep learning red green square circle left right small large striped dog cat on under table"
).split()


@pytest.fixture(scope="session")
def spiece() -> bytes:
    """A sentencepiece model with T5's special ids, trained here."""
    import sentencepiece

    chance, model = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(chance.choices(WORDS, k=8)) for _ in range(400)),
        model_writer=model, vocab_size=100, hard_vocab_limit=False, model_type="unigram", num_threads=1,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def t5_tokenizer_files(folder: Path, spiece: bytes) -> Path:
    """A tokenizer's folder as the published checkpoints have it: no tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece)
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"additional_special_tokens": extra, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"extra_ids": 100, "model_max_length": 512, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
    return folder
