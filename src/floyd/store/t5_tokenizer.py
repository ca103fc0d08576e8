"""T5's tokenizer from its files, on the `tokenizers` library: what transformers' does, without importing all of that.

spiece.model            sentencepiece's unigram model, which all published checkpoints have; sentinels follow its pieces
tokenizer.json          the same, sentinels and added tokens included, as transformers writes it; stronger if present
tokenizer_config.json   names of the special tokens, how many sentinels, how many tokens the network may read
added_tokens.json       tokens behind all of these, in older folders

B texts  L tokens
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from floyd.errors import CheckpointError
from floyd.store import hub
from floyd.store.files import made, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer

SPIECE, WHOLE, CONFIG = "spiece.model", "tokenizer.json", "tokenizer_config.json"
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_UNBOUNDED = 10**30  # what transformers says where nothing is known
_UNIGRAM, _CONTROL, _USER_DEFINED = 1, 3, 4  # of sentencepiece's model format
_SPACE = "▁"


class TokenIds(dict[str, Any]):
    """`input_ids` and `attention_mask`, as keys and as attributes: lists, or tensors [B, L]."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"There is no {key!r}; there are {', '.join(self)}.") from None

    def to(self, device: torch.device | str) -> TokenIds:
        return TokenIds({key: value.to(device) for key, value in self.items()})


class T5Tokenizer:
    """Calling it never changes it, so that many threads may. Only `add_tokens` does."""

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": SPIECE, "tokenizer_file": WHOLE}

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], spiece: bytes | None = None) -> None:
        """`config`: what tokenizer_config.json says. `spiece`: the content of spiece.model, to be saved again."""
        self._tokenizer, self._config, self._spiece = tokenizer, dict(config), spiece
        names = {key: _content(config.get(key) or default) for key, default in _SPECIAL.items()}
        self.pad_token, self.eos_token, self.unk_token = names.values()
        self.model_max_length = int(config.get("model_max_length") or _UNBOUNDED)
        _add_special(tokenizer, names.values())

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        model_max_length: int | None = None,
        **hub_options: Any,
    ) -> Self:
        """From a folder or a repository; `hub_options` are those of `hub.Source`."""
        folder = hub.component(hub.Source(path_or_id, **hub_options), subfolder, with_weights=False)
        config = _told(folder) | ({} if model_max_length is None else {"model_max_length": model_max_length})
        spiece = (folder / SPIECE).read_bytes() if (folder / SPIECE).is_file() else None
        if (folder / WHOLE).is_file():
            tokenizer = _read(folder / WHOLE)
        elif spiece is not None:
            tokenizer = _of_pieces(spiece, int(config.get("extra_ids", 100)), folder / SPIECE)
        else:
            raise CheckpointError(
                f"{folder} does not hold the files of a {cls.__name__}: neither {WHOLE} nor {SPIECE}."
            )
        _add_told(tokenizer, config, folder)
        return cls(tokenizer, config, spiece)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what floyd and transformers read, and spiece.model for those who read no more than that."""
        path = made(folder)
        self._tokenizer.save(str(path / WHOLE))
        if self._spiece is not None:
            (path / SPIECE).write_bytes(self._spiece)
        names = {key: getattr(self, key) for key in _SPECIAL}
        kept = {key: value for key, value in self._config.items() if key != "added_tokens_decoder"}  # in tokenizer.json
        told = {"tokenizer_class": type(self).__name__, "model_max_length": self.model_max_length}
        write_json(path / CONFIG, {**kept, **names, **told})
        write_json(path / "special_tokens_map.json", names)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | Literal["longest", "max_length"] = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: Literal["pt"] | None = None,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> TokenIds:
        """Ids of the tokens, each text closed by `</s>`, and masks of what is not padding.

        With `truncation` a text is cut to `max_length` (`model_max_length` unless told), of which the last closes it;
        `padding` fills up to the longest, or to `max_length`. A `max_length` without a word on either cuts. One text
        alone gives flat lists. `verbose` is transformers' word, and changes nothing here: what is too long for a
        network is for its caller to say.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if any(not isinstance(one, str) for one in texts):
            raise TypeError(f"A text must be a str, got {', '.join(sorted({type(one).__name__ for one in texts}))}.")
        if truncation is None:
            truncation = max_length is not None and padding is False
        length = self.model_max_length if max_length is None else max_length
        rows = [_row(it) for it in self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]
        if truncation:
            rows = [_cut(row, length, closed_by=1 if add_special_tokens else 0) for row in rows]
        if padding:
            longest = max((len(row["input_ids"]) for row in rows), default=0)
            rows = [self._padded(row, length if padding == "max_length" else longest) for row in rows]
        keys = ["input_ids", "attention_mask", *(["offset_mapping"] if return_offsets_mapping else [])]
        columns = {key: [row[key] for row in rows] for key in keys}
        if return_tensors is not None:
            return TokenIds({key: _tensor(column, return_tensors) for key, column in columns.items()})
        return TokenIds(columns if not isinstance(text, str) else {key: column[0] for key, column in columns.items()})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = self._tokenizer.encode(text, add_special_tokens=False).tokens
        return tokens

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def add_tokens(self, new_tokens: Sequence[str | AddedToken]) -> int:
        """How many were new. They get the ids behind all others, which the text encoder must have rows for."""
        return int(self._tokenizer.add_tokens(list(new_tokens)))

    def get_vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or those of several; that of `unk_token` for what is none."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._tokenizer.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        return (
            self._tokenizer.id_to_token(ids) if isinstance(ids, int) else [self.convert_ids_to_tokens(i) for i in ids]
        )

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Without the tokens that were added."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        return self._id(self.unk_token)

    def _id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, model_max_length={self.model_max_length})"

    def _padded(self, row: dict[str, Any], length: int) -> dict[str, Any]:
        missing = max(0, length - len(row["input_ids"]))
        filling = {"input_ids": self.pad_token_id, "attention_mask": 0, "offset_mapping": (0, 0)}
        return {key: [*values, *([filling[key]] * missing)] for key, values in row.items()}


