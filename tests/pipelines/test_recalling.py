"""Pipelines that remember what was said of a prompt: the same pictures, and an encoder that stays where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from floyd import Cascade, DiffusionPipeline, IFImg2ImgPipeline
from floyd.runtime.placement import OneAtATime
from floyd.text.cache import TextCache

SMALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.stage_one(), tmp_path_factory.mktemp("one"))


def painted(pipe: Any, prompt: Any = "a red cat") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **SMALL).images


def silenced(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the encoder was asked")

    monkeypatch.setattr(pipe.text_encoder, "forward", refuse)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_the_second_call_reads_no_text_and_paints_the_same(
    folder: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "texts" if where == "folder" else where
    pipe = DiffusionPipeline.from_pretrained(folder, text_cache=told)
    plain = painted(DiffusionPipeline.from_pretrained(folder))
    assert torch.equal(painted(pipe), plain)
    if where == "folder":
        pipe = DiffusionPipeline.from_pretrained(folder, text_cache=told)
    silenced(pipe, monkeypatch)
    assert torch.equal(painted(pipe), plain)
    assert torch.equal(painted(IFImg2ImgPipeline.from_pipe(pipe).text_cache and pipe), plain)
    with pytest.raises(AssertionError, match="was asked"):
        painted(pipe, "a dog")


def test_an_encoder_with_nothing_to_read_is_not_brought_to_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for two new texts it travels once."""
    pipe = DiffusionPipeline.from_pretrained(folder, text_cache="memory")
    visits: list[object] = []
    use = OneAtATime.use
    monkeypatch.setattr(OneAtATime, "use", lambda plan, module: visits.append(module) or use(plan, module))
    pipe._place(OneAtATime(torch.device("cpu")))
    for expected in (1, 0):
        pipe.encode_prompt("a red cat")
        assert len(visits) == expected
        visits.clear()


def test_a_changed_encoder_reads_anew(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, text_cache="memory")
    before = pipe.encode_prompt("a cat")[0]
    with torch.no_grad():
        pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight += 0.3
    assert not torch.equal(pipe.encode_prompt("a cat")[0], before)


def test_batch_invariant_calls_have_entries_of_their_own(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, text_cache="memory")
    pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
    pipe.encode_prompt("a cat", do_classifier_free_guidance=False, batch_invariant=True)
    assert len(pipe.text_cache) == 2


def test_a_cascade_shares_one_folder_and_other_caches_are_refused(tmp_path: Path) -> None:
    cascade = Cascade.built_in(text_cache=tmp_path / "texts")
    for name in ("stage_1", "stage_3"):
        cascade.stages[name].encode_prompt("a red circle")
    assert len(list((tmp_path / "texts").iterdir())) == 4
    cache = TextCache()
    assert Cascade.built_in(text_cache=cache).stages["stage_1"].text_cache is cache
    for wrong in (3, ""):
        with pytest.raises(TypeError, match="text_cache must be"):
            Cascade.built_in(text_cache=wrong)
