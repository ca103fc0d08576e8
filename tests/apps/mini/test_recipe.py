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

from floyd.apps.mini import recipe, stage_one, stage_three, stage_two, text
from floyd.apps.mini.data import scenes_at
from floyd.apps.mini.recipe import PARTS, SAMPLING, Recipe, assemble
from floyd.pipelines.cascade import Cascade
from floyd.scenes.scene import HELD_OUT
from floyd.training.loop import Phase

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
