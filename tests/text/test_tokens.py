from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny

from floyd.text.prompts import embed
from floyd.text.tokens import remind, rows_of, teach

ROW = torch.linspace(-1, 1, tiny.ENCODER_WIDTH)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    return tiny.t5_tokenizer(), tiny.t5()


def test_a_new_word_is_one_token_with_the_given_embedding_and_others_stay(pair: tuple[Any, Any]) -> None:
    tokenizer, encoder = pair
    spelled = tokenizer("a zorp on a cat").input_ids
    before = embed(["a red cat"], tokenizer, encoder)
    (token_id,) = teach(tokenizer, encoder, {"zorp": ROW})
    ids = tokenizer("a zorp on a cat").input_ids
    assert len(ids) < len(spelled)
    assert ids.count(token_id) == 1
    assert torch.equal(encoder.get_input_embeddings().weight[token_id], ROW)
    assert torch.equal(embed(["a red cat"], tokenizer, encoder), before)


def test_it_is_a_whole_word_only(pair: tuple[Any, Any]) -> None:
    (token_id,) = teach(*pair, {"zorp": ROW})
    assert token_id not in pair[0]("zorps azorp").input_ids
    assert token_id in pair[0]("zorp, a cat").input_ids


def test_more_words_than_there_are_rows_enlarge_the_encoder(pair: tuple[Any, Any]) -> None:
    tokenizer, encoder = pair
    words = [f"zorp{letter}{other}" for letter in "abcdefghij" for other in "abcdefghij"]
    teach(tokenizer, encoder, dict.fromkeys(words, ROW))
    assert len(encoder.get_input_embeddings().weight) == len(tokenizer)
    assert torch.isfinite(embed([words[-1]], tokenizer, encoder)).all()


def test_an_encoder_that_was_loaded_again_is_reminded(pair: tuple[Any, Any]) -> None:
    tokenizer, encoder = pair
    teach(tokenizer, encoder, {"zorp": ROW})
    known, fresh = embed(["a zorp"], tokenizer, encoder), tiny.t5()
    assert not torch.equal(embed(["a zorp"], tokenizer, fresh), known)
    remind(tokenizer, fresh)
    assert torch.equal(embed(["a zorp"], tokenizer, fresh), known)


def test_a_word_can_be_taught_again(pair: tuple[Any, Any]) -> None:
    first = teach(*pair, {"zorp": ROW})
    assert teach(*pair, {"zorp": -ROW}) == first
    assert torch.equal(pair[1].get_input_embeddings().weight[first[0]], -ROW)
    assert torch.equal(rows_of(pair[0])["zorp"], -ROW)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<zorp>", "does not survive the cleaning of prompts"),
        ("Zorp", "does not survive the cleaning of prompts"),
        ("two words", "does not survive"),
        ("▁cat", "has a token '▁cat' already"),
    ],
)
def test_what_a_prompt_cannot_contain_is_refused(pair: tuple[Any, Any], token: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teach(*pair, {token: ROW})


def test_another_encoders_embedding_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="are 32 wide, that of 'zorp' is 5"):
        teach(*pair, {"zorp": ROW[:5]})
