"""Whole runs on a tiny cascade of 48, 96 and 384 pixels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny

from floyd.adapters.tokens import write_rows
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.run import Moment, Run, tune
from floyd.images.load import load_image
from floyd.models.unet import UNet2DConditionModel
from floyd.pipelines.deepfloyd_if import IFPipeline
from floyd.store.weights import read_file
from floyd.training.embeddings import Embeddings
from floyd.training.loop import Trainer

CAPTIONS = ("a red circle", "A Blue Square", "a large hat", "a cat on a dog", "a small red hat")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def told(folder: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(folder),
        "data": str(data),
        "out": str(tmp_path / "run"),
        "steps": 3,
        "batch": 2,
        "rate": 1e-2,
        "precision": "fp32",
        "device": "cpu",
        "flip": True,
        "crop": "random",
        "rank": 2,
        "alpha": 2.0,
    }


def weights(config: TuneConfig) -> dict[str, torch.Tensor]:
    tune(config)
    path = Run(config).result
    return read_file(path if path.is_file() else path / "diffusion_pytorch_model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def moved(folder: Path, config: TuneConfig, stage: str) -> dict[str, bool]:
    """Which weights of a fully trained network are no longer the checkpoint's."""
    before = UNet2DConditionModel.from_pretrained(folder / stage / "unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(Path(config.out) / "unet").state_dict()
    return {key: not torch.equal(before[key], after[key]) for key in before}


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"ema": 0.5},
    "full": {"method": "full", "optimizer": "muon", "batch": 2},
    "dreambooth": {"method": "dreambooth", "class_prompt": ("a cat", "a dog"), "class_pictures": 3},
    "dreambooth, network": {
        "method": "dreambooth", "class_prompt": ("a cat", "a dog"), "class_pictures": 3, "prior": "network"
    },
    "textual-inversion": {"method": "textual-inversion", "tokens": ("zorp",), "caption": "a zorp"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_twice_ends_as_one_that_was_not(
    method: str, told: dict[str, Any], tmp_path: Path, data: Path
) -> None:
    """Bit for bit: weights, optimizer, order of the data, noise, dropped captions."""
    if method == "textual-inversion":
        told["data"] = str(_without_captions(data, tmp_path))
    whole = TuneConfig.of(**{**told, **METHODS[method]})
    parts = replace(whole, out=str(tmp_path / "parts"))
    expected = weights(whole)
    for done in (1, 2):
        moments = Run(parts).moments()
        next(moment for moment in moments if moment.label == "training" and moment.done == done)
        moments.close()
    assert_equal(expected, weights(parts))


def _without_captions(data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in data.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_shards_teach_what_a_folder_of_the_same_pictures_teaches(
    told: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    paths = sorted(data.iterdir())
    for name, part in (("set-0.tar", paths[:6]), ("set-1.tar", paths[6:])):
        with tarfile.open(tmp_path / name, "w") as shard:
            for path in part:
                shard.add(path, path.name)
    from_shards = {**told, "data": str(tmp_path / "set-{0..1}.tar"), "out": str(tmp_path / "sharded")}
    assert_equal(weights(TuneConfig.of(**told)), weights(TuneConfig.of(**from_shards)))


def test_a_run_that_was_killed_ends_as_one_that_was_not(told: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL amid a step; the snapshot is of some step before."""
    config = TuneConfig.of(**told)
    killed = replace(config, out=str(tmp_path / "killed"), snapshot_every_s=0.0)
    script = (
        "import os, signal, sys, json\n"
        "from floyd.apps.tuning.config import TuneConfig\n"
        "from floyd.apps.tuning.run import Run\n"
        "from floyd.training import denoising\n"
        "loss_of, calls = denoising.Denoising.__call__, []\n"
        "def dying(*args, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return loss_of(*args, **options)\n"
        "denoising.Denoising.__call__ = dying\n"
        "for moment in Run(TuneConfig(**json.loads(sys.argv[1]))).moments(): pass\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = json.dumps({**killed.terms(), "out": killed.out, "device": "cpu", "snapshot_every_s": 0.0})
    done = subprocess.run([sys.executable, "-c", script, settings], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert torch.load(tmp_path / "killed" / "run" / "state.pt", weights_only=True)["step"] == 2
    assert not Run(killed).result.exists()
    assert_equal(weights(config), weights(killed))


def test_the_result_does_not_depend_on_the_pieces_that_a_batch_is_computed_in(
    told: dict[str, Any], tmp_path: Path
) -> None:
    whole = weights(TuneConfig.of(**told))
    config = TuneConfig.of(**{**told, "out": str(tmp_path / "pieces")}, accumulate=2, checkpointing=True)
    pieces = weights(config)
    for key in whole:
        torch.testing.assert_close(pieces[key], whole[key], atol=2e-4, rtol=1e-3)


def test_stage_two_trains_as_super_resolution(told: dict[str, Any]) -> None:
    config = TuneConfig.of(**{**told, "steps": 1, "stage": 2})
    moments = list(Run(config).moments())
    assert set(moments[-1].losses) == {"noise", "variance"}
    assert any(key.endswith("add_k_proj.lora_B.weight") for key in read_file(Run(config).result))


def test_full_fine_tuning_trains_every_weight_the_variance_too(told: dict[str, Any], folder: Path) -> None:
    config = TuneConfig.of(**{**told, "steps": 2}, method="full")
    tune(config)
    assert [key for key, is_moved in moved(folder, config, "stage_1").items() if not is_moved] == []
    before = UNet2DConditionModel.from_pretrained(folder / "stage_1" / "unet").conv_out.weight
    after = UNet2DConditionModel.from_pretrained(Path(config.out) / "unet").conv_out.weight
    assert (before[3:] != after[3:]).all(), "the rows that say the variance"


def test_what_was_trained_paints_with_its_own_scheduler(told: dict[str, Any], folder: Path) -> None:
    config = TuneConfig.of(**{**told, "steps": 2}, method="full")
    tune(config)
    unet = UNet2DConditionModel.from_pretrained(Path(config.out) / "unet")
    pipe = IFPipeline.from_pretrained(folder / "stage_1", unet=unet, requires_safety_checker=False)
    assert pipe.scheduler.config.variance_type == "learned_range"
    (picture,) = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert picture.size == (48, 48)


def test_t5_is_read_once_and_is_not_there_while_the_stage_is_trained(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    from transformers import T5EncoderModel

    def living() -> int:
        gc.collect()
        return sum(type(each) is T5EncoderModel for each in gc.get_objects())

    before, seen = living(), []
    step = Trainer._one_step
    monkeypatch.setattr(Trainer, "_one_step", lambda self: (seen.append(living()), step(self))[1])
    config = TuneConfig.of(**{**told, "steps": 2})
    labels = [moment.label for moment in Run(config).moments()]
    assert labels == ["captions", "training", "training"]
    assert seen == [before, before]
    again = replace(config, steps=3)
    (Path(config.out) / "terms.json").unlink()
    assert [moment.label for moment in Run(again).moments()] == ["training"]


def test_class_pictures_are_painted_by_the_model_and_only_once(told: dict[str, Any]) -> None:
    config = TuneConfig.of(**{**told, "steps": 1}, **METHODS["dreambooth"])
    moments = list(Run(config).moments())
    assert [moment.done for moment in moments if moment.label == "class pictures"] == [2, 3]
    folder = Path(config.out) / "class"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["text"]) for row in rows] == [
        ("00000.png", "a cat"),
        ("00001.png", "a dog"),
        ("00002.png", "a cat"),
    ]
    assert {load_image(path).size for path in folder.glob("*.png")} == {(48, 48)}
    assert set(moments[-1].losses) == {"noise", "noise_kept", "variance", "variance_kept"}
    assert all(moment.label == "training" for moment in Run(config).moments())


def test_validation_paints_the_whole_cascade_and_changes_nothing(told: dict[str, Any], tmp_path: Path) -> None:
    plain = weights(TuneConfig.of(**told))
    config = TuneConfig.of(
        **{**told, "out": str(tmp_path / "watched")},
        validate_every=1,
        validation_prompt=("a red hat", "a cat"),
        validation_size=96,
    )
    painted = [moment.pictures for moment in Run(config).moments() if moment.pictures]
    names = [path.name for paths in painted for path in paths]
    assert names == [f"step-00000{step}-{i}.png" for step in (1, 2, 3) for i in (0, 1)]
    assert {load_image(path).size for paths in painted for path in paths} == {(96, 96)}
    first, last = (Path(config.out) / "validation" / f"step-00000{step}-0.png" for step in (1, 3))
    assert first.read_bytes() != last.read_bytes(), "the network that is trained is the one that paints"
    assert_equal(plain, weights(config))


def test_a_run_is_gone_on_with_as_it_was_begun_or_not_at_all(told: dict[str, Any], data: Path) -> None:
    config = TuneConfig.of(**{**told, "steps": 1})
    tune(config)
    with pytest.raises(ValueError, match=r"was begun otherwise: rate was 0\.01 and is 0\.5"):
        Run(replace(config, rate=0.5))
    Run(replace(config, accumulate=2, snapshot_every_s=1.0))
    terms = json.loads((Path(config.out) / "terms.json").read_text())
    (Path(config.out) / "terms.json").write_text(json.dumps({**terms, "pictures": "others"}))
    with pytest.raises(ValueError, match="pictures was 'others'"):
        Run(config)


def test_the_incumbent_paints_with_the_file_what_floyd_trained(told: dict[str, Any], folder: Path) -> None:
    """The trained network as it stands in memory, and diffusers with the file on the same checkpoint."""
    import diffusers

    config = TuneConfig.of(**{**told, "alpha": 6.0, "steps": 3})
    run, nets = Run(config), []
    model_of = run._model

    def spied(pipe: Any) -> Any:
        nets.append(pipe.unet)
        return model_of(pipe)

    run._model = spied  # type: ignore[method-assign]
    list(run.moments())
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "stage_1" / "unet")
    pipe = diffusers.IFPipeline.from_pretrained(
        folder / "stage_1", unet=theirs, text_encoder=None, tokenizer=None, requires_safety_checker=False
    )
    pipe.load_lora_weights(config.out)
    generator = torch.Generator().manual_seed(0)
    x_BCHW, text_BLE = torch.randn(1, 3, 48, 48, generator=generator), torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        (own,) = nets[0].eval()(x_BCHW, 500, text_BLE, return_dict=False)
        (other,) = pipe.unet.eval()(x_BCHW, 500, text_BLE, return_dict=False)
        plain = UNet2DConditionModel.from_pretrained(folder / "stage_1" / "unet")(x_BCHW, 500, text_BLE).sample
    assert (own - plain).abs().max() > 1e-3
    torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_weights_that_are_not_trained_may_be_in_half_precision(told: dict[str, Any]) -> None:
    state = weights(TuneConfig.of(**{**told, "steps": 2, "dtype": "bfloat16", "precision": "bf16"}))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert any(float(tensor.abs().max()) > 0 for key, tensor in state.items() if "lora_B" in key)


def test_a_learned_word_is_loaded_and_paints_as_it_was_trained(
    told: dict[str, Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    bare = _without_captions(data, tmp_path)
    config = TuneConfig.of(
        **{**told, "data": str(bare), "caption": "a zorp", "steps": 2},
        method="textual-inversion",
        tokens=("zorp",),
        start_word="cat",
    )
    path = tune(config)
    assert path.name == "learned_embeds.safetensors"
    pipe = IFPipeline.from_pretrained(folder / "stage_1", requires_safety_checker=False)
    before = pipe.encode_prompt("a zorp", do_classifier_free_guidance=False)[0]
    others = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    assert pipe.load_textual_inversion(path) == ["zorp"]
    after = pipe.encode_prompt("a zorp", do_classifier_free_guidance=False)[0]
    assert not torch.equal(before, after)
    known = pipe.text_encoder.get_input_embeddings().weight[: len(pipe.tokenizer) - 1]
    assert torch.equal(known, others[: len(known)])
    assert not torch.equal(read_file(path)["zorp"], others[pipe.tokenizer.convert_tokens_to_ids("▁cat")])


def test_a_word_that_was_learned_before_is_gone_on_with(told: dict[str, Any], data: Path, tmp_path: Path) -> None:
    start_E = torch.linspace(-3, 3, tiny.ENCODER_WIDTH)
    words = str(write_rows({"zorp": start_E, "unused": start_E.clone()}, tmp_path / "words"))
    bare = str(_without_captions(data, tmp_path))
    more: dict[str, Any] = {"method": "textual-inversion", "tokens": ("zorp",), "words": words, "weight_decay": 0.0}
    config = TuneConfig.of(**{**told, "data": bare, "caption": "a zorp", "steps": 1, "rate": 1e-3, **more})
    rows = read_file(tune(config))
    assert set(rows) == {"zorp"}
    moved = (rows["zorp"] - start_E).abs()
    assert 0 < moved.max() < 2e-3


def test_lora_is_trained_on_captions_with_a_word_that_was_learned_before(
    told: dict[str, Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    pipe = IFPipeline.from_pretrained(folder / "stage_1", requires_safety_checker=False)
    row_E = torch.linspace(-3, 3, pipe.text_encoder.config.d_model)
    words = str(write_rows({"zorp": row_E}, tmp_path / "words"))
    run = {**told, "data": str(_without_captions(data, tmp_path)), "caption": "a zorp", "steps": 1}
    seen: list[torch.Tensor] = []
    for name, more in (("bare", {}), ("taught", {"words": words})):
        config = TuneConfig.of(**{**run, **more, "out": str(tmp_path / name)})
        tune(config)
        seen.append(Embeddings(Path(config.out) / "text", Run(config).models.encoder_name())(["a zorp"]))
    pipe.load_textual_inversion(words)
    expected = pipe.encode_prompt("a zorp", do_classifier_free_guidance=False)[0]
    assert torch.equal(seen[1], expected)
    assert not torch.equal(seen[0], expected)


def test_words_that_are_not_there_or_in_no_caption_are_refused(told: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is neither an existing folder"):
        Run(TuneConfig.of(**told, words=str(tmp_path / "nowhere")))
    words = str(write_rows({"zorp": torch.zeros(8)}, tmp_path))
    with pytest.raises(ValueError, match="captions contains the token 'zorp'"):
        Run(TuneConfig.of(**told, words=words))


def test_a_token_that_no_caption_has_is_refused_before_anything_is_loaded(told: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="None of the 5 captions contains the token 'zorp'"):
        Run(TuneConfig.of(**told, method="textual-inversion", tokens=("zorp",)))


def test_what_the_model_does_not_have_is_refused_by_name(told: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match=r"stage_1 is no stage 2: its network takes 3 channels, and one of stage 2 6"):
        Run(TuneConfig.of(**{**told, "model": str(folder / "stage_1"), "stage": 2}))
    with pytest.raises(ValueError, match="validation_size must be one of 48, 96, 384"):
        Run(TuneConfig.of(**told, validate_every=1, validation_prompt="x", validation_size=50))
    alone = {"model": str(folder / "stage_2"), "stage": 2}
    with pytest.raises(ValueError, match="Painting takes all stages up to 2, and model names stage_2 alone"):
        Run(TuneConfig.of(**{**told, **alone}, validate_every=1, validation_prompt="x"))


def test_moments_tell_the_time_left(told: dict[str, Any]) -> None:
    last: list[Moment] = [m for m in Run(TuneConfig.of(**{**told, "steps": 2})).moments() if m.label == "training"]
    assert [(moment.done, moment.total) for moment in last] == [(1, 2), (2, 2)]
    assert last[0].seconds_left is not None
    assert last[0].seconds_left > 0
    assert last[1].seconds_left == 0
