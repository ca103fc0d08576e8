"""New words for a tokenizer and its text encoder: a token each, and its learned embedding (arXiv:2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from floyd.text.cleaning import preprocess

_ROWS = "floyd_rows"  # on a tokenizer: what was learned for the words that it was given


def check_token(token: str, tokenizer: Any) -> None:
    """Refuse what a prompt could not contain, or contains already with a meaning of its own."""
    if preprocess([token], clean_caption=True) != [token] or len(token.split()) != 1:
        raise ValueError(
            f"The token {token!r} does not survive the cleaning of prompts, which are lower-cased and lose markup: "
            "choose a word of lower-case letters, such as 'zorp'."
        )
    if token in tokenizer.get_vocab() and token not in rows_of(tokenizer):
        raise ValueError(f"The tokenizer has a token {token!r} already: choose a word that it does not know.")


def rows_of(tokenizer: Any) -> dict[str, Tensor]:
    """What `teach` has given it."""
    rows: dict[str, Tensor] = getattr(tokenizer, _ROWS, {})
    return rows


def teach(tokenizer: Any, text_encoder: Any, rows: Mapping[str, Tensor]) -> list[int]:
    """Give both the tokens and their embeddings; the ids are returned. Known ones get the new embedding."""
    for token in rows:
        check_token(token, tokenizer)
    width = text_encoder.get_input_embeddings().weight.shape[1]
    if wrong := {token: len(row) for token, row in rows.items() if len(row) != width}:
        raise ValueError(
            f"The text encoder's embeddings are {width} wide, "
            f"{', '.join(f'that of {token!r} is {size}' for token, size in wrong.items())}: it is another encoder's."
        )
    _add(tokenizer, list(rows))
    setattr(tokenizer, _ROWS, {**rows_of(tokenizer), **{token: row.detach().cpu() for token, row in rows.items()}})
    remind(tokenizer, text_encoder)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in rows]


def remind(tokenizer: Any, text_encoder: Any) -> None:
    """Give a text encoder that was loaded again what its tokenizer was given."""
    if not (rows := rows_of(tokenizer)):
        return
    weight = text_encoder.get_input_embeddings().weight
    if weight.is_meta:
        raise ValueError(
            "The text encoder's weights are elsewhere (sequential offloading): load new tokens before offloading."
        )
    if len(tokenizer) > len(weight):
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token, row in rows.items():
            weight[int(tokenizer.convert_tokens_to_ids(token))] = row.to(weight)


def _add(tokenizer: Any, tokens: list[str]) -> None:
    """As whole words: "zorps" is not "zorp"."""
    from tokenizers import AddedToken

    options: dict[str, Any] = {"single_word": True, "lstrip": True, "rstrip": False, "normalized": False}
    tokenizer.add_tokens([AddedToken(token, **options) for token in tokens])
