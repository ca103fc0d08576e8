"""The whole recipe in small: every part trained a step or two, put together, and painted with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from floyd.apps.mini import recipe, stage_one, stage_three, stage_two, student, text
from floyd.apps.mini.checkpoint import SAMPLING, assemble
from floyd.apps.mini.data import scenes_at, things_of
from floyd.apps.mini.recipe import PARTS, Recipe
from floyd.models.unet import UNet2DConditionModel
from floyd.pipelines.cascade import Cascade
from floyd.scenes.captions import Caption, facts
from floyd.scenes.render import SQUARE_HALF_SIDE
from floyd.scenes.scene import HELD_OUT, Background, Scene, Thing
from floyd.store.weights import read_file
from floyd.training.loop import Phase

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
THIN = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "time_embedding_dim": 32, "attention_head_dim": 8}


def loop(config: Any, size: int, *, batch: int = 2) -> Any:
    phase = Phase(num_steps=2, batch_size=batch, size=size, rate=1e-3, last_rate=1e-3)
    return replace(config, phases=(phase,), precision="fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[tuple[str, dict[str, float]]]]]:
    """The folder of a run, and the losses that were told on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "NUM_CAPTIONS", 300)
        patch.setattr(text, "LOOP", loop(text.LOOP, text.LENGTH, batch=4))
        for stage, size in ((stage_one, 16), (stage_two, 32)):
            patch.setattr(stage, "UNET", {**stage.UNET, **THIN})
            patch.setattr(stage, "LOOP", loop(stage.LOOP, size))
        patch.setattr(stage_three, "UNET", {**stage_three.UNET, "block_out_channels": (8, 8, 16), "norm_num_groups": 4})
        patch.setattr(stage_three, "VAE", {**stage_three.VAE, "block_out_channels": (8, 8, 16)})
        patch.setattr(stage_three, "VAE_LOOP", loop(stage_three.VAE_LOOP, 24))
        patch.setattr(stage_three, "LOOP", loop(stage_three.LOOP, 64))
        normalize = partial(stage_three.normalize_latents, num_pictures=4, side=64)
        patch.setattr(stage_three, "normalize_latents", normalize)
        folder = tmp_path_factory.mktemp("run")
        told = [(part, progress.losses) for part, progress in Recipe(folder).train()]
        assert list(Recipe(folder).train()) == []  # what is finished is not trained again
        assemble(folder, folder / "checkpoint")
        yield folder, told


def test_every_part_is_trained_in_its_order(trained: Any) -> None:
    _, told = trained
    assert [part for part, _ in told] == [part for part in PARTS for _ in range(2)]
    assert all(losses for _, losses in told)
    assert all(Recipe(trained[0]).is_finished(part) for part in PARTS)


def test_the_checkpoint_is_an_ordinary_cascade_in_half_precision(trained: Any) -> None:
    folder, _ = trained
    cascade = Cascade.from_pretrained(folder / "checkpoint", torch_dtype=torch.float16)
    assert cascade.sizes == {"stage_1": 64, "stage_2": 256, "stage_3": 1024}
    assert cascade.presets == SAMPLING
    assert json.loads((folder / "checkpoint" / "floyd.json").read_text()) == SAMPLING
    assert (folder / "checkpoint" / "stage_1" / "tokenizer" / "spiece.model").is_file()


def test_the_checkpoint_paints(trained: Any) -> None:
    folder, _ = trained
    result = Cascade.from_pretrained(folder / "checkpoint")("a large red circle", size=256, steps=1)
    assert [picture.size for picture in result.images] == [(256, 256)]


