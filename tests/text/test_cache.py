"""A text is read once, exactly as without a cache; whatever would change its states is another entry."""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from floyd.runtime.quantize import quantize
from floyd.text.cache import Packed, Recall, TextCache
from floyd.text.prompts import encode_clip_prompt, encode_prompt


class Counted:
    """An encoder, and how often it was brought."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.count = encoder, 0

    def bring(self) -> Any:
        self.count += 1
        return self.encoder


class Shelf:
    """A storage in memory that can lose and spoil things."""

    def __init__(self) -> None:
        self.held: dict[str, Mapping[str, Tensor]] = {}

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        return self.held.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self.held[key] = tensors


def read(
    cache: TextCache, encoder: Any, tokenizer: Any, prompt: Any, *, steady: bool = False, **options: Any
) -> tuple[Tensor, int]:
    counted = Counted(encoder)
    pair = encode_prompt(
        prompt, tokenizer=tokenizer, text_encoder=encoder, recall=Recall(cache, counted.bring, steady), **options
    )
    return torch.cat([part for part in pair if part is not None]), counted.count


def test_a_text_is_read_once_and_every_bit_is_as_without_a_cache(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    cache = TextCache(Shelf())
    plain = torch.cat([*encode_prompt("a red cat", tokenizer=t5_tokenizer, text_encoder=t5)])  # type: ignore[list-item]
    for expected in (2, 0):
        states, count = read(cache, t5, t5_tokenizer, "a red cat")
        assert count == expected
        assert torch.equal(states, plain)
    cache.clear()
    states, count = read(cache, t5, t5_tokenizer, "a red cat")
    assert (count, torch.equal(states, plain)) == (0, True), "from the storage"
    assert read(TextCache(), t5, t5_tokenizer, "a red cat")[1] == 2


def test_only_what_is_missing_is_read_and_equal_texts_once(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    cache = TextCache()
    read(cache, t5, t5_tokenizer, "a red cat", do_classifier_free_guidance=False)
    texts = ["a dog", "a red cat", "a dog"]
    states, count = read(cache, t5, t5_tokenizer, texts, do_classifier_free_guidance=False)
    assert count == 1
    for i, text in enumerate(texts):
        alone = encode_prompt(text, tokenizer=t5_tokenizer, text_encoder=t5, do_classifier_free_guidance=False)
        assert torch.equal(states[i : i + 1], alone.positive)


def test_all_that_changes_the_states_is_another_entry(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    cache = TextCache()
    one = {"do_classifier_free_guidance": False}

    def is_new(encoder: Any = t5, prompt: str = "A red <b>cat</b>", **options: Any) -> bool:
        return read(cache, encoder, t5_tokenizer, prompt, **one, **options)[1] == 1

    assert is_new()
    assert not is_new()
    assert not is_new(prompt="a red <b>CAT</b>"), "it is the cleaned text that counts"
    assert is_new(clean_caption=True)
    assert is_new(prompt="a red dog")
    assert is_new(steady=True)
    assert is_new(copy.deepcopy(t5).to(torch.bfloat16))
    for name in ("int8", "int4", "fp8"):
        assert is_new(quantize(copy.deepcopy(t5), name))
    other = copy.deepcopy(t5)
    other.encoder.block[0].layer[0].SelfAttention.q.weight.data += 0.1
    assert is_new(other)
    assert not is_new()


def test_the_length_of_the_padding_belongs_to_the_entry(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    """A negative text is read at the length of given embeddings."""
    cache = TextCache()
    for length, expected in ((77, 1), (20, 1), (20, 0)):
        states, count = read(cache, t5, t5_tokenizer, None, prompt_embeds=torch.zeros(1, length, 32))
        assert (count, states.shape[1]) == (expected, length)


def test_clip_is_recalled_with_the_layers_left_out(clip: CLIPTextModel, clip_tokenizer: CLIPTokenizer) -> None:
    cache, counted = TextCache(), Counted(clip)
    how: dict[str, Any] = {"tokenizer": clip_tokenizer, "text_encoder": clip, "do_classifier_free_guidance": False}
    for skip in (None, 1, None, 1):
        again = encode_clip_prompt("a cat", clip_skip=skip, recall=Recall(cache, counted.bring), **how)
        assert torch.equal(again.positive, encode_clip_prompt("a cat", clip_skip=skip, **how).positive)
    assert counted.count == 2


def test_what_is_changed_afterwards_does_not_reach_the_cache(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    cache = TextCache()
    first, _ = read(cache, t5, t5_tokenizer, "a cat")
    kept = first.clone()
    first.zero_()
    assert torch.equal(read(cache, t5, t5_tokenizer, "a cat")[0], kept)


@pytest.mark.parametrize(
    "spoiled",
    [
        {},
        {"rows": torch.zeros(3, 32)},
        {"rows": torch.zeros(3, 32), "counts": torch.tensor([70, 5, 1])},
        {"rows": torch.zeros(2, 32), "counts": torch.tensor([70, 5, 2])},
        {"rows": torch.zeros(3, 32), "counts": torch.tensor([70.0, 5.0, 2.0])},
        {"rows": torch.zeros(3, 32), "counts": torch.tensor([80, -5, 2])},
        {"rows": torch.full((3, 32), torch.nan), "counts": torch.tensor([70, 5, 2])},
        {"rows": torch.zeros(3, 32).long(), "counts": torch.tensor([70, 5, 2])},
    ],
    ids=lambda spoiled: str({name: tuple(t.shape) for name, t in spoiled.items()}),
)
def test_a_spoiled_entry_is_read_again_and_replaced(
    t5: T5EncoderModel, t5_tokenizer: T5Tokenizer, spoiled: dict[str, Tensor]
) -> None:
    shelf = Shelf()
    before, _ = read(TextCache(shelf), t5, t5_tokenizer, "a cat")
    shelf.held = dict.fromkeys(shelf.held, spoiled)
    after, count = read(TextCache(shelf), t5, t5_tokenizer, "a cat")
    assert count == 2
    assert torch.equal(after, before)
    assert read(TextCache(shelf), t5, t5_tokenizer, "a cat")[1] == 0


def test_what_is_packed_comes_back_to_the_bit_and_short_texts_are_small() -> None:
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    states = states[[0, 0, 1, 2, 2, 2, 2, 1]].to(torch.bfloat16)
    packed = Packed.of(states)
    assert torch.equal(packed.unpacked(), states)
    assert packed.counts_R.tolist() == [2, 1, 4, 1]
    zeros = torch.tensor([[0.0], [-0.0], [0.0]])
    assert Packed.of(zeros).unpacked().signbit().flatten().tolist() == [False, True, False]


def test_padding_far_from_the_text_is_kept_once(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    shelf = Shelf()
    read(TextCache(shelf), t5, t5_tokenizer, "", do_classifier_free_guidance=False)
    (entry,) = shelf.held.values()
    assert len(entry["rows"]) < 40
    assert int(entry["counts"].sum()) == 77


def test_the_oldest_entries_go_when_memory_is_full() -> None:
    cache = TextCache(most_bytes=3 * (4 * 4 + 8))
    for name in string.ascii_lowercase[:4]:
        cache.put(name, torch.full((1, 4), 1.0))
        cache.get("a", 1)
    assert [cache.get(name, 1) is not None for name in "abcd"] == [True, False, True, True]
    assert len(cache) == 3


def test_an_encoder_that_cannot_be_told_is_read_every_time(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    class Foreign:
        config, device, dtype = t5.config, t5.device, t5.dtype

        def __call__(self, *args: Any, **options: Any) -> Any:
            return t5(*args, **options)

    cache = TextCache()
    for _ in range(2):
        assert read(cache, Foreign(), t5_tokenizer, "a cat")[1] == 2
    assert len(cache) == 0


def test_threads_may_share_a_cache(t5: T5EncoderModel, t5_tokenizer: T5Tokenizer) -> None:
    cache = TextCache(Shelf())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: read(cache, t5, t5_tokenizer, f"a cat {i % 2}")[0], range(8)))
    assert all(torch.equal(results[i], results[i % 2]) for i in range(8))