def _row(encoding: Encoding) -> dict[str, Any]:
    ids = encoding.ids
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "offset_mapping": encoding.offsets}


def _cut(row: dict[str, Any], length: int, *, closed_by: int) -> dict[str, Any]:
    """The last tokens are those that close the text, and stay."""
    if len(row["input_ids"]) <= length:
        return row
    return {key: [*values[: length - closed_by], *values[len(values) - closed_by :]] for key, values in row.items()}


def _tensor(column: list[list[Any]], kind: str) -> torch.Tensor:
    if kind != "pt":
        raise ValueError(f"return_tensors must be 'pt' or None, got {kind!r}.")
    if len({len(values) for values in column}) > 1:
        raise ValueError("Texts of different length make no tensor: pass padding=True, or 'max_length' and truncation.")
    return torch.tensor(column)


def _content(token: str | Mapping[str, Any]) -> str:
    """A token's text: files have it bare, or among its options."""
    return token if isinstance(token, str) else str(token["content"])


def _told(folder: Path) -> dict[str, Any]:
    """What the files beside the vocabulary say; the older one has the special tokens alone."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        if (folder / name).is_file():
            found |= read_json(folder / name)
    return found


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises that class itself
        raise CheckpointError(f"{path} is not a tokenizer's file: {error}") from error
    tokenizer.no_padding()  # files keep what was last asked for
    tokenizer.no_truncation()
    return tokenizer


def _of_pieces(spiece: bytes, extra_ids: int, path: Path) -> Tokenizer:
    """sentencepiece's segmentation (arXiv:1808.06226), with T5's sentinels behind the pieces, the last one first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = _parsed(spiece, path)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    pieces = [*((it.piece, it.score) for it in model.pieces), *((name, 0.0) for name in sentinels)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id, byte_fallback=False))
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    spaces: dict[str, Any] = {"replacement": _SPACE, "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    tokenizer.decoder = decoders.Metaspace(**spaces)
    special = [it.piece for it in model.pieces if it.type in (_CONTROL, _USER_DEFINED)]
    _add_special(tokenizer, [*special, *sentinels])
    closing = _SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", closing],
        pair=["$A", closing, "$B", closing],
        special_tokens=[(closing, tokenizer.token_to_id(closing))],
    )
    return tokenizer


def _parsed(spiece: bytes, path: Path) -> Any:
    """sentencepiece's ModelProto."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} cannot be read without: pip install sentencepiece protobuf ({error})."
        ) from error
    try:
        model = ModelProto.FromString(spiece)
    except DecodeError as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}") from error
    if model.trainer_spec.model_type != _UNIGRAM or _SPECIAL["eos_token"] not in {it.piece for it in model.pieces}:
        raise CheckpointError(f"{path} is not T5's kind of sentencepiece model: unigram, with {_SPECIAL['eos_token']}.")
    return model


def _add_told(tokenizer: Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Tokens behind the vocabulary, as tokenizer_config.json or, in older folders, added_tokens.json has them."""
    from tokenizers import AddedToken

    told = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        told = {number: token for token, number in read_json(folder / "added_tokens.json").items()} | told
    for number in sorted(told):
        token = told[number]
        options = {} if isinstance(token, str) else {key: value for key, value in token.items() if key != "content"}
        tokenizer.add_tokens([AddedToken(_content(token), **options)])
        if tokenizer.token_to_id(_content(token)) != number:
            raise CheckpointError(
                f"{folder} says that token {number} is {_content(token)!r}, but its vocabulary has that, or room for "
                f"it, at {tokenizer.token_to_id(_content(token))}."
            )
    _add_special(tokenizer, map(_content, config.get("additional_special_tokens") or ()))


def _add_special(tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """As they stand in a text, and none twice."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
