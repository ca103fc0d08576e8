"""Loading, saving and moving pipelines: what the incumbent's users do, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.pipelines.compare import assert_same, call_both, quietly

from floyd.errors import CheckpointError
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import IFImg2ImgPipeline, IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.runtime.placement import LayerByLayer, OneAtATime

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}


def test_the_checkpoint_names_the_class(loaded: dict[str, Any]) -> None:
    assert [type(p) for p in loaded.values()] == [
        IFPipeline,
        IFSuperResolutionPipeline,
        StableDiffusionUpscalePipeline,
    ]


def test_a_class_of_choice_is_built_from_anothers_checkpoint(folders: dict[str, Path]) -> None:
    pipe = IFImg2ImgPipeline.from_pretrained(folders["one"])
    assert type(pipe) is IFImg2ImgPipeline
    assert pipe.unet.config.in_channels == 3
    assert pipe.name_or_path == str(folders["one"])


def test_components_build_another_pipeline_over_the_same_networks(ours: dict[str, Any]) -> None:
    pipe = IFImg2ImgPipeline(**ours["one"].components)
    assert pipe.unet is ours["one"].unet
    assert "requires_safety_checker" not in pipe.components
    assert tuple(pipe.components) == IFImg2ImgPipeline.component_names


def test_a_given_component_is_used_and_its_files_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    unet = object.__new__(type("Given", (), {}))
    folder = shutil.copytree(folders["one"], tmp_path / "copy")
    for name in ("unet", "text_encoder", "safety_checker"):
        shutil.rmtree(folder / name)
    pipe = DiffusionPipeline.from_pretrained(folder, unet=unet, text_encoder=None, safety_checker=None)
    assert pipe.unet is unet
    assert pipe.text_encoder is pipe.safety_checker is None
    with pytest.raises(CheckpointError, match="text_encoder"):
        DiffusionPipeline.from_pretrained(folder, unet=unet, safety_checker=None)


def test_the_text_encoder_alone_encodes_and_a_call_says_what_is_missing(folders: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["one"], unet=None, device_map="auto")
    positive, negative = pipe.encode_prompt("a cat")
    assert positive.shape == negative.shape == (1, 77, tiny.ENCODER_WIDTH)
    with pytest.raises(ValueError, match="without its unet"):
        pipe(prompt_embeds=positive, negative_prompt_embeds=negative)


def test_a_missing_component_is_named_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"lacks image_noising_scheduler.*image_noising_scheduler=None"):
        IFSuperResolutionPipeline.from_pretrained(folders["one"])


def test_a_component_that_the_class_does_not_take_is_left(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = IFPipeline.from_pretrained(folders["two"])
    assert not hasattr(pipe, "image_noising_scheduler")
    assert "no use for the checkpoint's image_noising_scheduler" in caplog.text


def test_an_unknown_keyword_is_named_in_a_warning(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    DiffusionPipeline.from_pretrained(folders["two"], unet=None, safty_checker=None)
    assert "does not know safty_checker" in caplog.text


@pytest.mark.parametrize(("word", "scheme"), [("load_in_8bit", "int8"), ("load_in_4bit", "int4")])
def test_bits_in_the_words_of_transformers_are_not_ignored(folders: dict[str, Path], word: str, scheme: str) -> None:
    with pytest.raises(TypeError, match=f"{word} is a word of transformers.*'text_encoder': '{scheme}'"):
        DiffusionPipeline.from_pretrained(folders["one"], **{word: True})


def test_another_kind_of_component_is_named_in_a_warning(
    folders: dict[str, Path], ours: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    DiffusionPipeline.from_pretrained(folders["two"], unet=ours["three"].vae)
    assert "unet is a AutoencoderKL; the checkpoint names a UNet2DConditionModel" in caplog.text


def test_a_pipeline_that_floyd_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="FluxPipeline, which floyd does not have"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_the_precision_is_the_callers(folders: dict[str, Path]) -> None:
    half = DiffusionPipeline.from_pretrained(folders["two"], torch_dtype=torch.float16)
    assert half.dtype == half.unet.dtype == torch.float16
    mixed = DiffusionPipeline.from_pretrained(
        folders["one"], dtype={"text_encoder": torch.bfloat16, "default": "float16"}
    )
    assert (mixed.text_encoder.dtype, mixed.unet.dtype) == (torch.bfloat16, torch.float16)
    plain = DiffusionPipeline.from_pretrained(folders["one"], dtype={"unet": torch.float16})
    assert (plain.text_encoder.dtype, plain.unet.dtype) == (torch.float32, torch.float16)
    with pytest.raises(ValueError, match="say the same thing"):
        DiffusionPipeline.from_pretrained(folders["two"], torch_dtype=torch.float16, dtype=torch.float32)
    with pytest.raises(ValueError, match="torch_dtype must be"):
        DiffusionPipeline.from_pretrained(folders["two"], torch_dtype={"unet": "float17"})


def test_device_map_places_the_whole_pipeline(folders: dict[str, Path]) -> None:
    for device_map in ("cpu", CPU, None):
        assert DiffusionPipeline.from_pretrained(folders["two"], device_map=device_map).device == CPU
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else CPU
    for device_map in ("auto", "balanced"):
        assert DiffusionPipeline.from_pretrained(folders["two"], device_map=device_map).device.type == best.type
    with pytest.raises(ValueError, match=r"'auto', 'balanced' or a device.*'sideways'"):
        DiffusionPipeline.from_pretrained(folders["two"], device_map="sideways")


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    folders: dict[str, Path], ours: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="cannot compute on 'cuda:99'"):
        DiffusionPipeline.from_pretrained(folders["one"] / "..", device_map="cuda:99")  # no checkpoint is there
    with pytest.raises(ValueError, match="cannot compute on 'cuda:99'"):
        ours["one"].to("cuda:99")
    with pytest.raises(ValueError, match="cannot compute on 'cuda:99'"):
        ours["one"].enable_model_cpu_offload(device="cuda:99")
    ours["one"]("a cat", **SMALL)  # and nothing has changed


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_leaves_alone_what_is_quantized(ours: dict[str, Any], method: str) -> None:
    class Quantized(torch.nn.Linear):
        is_quantized = True

        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("a quantized network cannot be moved")

    pipe = IFPipeline.from_pipe(ours["one"], text_encoder=Quantized(1, 1))
    getattr(pipe, method)(device="meta")
    assert pipe._device_for(pipe.unet).type == "meta"
    assert pipe._device_for(pipe.text_encoder) == CPU


@pytest.mark.parametrize(
    "how", [{"max_shard_size": "1MB"}, {"variant": "fp16"}, {"safe_serialization": False}], ids=str
)
def test_what_the_incumbent_saved_floyd_loads(theirs: dict[str, Any], tmp_path: Path, how: dict[str, Any]) -> None:
    tiny.save(theirs["two"], tmp_path, **how)
    variant = how.get("variant")
    pipe = DiffusionPipeline.from_pretrained(tmp_path, variant=variant)
    for key, weight in theirs["two"].unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[key], weight)
    if variant is not None:
        with pytest.raises(ValueError, match="fp16"):
            DiffusionPipeline.from_pretrained(tmp_path, variant="fp8")


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "1MB"}, {"variant": "fp16"}], ids=str)
def test_what_floyd_saved_the_incumbent_loads(ours: dict[str, Any], tmp_path: Path, how: dict[str, Any]) -> None:
    ours["one"].save_pretrained(tmp_path, **how)
    with quietly():  # it cannot load its own safety checker, either: transformers 5 expects of it what it lacks
        back = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant=how.get("variant"), safety_checker=None)
    assert type(back) is diffusers.IFPipeline
    assert back.config.requires_safety_checker is False
    back.set_progress_bar_config(disable=True)
    mine, other = call_both(ours["one"], back, prompt="a red circle", **SMALL)
    assert_same(mine.images, other.images)


def test_a_saved_safety_checker_is_the_incumbents_file(
    ours: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    ours["one"].save_pretrained(tmp_path)
    mine, theirs = (load_file(folder / "safety_checker" / "model.safetensors") for folder in (tmp_path, folders["one"]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    index, other = (json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path, folders["one"]))
    assert index["safety_checker"] == other["safety_checker"] == ["deepfloyd_if", "IFSafetyChecker"]
    assert index["watermarker"] == other["watermarker"] == ["deepfloyd_if", "IFWatermarker"]


def test_stage_three_survives_both_ways(ours: dict[str, Any], tmp_path: Path) -> None:
    ours["three"].save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["max_noise_level"] == 350
    with quietly():
        back = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(back) is diffusers.StableDiffusionUpscalePipeline
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionUpscalePipeline


def test_moving_casts_every_network(folders: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["one"])
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.safety_checker.dtype} == {torch.bfloat16}
    assert pipe.to(device="cpu", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(TypeError, match="a device, a dtype or both"):
        pipe.to(None, 1.5)
    with pytest.raises(ValueError, match="floating"):
        pipe.to(torch.int8)


def test_a_quantized_network_keeps_its_precision_and_place(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    class Quantized(torch.nn.Linear):
        is_quantized = True

        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("a quantized network cannot be moved")

    pipe = DiffusionPipeline.from_pretrained(folders["one"], text_encoder=Quantized(1, 1), device_map="cpu")
    pipe.to("cpu", torch.bfloat16)
    assert "text_encoder is quantized" in caplog.text
    assert (pipe.text_encoder.weight.dtype, pipe.unet.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_offloading_without_an_accelerator_is_a_note_and_nothing_else(
    ours: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        ours["one"].enable_model_cpu_offload()
        ours["one"].enable_sequential_cpu_offload()
    assert caplog.text.count("no accelerator") == 2
    assert ours["one"].device == CPU
    ours["one"]("a cat", **SMALL)


@pytest.mark.parametrize("plan", [OneAtATime, LayerByLayer])
def test_an_offloaded_pipeline_paints_the_same(ours: dict[str, Any], plan: Any) -> None:
    def paint() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        picture: torch.Tensor = ours["one"]("a cat", generator=generator, **SMALL).images
        return picture

    resident = paint()
    ours["one"]._place(plan(CPU))
    torch.testing.assert_close(paint(), resident, atol=1e-4, rtol=0)  # layers that are watched are not rewritten
    hooks = [m for m in ours["one"].unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_leaves_the_networks_in_main_memory(folders: dict[str, Path], method: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["one"])
    pipe.set_progress_bar_config(disable=True)
    resident = pipe("a cat", generator=torch.Generator().manual_seed(0), **SMALL).images
    getattr(pipe, method)()
    picture = pipe("a cat", generator=torch.Generator().manual_seed(0), **SMALL).images
    assert picture.device.type == "cuda"
    assert pipe.unet.device == pipe.text_encoder.device == CPU
    assert_same(picture.cpu(), resident, atol=1e-2)


def test_the_bare_class_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="use from_pretrained"):
        DiffusionPipeline()


def test_a_progress_bar_counts_the_steps(ours: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    ours["one"].set_progress_bar_config(desc="painting")
    ours["one"]("a cat", **SMALL)
    assert "painting" in capsys.readouterr().err
    ours["one"].set_progress_bar_config(disable=True)
    ours["one"]("a cat", **SMALL)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="either an iterable or a total"):
        ours["one"].progress_bar()


def test_a_pipeline_shows_what_it_holds(ours: dict[str, Any]) -> None:
    assert "unet: UNet2DConditionModel" in repr(ours["one"])
