"""The built-in model's own sentencepiece tokenizer: every word of the grammar is a piece, any other is spelled."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-"
SPELLED = -20.0  # log-probability of a single letter: a known word always wins over its spelling


def train_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Writes `spiece.model` and its configuration, as an IF repository has them, and loads them with transformers."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    captions = list(captions)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=256,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=LETTERS,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    proto = ModelProto.FromString((folder / "spiece.model").read_bytes())
    pieces = list(proto.pieces)
    del proto.pieces[3:]
    for piece, score in _pieces(captions, {p.piece for p in pieces[3:] if len(p.piece) == 1}).items():
        proto.pieces.add(piece=piece, score=score)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(_SPECIAL, indent=2) + "\n")
    return T5Tokenizer.from_pretrained(folder)


def _pieces(captions: Iterable[str], letters: set[str]) -> dict[str, float]:
    """Words by their log-frequency, then single letters."""
    counts = Counter(word for text in captions for word in text.replace(",", " ").replace(":", " ").split())
    total = sum(counts.values())
    words = {f"▁{word}": math.log(count / total) for word, count in counts.most_common() if len(word) > 1}
    spelled = dict.fromkeys(sorted(letters | {"▁"}), SPELLED)
    return {**words, "▁a": math.log(counts["a"] / total), **spelled, ",": -3.0, ":": -5.0}


_SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_CONFIG = {**_SPECIAL, "extra_ids": 100, "model_max_length": 77, "tokenizer_class": "T5Tokenizer"}