def test_a_run_can_start_from_a_checkpoint(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = trained[0] / "checkpoint"
    monkeypatch.setattr(stage_one, "UNET", {**stage_one.UNET, **THIN})
    monkeypatch.setattr(stage_one, "LOOP", loop(stage_one.LOOP, 16))
    run = Recipe(tmp_path, start=checkpoint)
    run.check(("stage_1",))
    assert all(run.is_finished(part) for part in PARTS)
    given = UNet2DConditionModel.from_pretrained(tmp_path / "unet_1").state_dict()
    trainer = run._trainer("stage_1")
    assert all(torch.equal(given[key], value) for key, value in trainer.model.unet.state_dict().items())

    assert [part for part, _ in run.train(("stage_1",))] == ["stage_1"] * 2
    made = UNet2DConditionModel.from_pretrained(tmp_path / "unet_1").state_dict()
    assert any(not torch.equal(given[key], made[key]) for key in given)
    assemble(tmp_path, tmp_path / "checkpoint")
    one, other = (read_file(root / "stage_2" / WEIGHTS) for root in (checkpoint, tmp_path / "checkpoint"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match=r"was begun with scale 1\.0, start .*checkpoint, got scale 1\.0: go on"):
        Recipe(tmp_path).check(("stage_1",))


def test_a_student_of_stage_one_begins_as_its_teacher_and_is_kept_beside_it(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "LOOP", loop(student.LOOP, 64))
    run = Recipe(tmp_path, start=trained[0] / "checkpoint")
    run.check(("student",))
    given = UNet2DConditionModel.from_pretrained(tmp_path / "unet_1").state_dict()
    assert all(torch.equal(given[key], value) for key, value in run._trainer("student").model.state_dict().items())
    losses = [progress.losses for _, progress in run.train(("student",))]
    assert [loss["variance"] for loss in losses[:1]] == [0.0]  # guidance leaves it as it is
    assert all(loss["noise"] > 0 for loss in losses)
    kept = UNet2DConditionModel.from_pretrained(tmp_path / "unet_1").state_dict()
    assert all(torch.equal(given[key], value) for key, value in kept.items())
    made = UNet2DConditionModel.from_pretrained(tmp_path / "unet_student").state_dict()
    assert any(not torch.equal(given[key], made[key]) for key in given)
    with pytest.raises(ValueError, match="student builds on stage_1"):
        Recipe(tmp_path / "empty").check(("student",))


@pytest.mark.parametrize("is_told", [False, True])
def test_without_a_scale_or_without_a_text_there_is_nothing_to_imitate(is_told: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(stage_one, "UNET", {**stage_one.UNET, **THIN})
    teacher = tiny.disturbed(stage_one.build_unet())
    text_1LE = torch.randn(1, 77, 128)
    loss_of = student.imitation_loss(
        teacher,
        lambda texts: torch.cat([text_1LE * (bool(text) if is_told else 1) for text in texts]),
        scale=1.0 if is_told else 3.0,
    )
    phase = Phase(num_steps=1, batch_size=2, size=64, rate=1e-3, last_rate=1e-3)
    losses = loss_of(teacher, phase, 0, torch.Generator().manual_seed(0))
    assert all(loss.item() == pytest.approx(0, abs=1e-8) for loss in losses.values())


def test_the_latents_of_the_autoencoder_have_the_variance_that_stage_three_expects(trained: Any) -> None:
    folder, _ = trained
    vae = Recipe(folder).vae()
    scenes = scenes_at(stage_three.VAE_LOOP.seed + 1, 0, 4)
    generator = torch.Generator().manual_seed(stage_three.VAE_LOOP.seed)
    from floyd.apps.mini.data import crops_of
    from floyd.apps.mini.stage_two import windows

    pictures_BCHW = crops_of(scenes, windows(4, 1024, 64, generator))
    with torch.no_grad():
        (latent,) = vae.encode(pictures_BCHW, return_dict=False)
    assert float((latent.mean * stage_three.SCALING_FACTOR).std()) == pytest.approx(1.0, rel=1e-3)


def test_the_two_tokenizers_know_the_words_of_the_captions(trained: Any) -> None:
    from transformers import CLIPTokenizer, T5Tokenizer

    folder, _ = trained
    caption = "a large red circle above a small blue square, white background"
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer")
    words = [piece.removeprefix("▁") for piece in t5.convert_ids_to_tokens(t5(caption).input_ids)]
    assert words == [*caption.replace(",", " ,").split(), "</s>"]
    clip = CLIPTokenizer.from_pretrained(folder / "clip_tokenizer")
    assert clip.unk_token_id not in clip(caption).input_ids[1:-1]
    assert clip.decode(clip("red circle").input_ids, skip_special_tokens=True).strip() == "red circle"


def test_training_never_sees_a_held_out_pair() -> None:
    looks = {(thing.color, thing.shape) for scene, _ in scenes_at(0, 0, 3000) for thing in scene.things}
    assert len(looks) == 8 * 6 - len(HELD_OUT)
    assert not looks & HELD_OUT


def test_things_are_where_the_picture_is_not_background() -> None:
    thing = Thing("square", "red", "large", 0.5, 0.5, 0.25)
    scene = Scene((thing,), Background("plain", "white"), position="center")
    mask_HW = things_of([(scene, Caption("", (), facts(scene)))], 64)[0, 0]
    half = round(0.25 * SQUARE_HALF_SIDE * 64)
    assert mask_HW[32 - half : 32 + half, 32 - half : 32 + half].all()
    assert mask_HW.sum() == (2 * half) ** 2


@pytest.mark.parametrize("size", [16, 32, 64])
def test_every_level_of_stage_one_learns_from_pictures_of_every_size(size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(stage_one, "UNET", {**stage_one.UNET, **THIN})
    model = stage_one.Apprentice(stage_one.build_unet())
    loss_of = stage_one.denoising_loss(lambda texts: torch.randn(len(texts), 77, 128))
    phase = Phase(num_steps=1, batch_size=2, size=size, rate=1e-3, last_rate=1e-3)
    losses = loss_of(model, phase, 0, torch.Generator().manual_seed(0))
    assert ("variance" in losses) == (size == 64)
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    unlearned = [name for name, p in model.named_parameters() if p.grad is None]
    assert unlearned == []


def test_a_step_decides_its_scenes() -> None:
    texts = [[caption.text for _, caption in scenes_at(*key, 4)] for key in ((1, 2), (1, 2), (1, 3), (2, 2))]
    assert texts[0] == texts[1]
    assert len({tuple(each) for each in texts}) == 3


def test_captions_that_are_all_silent_about_a_thing_cost_nothing() -> None:
    logits_NX = torch.randn(3, 5, requires_grad=True)
    loss = text._cross_entropy(logits_NX, torch.full((3,), text.IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits_NX.grad is not None
    assert float(logits_NX.grad.abs().sum()) == 0


def test_a_color_is_not_to_speak_against_a_shape_that_it_never_met() -> None:
    """Held-out pairs are to be read as others are: all wrong answers are to be equally unlikely."""
    even_1X, against_1X = torch.tensor([[4.0, 0.0, 0.0, 0.0]]), torch.tensor([[4.0, 0.0, 0.0, -6.0]])
    target_1 = torch.tensor([0])
    assert text._cross_entropy(even_1X, target_1) < text._cross_entropy(against_1X, target_1)
