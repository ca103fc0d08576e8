"""Tiny text encoders and their tokenizers, made here: nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WORDS = (
    "a photo of the red blue green cat dog bird house tree river mountain in with on under sky sun moon kangaroo "
    "wearing an orange hoodie holding sign that says very deep learning blurry ugly"
).split()


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms too: fresh ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def t5_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> T5Tokenizer:
    """A folder with a spiece.model, as the published checkpoints have it."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    words = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words.choices(WORDS, k=8)) for _ in range(300)),
        model_prefix=str(folder / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return T5Tokenizer.from_pretrained(folder, model_max_length=512)


@pytest.fixture(scope="session")
def t5(t5_tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return randomized(T5EncoderModel(config))


@pytest.fixture(scope="session")
def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    symbols = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=20)


@pytest.fixture(scope="session")
def clip(clip_tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=20,
        hidden_act="gelu",
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    return randomized(CLIPTextModel(config))
