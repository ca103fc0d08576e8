"""T5's tokenizer beside that of transformers: the same files, the same ids."""

from __future__ import annotations

import json
import pickle
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.conftest import t5_tokenizer_files
from transformers import AddedToken
from transformers import T5Tokenizer as Theirs

from floyd.errors import CheckpointError
from floyd.store.t5_tokenizer import T5Tokenizer

_WORDS = "a photo of the kangaroo wearing an orange hoodie in front eiffel tower red green square circle".split()
_ODD = [
    "",
    " ",
    "  two   spaces ",
    "line\nbreak\ttab",
    "<pad>",
    "a </s> b",
    "<extra_id_3>",
    "<unk>x",
    "ﬁ ½ ＡＢ",
    "猫",
    "▁a",
]

TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from([*_WORDS, *_ODD, ",", ".", "é", "e\u0301", "\u00a0", "\u200b", "🦘"]), max_size=12
).map(" ".join)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, spiece: bytes) -> Path:
    """The files of IF's repositories."""
    return t5_tokenizer_files(tmp_path_factory.mktemp("published"), spiece)


@pytest.fixture(scope="module")
def saved_by_transformers(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json, with a learned word in it, and with the padding and the cut of the last call."""
    folder: Path = tmp_path_factory.mktemp("saved")
    theirs = Theirs.from_pretrained(published)
    theirs.add_tokens([AddedToken("zorp", single_word=True, lstrip=True, normalized=False)])
    theirs(["a photo", "a"], padding="max_length", max_length=9, truncation=True)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(params=["published", "saved_by_transformers", "built-in"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "built-in":
        return Path(str(files("floyd"))) / "mini" / "stage_1" / "tokenizer"
    found: Path = request.getfixturevalue(request.param)
    return found


_PAIRS: dict[Path, tuple[T5Tokenizer, Theirs]] = {}


def pair(folder: Path) -> tuple[T5Tokenizer, Theirs]:
    if folder not in _PAIRS:
        _PAIRS[folder] = T5Tokenizer.from_pretrained(folder), Theirs.from_pretrained(folder)
    return _PAIRS[folder]


@MANY
@given(text=TEXTS)
def test_its_ids_are_those_of_transformers(folder: Path, text: str) -> None:
    ours, theirs = pair(folder)
    ids = ours(text).input_ids
    assert ids == theirs(text).input_ids
    assert ours.encode(text) == ids
    assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(torch.tensor(ids), skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@MANY
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), length=st.integers(2, 30), data=st.data())
def test_it_pads_and_cuts_as_transformers_does(folder: Path, texts: list[str], length: int, data: Any) -> None:
    ours, theirs = pair(folder)
    options = {
        "padding": data.draw(st.sampled_from([False, True, "longest", "max_length"])),
        "truncation": data.draw(st.sampled_from([True, False, None])),
        "max_length": length,
        "add_special_tokens": data.draw(st.booleans()),
        "return_offsets_mapping": True,
    }
    found, expected = ours(texts, **options), theirs(texts, **options, verbose=False)
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key] == expected[key], key


def test_it_knows_what_transformers_knows(folder: Path) -> None:
    ours, theirs = pair(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (len(ours), ours.model_max_length) == (len(theirs), theirs.model_max_length)
    for name in ("pad_token", "eos_token", "unk_token", "pad_token_id", "eos_token_id", "unk_token_id", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    words = ["▁a", "</s>", "nowhere", "<extra_id_7>"]
    assert ours.convert_tokens_to_ids(words) == theirs.convert_tokens_to_ids(words)
    assert ours.convert_ids_to_tokens([0, 1, 2, 9]) == theirs.convert_ids_to_tokens([0, 1, 2, 9])
    assert ours.batch_decode([[5, 6], [7]]) == theirs.batch_decode([[5, 6], [7]])


def test_tensors_of_texts_and_of_one_text(published: Path) -> None:
    ours, theirs = pair(published)
    options: dict[str, Any] = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    for texts in ("a photo", ["a photo", "the red circle"]):
        found, expected = ours(texts, **options), theirs(texts, **options)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found["attention_mask"], expected["attention_mask"])
        assert found.to("cpu").input_ids.dtype == torch.long
    with pytest.raises(ValueError, match="make no tensor: pass padding=True"):
        ours(["a", "a photo of"], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors must be 'pt' or None, got 'np'"):
        ours("a", return_tensors="np")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="A text must be a str, got int"):
        ours(["a", 3])  # type: ignore[list-item]
    with pytest.raises(AttributeError, match="no 'ids'; there are input_ids, attention_mask"):
        _ = ours("a").ids


@pytest.mark.parametrize("source", ["published", "saved_by_transformers"])
def test_transformers_reads_what_it_saves(request: pytest.FixtureRequest, tmp_path: Path, source: str) -> None:
    ours = T5Tokenizer.from_pretrained(request.getfixturevalue(source))
    new = AddedToken("blorb", single_word=True, lstrip=True, rstrip=False, normalized=False)
    assert ours.add_tokens([new]) == 1
    assert ours.add_tokens([new]) == 0
    ours.save_pretrained(tmp_path)
    for again in (T5Tokenizer.from_pretrained(tmp_path), Theirs.from_pretrained(tmp_path)):
        for text in ("a blorb in front", "blorbs", "a zorp", *_ODD):
            assert again(text).input_ids == ours(text).input_ids, text
        assert (again.model_max_length, again.pad_token) == (512, "<pad>")
        assert again.convert_tokens_to_ids("blorb") == len(ours) - 1
    assert (tmp_path / "spiece.model").is_file() == (source == "published")


def test_words_of_older_folders_come_behind_the_vocabulary(published: Path, tmp_path: Path) -> None:
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    behind = len(pair(published)[0])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"second": behind + 1, "first": behind}))
    ours = T5Tokenizer.from_pretrained(tmp_path)
    assert ours.convert_tokens_to_ids(["first", "second"]) == [behind, behind + 1]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"first": behind + 5}))
    with pytest.raises(CheckpointError, match=f"token {behind + 5} is 'first', but .* at {behind}"):
        T5Tokenizer.from_pretrained(tmp_path)


def test_a_copy_learns_by_itself(published: Path) -> None:
    ours = T5Tokenizer.from_pretrained(published)
    copy = pickle.loads(pickle.dumps(ours))
    copy.add_tokens(["blorb"])
    assert (len(copy), len(ours)) == (len(ours) + 1, len(pair(published)[0]))
    assert copy("a photo").input_ids == ours("a photo").input_ids


def test_the_cut_of_a_file_is_not_that_of_a_call(saved_by_transformers: Path) -> None:
    assert json.loads((saved_by_transformers / "tokenizer.json").read_text())["truncation"]["max_length"] == 9
    ours = T5Tokenizer.from_pretrained(saved_by_transformers)
    assert len(ours("the red square in front of the green circle of the kangaroo").input_ids) > 9
    assert len(ours("a").input_ids) == 2


def test_files_of_something_else_are_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor spiece\.model"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"spiece\.model is not a sentencepiece model"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not T5's kind of sentencepiece model"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer's file"):
        T5Tokenizer.from_pretrained(tmp_path)


def test_it_says_how_large_it_is(published: Path) -> None:
    ours = T5Tokenizer.from_pretrained(published, model_max_length=33)
    assert repr(ours) == f"T5Tokenizer({len(ours)} tokens, model_max_length=33)"
