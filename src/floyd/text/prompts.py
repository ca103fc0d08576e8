"""What the networks read instead of a prompt: tokens, then a text encoder's states.

Stages I and II read T5 (its encoder alone; the states at padding positions are read too, as in training), stage III
reads CLIP.

B prompts  N images: B times the images per prompt  L tokens  E encoder width
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from floyd.text.cache import Recall
from floyd.text.checks import Texts, batch_size, check_prompts
from floyd.text.cleaning import preprocess

logger = logging.getLogger(__name__)

T5_TOKENS = 77  # T5 itself could read more; IF was trained on this many


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    model_max_length: int
    pad_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def decode(self, token_ids: list[int]) -> Any: ...


class TextEncoder(Protocol):
    """The part of a transformers text encoder that is used here."""

    config: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class PromptPair:
    """What to paint, and what to keep away from: `negative` is None when there is no guidance.

    The images of one prompt stand beside each other: p0 p0 p1 p1.
    """

    positive: Tensor  # NLE
    negative: Tensor | None = None  # NLE

    def __iter__(self) -> Iterator[Tensor | None]:
        yield self.positive
        yield self.negative


@torch.no_grad()
def embed(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    *,
    max_length: int = T5_TOKENS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    recall: Recall | None = None,
) -> Tensor:
    """T5's states at all `max_length` positions. Only inside T5 is the padding masked: no token attends to it."""
    ids_BL, mask_BL = tokenize(texts, tokenizer, max_length=max_length, encoder_name="T5")

    def compute(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        encoder = text_encoder if recall is None else recall.bring()
        place = _place(encoder, device)
        states_BLE: Tensor = encoder(ids_BL.to(device=place), attention_mask=mask_BL.to(device=place))[0]
        if not bool(states_BLE.isfinite().all()):
            raise ValueError(
                "T5's states of the prompt are not finite numbers, which would paint nothing but black. Its weights "
                "were misread (quantized files of an 8bit variant lose their scales), or it overflows in "
                f"{str(text_encoder.dtype).removeprefix('torch.')}: load the plain or fp16 files, in bfloat16."
            )
        return states_BLE

    states_BLE = compute(ids_BL, mask_BL) if recall is None else recall.states(text_encoder, ids_BL, mask_BL, compute)
    return states_BLE.to(device=device, dtype=dtype)


@torch.no_grad()
def embed_clip(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    *,
    max_length: int | None = None,
    clip_skip: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    recall: Recall | None = None,
) -> Tensor:
    """CLIP's states after its last norm. `clip_skip` leaves out that many of the last layers, but not the norm."""
    config = text_encoder.config
    if max_length is None:
        max_length = clip_tokens(tokenizer, text_encoder)
    if clip_skip is not None and not 0 <= clip_skip <= config.num_hidden_layers:
        raise ValueError(f"clip_skip must be in [0, {config.num_hidden_layers}], got {clip_skip}.")

    ids_BL, mask_BL = tokenize(texts, tokenizer, max_length=max_length, encoder_name="CLIP")

    def compute(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        encoder = text_encoder if recall is None else recall.bring()
        place = _place(encoder, device)
        mask = mask_BL.to(device=place) if getattr(config, "use_attention_mask", False) else None
        output = encoder(ids_BL.to(device=place), attention_mask=mask, output_hidden_states=clip_skip is not None)
        states_BLE: Tensor = output[0]
        if clip_skip is not None:
            inner: Any = getattr(encoder, "text_model", encoder)  # the norm's home varies with the version
            states_BLE = inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return states_BLE

    if recall is None:
        states_BLE = compute(ids_BL, mask_BL)
    else:
        states_BLE = recall.states(text_encoder, ids_BL, mask_BL, compute, clip_skip=clip_skip)
    return states_BLE.to(device=device, dtype=dtype)


def clip_tokens(tokenizer: Tokenizer, text_encoder: TextEncoder) -> int:
    """As how many tokens CLIP reads a text."""
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


def tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, *, max_length: int, encoder_name: str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, max_length]; what does not fit is named in a warning.

    Cut and padded here: a tokenizer asked to do so changes its own state, and two calls at once then break each other.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no padding token; load the one that the checkpoint came with.")
    whole = tokenizer(list(texts), padding=False, truncation=False, add_special_tokens=True, verbose=False).input_ids
    unread = [tokenizer.decode(ids[max_length - 1 : -1]) for ids in whole if len(ids) > max_length]
    if unread:
        logger.warning("%s reads %d tokens here; what follows was cut off: %s", encoder_name, max_length, unread)

    ids_BL = torch.full((len(whole), max_length), tokenizer.pad_token_id, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, ids in enumerate(whole):
        kept = ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]  # the last one ends the text
        ids_BL[row, : len(kept)] = torch.tensor(kept)
        mask_BL[row, : len(kept)] = 1
    return ids_BL, mask_BL


def encode_prompt(
    prompt: Texts | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    text_encoder: TextEncoder | None = None,
    negative_prompt: Texts | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    do_classifier_free_guidance: bool = True,
    num_images_per_prompt: int = 1,
    clean_caption: bool = False,
    device: torch.device | str | None = None,
    unet_dtype: torch.dtype | None = None,
    one_by_one: bool = False,
    recall: Recall | None = None,
) -> PromptPair:
    """The T5 embeddings that stages I and II read, a row for each image.

    Given or made here, they take the text encoder's dtype; without an encoder `unet_dtype`; else they keep theirs.
    `one_by_one`: the encoder reads each text alone, so that its states do not depend on the others to the last bit.
    `recall`: texts that were read before are not read again.
    """

    def read(texts: list[str], max_length: int = T5_TOKENS) -> Tensor:
        reader = _present(tokenizer, text_encoder)
        texts = preprocess(texts, clean_caption=clean_caption)
        return embed(texts, *reader, max_length=max_length, device=device, recall=recall)

    asked = _Asked(
        prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        is_guided=do_classifier_free_guidance,
        num_images=num_images_per_prompt,
        one_by_one=one_by_one,
    )
    dtype = unet_dtype if text_encoder is None else text_encoder.dtype
    return asked.answered(read, read, device=device, dtype=dtype)


def encode_clip_prompt(
    prompt: Texts | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    text_encoder: TextEncoder | None = None,
    negative_prompt: Texts | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    do_classifier_free_guidance: bool = True,
    num_images_per_prompt: int = 1,
    clip_skip: int | None = None,
    device: torch.device | str | None = None,
    unet_dtype: torch.dtype | None = None,
    one_by_one: bool = False,
    recall: Recall | None = None,
) -> PromptPair:
    """The CLIP embeddings that stage III reads. As in the incumbent, `clip_skip` is for the prompt alone."""

    def read(texts: list[str]) -> Tensor:
        reader = _present(tokenizer, text_encoder)
        return embed_clip(texts, *reader, clip_skip=clip_skip, device=device, recall=recall)

    def read_negative(texts: list[str], max_length: int) -> Tensor:
        reader = _present(tokenizer, text_encoder)
        return embed_clip(texts, *reader, max_length=max_length, device=device, recall=recall)

    asked = _Asked(
        prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        is_guided=do_classifier_free_guidance,
        num_images=num_images_per_prompt,
        one_by_one=one_by_one,
    )
    dtype = unet_dtype if text_encoder is None else text_encoder.dtype
    return asked.answered(read, read_negative, device=device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the caller said about the pictures, as text or as embeddings."""

    prompt: Texts | None
    negative_prompt: Texts | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    is_guided: bool
    num_images: int
    one_by_one: bool

    def __post_init__(self) -> None:
        check_prompts(self.prompt, self.negative_prompt, self.prompt_embeds, self.negative_prompt_embeds)
        if not isinstance(self.num_images, int) or self.num_images < 1:
            raise ValueError(f"num_images_per_prompt must be an int of at least 1, got {self.num_images!r}.")

    def answered(
        self,
        read: Callable[[list[str]], Tensor],
        read_negative: Callable[[list[str], int], Tensor],
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> PromptPair:
        """A row per image, both halves on one device and of one dtype."""
        if self.one_by_one:
            read, read_negative = _each(read), _each(read_negative)
        pair = self._per_prompt(read, read_negative)

        def placed(states_BLE: Tensor) -> Tensor:
            moved_BLE = states_BLE.to(device=pair.positive.device if device is None else device, dtype=dtype)
            return moved_BLE.repeat_interleave(self.num_images, dim=0)

        return PromptPair(placed(pair.positive), None if pair.negative is None else placed(pair.negative))

    def _per_prompt(
        self, read: Callable[[list[str]], Tensor], read_negative: Callable[[list[str], int], Tensor]
    ) -> PromptPair:
        """A negative text is read at the length of the prompt's embeddings."""
        positive_BLE = self.prompt_embeds if self.prompt is None else read(_listed(self.prompt))
        assert positive_BLE is not None, "check_prompts demands one of prompt and prompt_embeds"
        if not self.is_guided:
            return PromptPair(positive_BLE)

        negative_BLE = self.negative_prompt_embeds
        if negative_BLE is None:
            negative_BLE = read_negative(self._negative_texts(), positive_BLE.shape[1])
        if negative_BLE.shape != positive_BLE.shape:
            raise ValueError(
                f"The embeddings of the prompt have the shape {tuple(positive_BLE.shape)}, the negative ones "
                f"{tuple(negative_BLE.shape)}; make both with the same text encoder, one row per prompt."
            )
        return PromptPair(positive_BLE, negative_BLE)

    def _negative_texts(self) -> list[str]:
        """One text per prompt: "" unless told, and a single text holds for all."""
        count = batch_size(self.prompt, self.prompt_embeds)
        if self.negative_prompt is None:
            return [""] * count
        return [self.negative_prompt] * count if isinstance(self.negative_prompt, str) else list(self.negative_prompt)


def _each(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reading of texts one by one; of equal texts, once."""

    def read_each(texts: list[str], *more: int) -> Tensor:
        states = {text: read([text], *more) for text in dict.fromkeys(texts)}
        return torch.cat([states[text] for text in texts])

    return read_each


def _present(tokenizer: Tokenizer | None, text_encoder: TextEncoder | None) -> tuple[Tokenizer, TextEncoder]:
    if tokenizer is None or text_encoder is None:
        parts = {"a tokenizer": tokenizer, "a text encoder": text_encoder}
        missing = " and ".join(name for name, part in parts.items() if part is None)
        raise ValueError(
            f"Reading a text needs {missing}, and there is none. Pass prompt_embeds, and with guidance also "
            "negative_prompt_embeds, or load the pipeline with its text_encoder and tokenizer."
        )
    return tokenizer, text_encoder


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _place(text_encoder: TextEncoder, device: torch.device | str | None) -> torch.device | str | None:
    """Where the ids go: to the encoder, unless its weights lie elsewhere and are brought when needed."""
    return device if text_encoder.device.type == "meta" else text_encoder.device
