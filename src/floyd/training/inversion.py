"""Textual inversion (arXiv:2208.01618): new words for a frozen T5; their embeddings alone are trained.

S images of a share  C channels  H height  W width  L text tokens  E encoder width  V new tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from floyd.text.prompts import T5_TOKENS, tokenize
from floyd.text.tokens import rows_of, teach


class Inverting(nn.Module):
    """The frozen text encoder and network, and a row for each new token."""

    def __init__(
        self, unet: nn.Module, tokenizer: Any, text_encoder: Any, tokens: Sequence[str], *, start: str | None = None
    ) -> None:
        """`start`: a word whose meaning the new tokens begin with; by default, none: the mean of all embeddings.

        A token that the tokenizer has been taught before begins with what it was taught.
        """
        super().__init__()
        known = text_encoder.get_input_embeddings().weight.detach()
        first_E = known.mean(0) if start is None else known[_id_of(start, tokenizer)]
        taught = rows_of(tokenizer)
        self.tokens = tuple(tokens)
        rows = {token: taught.get(token, first_E).to(first_E) for token in tokens}
        self.ids = teach(tokenizer, text_encoder, rows)
        self.unet = unet.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)
        self.tokenizer = tokenizer
        self.rows_VE = nn.Parameter(torch.stack(list(rows.values())).float())

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.unet(*args, **options)

    def read(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """[S, L, E], through which the rows learn."""
        ids_SL, mask_SL = tokenize(captions, self.tokenizer, max_length=T5_TOKENS, encoder_name="T5")
        ids_SL = ids_SL.to(device)
        with torch.no_grad():
            embeds_SLE = self.text_encoder.get_input_embeddings()(ids_SL)
        embeds_SLE = embeds_SLE + 0 * self.rows_VE.sum().to(embeds_SLE.dtype)  # where no caption has a new token
        for token_id, row_E in zip(self.ids, self.rows_VE, strict=True):
            embeds_SLE = torch.where((ids_SL == token_id)[..., None], row_E.to(embeds_SLE.dtype), embeds_SLE)
        states_SLE: Tensor = self.text_encoder(inputs_embeds=embeds_SLE, attention_mask=mask_SL.to(device))[0]
        return states_SLE

    def rows(self) -> dict[str, Tensor]:
        """What was learned, by token."""
        return {token: row_E.detach().clone() for token, row_E in zip(self.tokens, self.rows_VE, strict=True)}


def _id_of(word: str, tokenizer: Any) -> int:
    """Of the word's first piece; a word that is many pieces has no embedding of its own."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(
            f"start_word must be one token of the text encoder, and {word!r} is {len(ids)}: choose a plainer word."
        )
    return int(ids[0])
