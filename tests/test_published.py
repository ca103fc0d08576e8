"""The published checkpoints in all their forms, from the hub's cache: tiny ones, laid out as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub_cache import COMMIT, IDS, STAGE_ONE, STAGE_THREE, STAGE_TWO
from tests.hub_configs import SIDES
from tests.pipelines.compare import quietly
from transformers import T5EncoderModel

from floyd import Cascade, DiffusionPipeline, UNet2DConditionModel
from floyd.errors import CheckpointError, DownloadError

FORMS: list[dict[str, Any]] = [
    {},
    {"variant": "fp16"},
    {"variant": "fp16", "torch_dtype": torch.float16},
    {"use_safetensors": True},
    {"use_safetensors": False},
    {"variant": "fp16", "use_safetensors": False},
]


def folder_of(cache: Path, repo_id: str) -> Path:
    return cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


@pytest.mark.parametrize("repo_id", IDS)
def test_a_published_checkpoint_loads_in_every_form(published: Path, repo_id: str) -> None:
    whole = weights(DiffusionPipeline.from_pretrained(repo_id))
    assert {tensor.dtype for tensor in whole.values() if tensor.is_floating_point()} == {torch.float32}
    for form in FORMS[1:]:
        if form == {"use_safetensors": True} and repo_id == STAGE_TWO[1]:
            continue  # its watermark is pickled alone
        other = weights(DiffusionPipeline.from_pretrained(repo_id, **form))
        assert other.keys() == whole.keys()
        for key, tensor in other.items():
            atol = 1e-3 if "variant" in form and ".wo." not in key and "watermark" not in key else 0
            torch.testing.assert_close(tensor.float(), whole[key].float(), atol=atol, rtol=1e-3 if atol else 0)


def test_both_orders_of_a_shards_name_are_there_to_be_read(published: Path) -> None:
    newer, older = (folder_of(published, repo_id) / "text_encoder" for repo_id in STAGE_ONE[:2])
    assert (newer / "model.fp16-00001-of-00002.safetensors").is_file()
    assert (newer / "model.safetensors.index.fp16.json").is_file()
    assert (older / "model-00001-of-00002.fp16.safetensors").is_file()
    assert (older / "model.safetensors.fp16.index.json").is_file()


def test_transformers_reads_the_t5_of_the_cache(published: Path) -> None:
    ours = DiffusionPipeline.from_pretrained(STAGE_ONE[0], unet=None, safety_checker=None).text_encoder.state_dict()
    for options in ({}, {"variant": "fp16"}):
        theirs = T5EncoderModel.from_pretrained(
            STAGE_ONE[0], subfolder="text_encoder", dtype=torch.float32, **options
        ).state_dict()
        assert theirs.keys() == ours.keys() | {"encoder.embed_tokens.weight"}  # the shared one, by a second name
        assert all(torch.allclose(theirs[key], ours[key], atol=1e-3) for key in ours)


def test_the_feed_forward_output_of_t5_stays_in_float32_beside_half_precision(published: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(STAGE_ONE[0], variant="fp16", torch_dtype=torch.float16)
    dtypes = {key.rpartition(".wo.")[1]: p.dtype for key, p in pipe.text_encoder.named_parameters()}
    assert dtypes == {"": torch.float16, ".wo.": torch.float32}


@pytest.mark.parametrize("repo_id", [STAGE_ONE[0], STAGE_ONE[1], STAGE_TWO[1]])
def test_the_watermark_is_read_whatever_its_class_is_called_and_however_it_is_stored(
    published: Path, repo_id: str
) -> None:
    pipe = DiffusionPipeline.from_pretrained(repo_id, text_encoder=None)
    assert pipe.watermarker.picture.shape == (62, 62, 4)
    assert pipe.watermarker.picture[0, 0].tolist() == [255, 0, 0, 128]
    names = {json.loads((folder_of(published, r) / "model_index.json").read_text())["watermarker"][1] for r in IDS[:5]}
    assert names == {"IFWatermark", "IFWatermarker"}


def test_keys_of_other_versions_survive_a_load_and_a_save(published: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(STAGE_ONE[0], text_encoder=None)
    assert pipe.scheduler.config["lambda_min_clipped"] == -5.1
    DiffusionPipeline.from_pretrained(STAGE_THREE[0]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert saved["skip_prk_steps"] is True


def test_a_quantized_variant_is_refused_with_what_to_load_instead(published: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantized.*load the plain or fp16 weights and quantize those"):
        DiffusionPipeline.from_pretrained(STAGE_ONE[0], variant="8bit", unet=None, safety_checker=None)


def test_an_8bit_t5_that_lost_its_scales_is_noticed(published: Path) -> None:
    """transformers leaves the scales of such files out, and says so only in a report."""
    pipe = DiffusionPipeline.from_pretrained(STAGE_ONE[0], unet=None, safety_checker=None)
    with torch.no_grad():
        pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite.*8bit"):
        pipe.encode_prompt("a photo")


def test_only_the_precision_of_networks_is_missed(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The watermark has none: that it comes in no variant is nobody's worry."""
    DiffusionPipeline.from_pretrained(STAGE_ONE[0], variant="fp16", torch_dtype=torch.float16)
    assert "mixes variants" not in caplog.text


def test_one_model_of_a_checkpoint_loads_by_its_class(published: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(
        STAGE_TWO[0], subfolder="unet", variant="fp16", torch_dtype=torch.float16
    )
    assert (unet.dtype, unet.config.in_channels, unet.config.sample_size) == (torch.float16, 6, SIDES["stage_2"])


def test_the_cascade_of_published_checkpoints_paints_all_stages(published: Path) -> None:
    cascade = Cascade.from_pretrained(
        STAGE_ONE[0], STAGE_TWO[0], STAGE_THREE[0], variant="fp16", torch_dtype=torch.float16
    )
    assert cascade.sizes == SIDES
    result = cascade("a photo of a kangaroo", steps=3, seed=1)
    assert [picture.size for stage in result.stages.values() for picture in stage] == [
        (side, side) for side in SIDES.values()
    ]


def test_what_is_not_in_the_cache_is_named_with_what_to_do(published: Path) -> None:
    with pytest.raises(DownloadError, match=r"IF-III-L-v1.0 is not in the cache.*offline"):
        DiffusionPipeline.from_pretrained("DeepFloyd/IF-III-L-v1.0")


@pytest.mark.parametrize("repo_id", [STAGE_ONE[0], STAGE_TWO[1], STAGE_THREE[0]])
def test_the_incumbent_reads_the_same_cache(published: Path, repo_id: str) -> None:
    """The layout is the real one, not one of our making."""
    import diffusers

    safety = {"safety_checker": None, "feature_extractor": None}  # it cannot load the checker
    with quietly():
        theirs = diffusers.DiffusionPipeline.from_pretrained(repo_id, variant="fp16", **safety)
    ours = DiffusionPipeline.from_pretrained(repo_id, variant="fp16", **safety)
    assert type(theirs).__name__ == type(ours).__name__
    theirs_unet = theirs.unet.state_dict()
    assert theirs_unet.keys() == ours.unet.state_dict().keys()
    assert all(torch.equal(theirs_unet[key], tensor) for key, tensor in ours.unet.state_dict().items())
