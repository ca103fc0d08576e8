"""A script written after the incumbent's page on IF runs with `floyd` for `diffusers`: each recipe of that page, with
its slips mended (a doubled keyword, a missing import, an argument that transformers no longer takes).

The checkpoints are tiny ones under the real ids, the machine has no network, no GPU and perhaps no bitsandbytes. Where
the page says float16, float32 stands on a processor that would take minutes to emulate it. Many steps are a few.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import standins
from tests.hub_configs import SIDES

from floyd.runtime.machine import computes_in

HALF = torch.float16 if computes_in(torch.float16, torch.device("cpu")) else torch.float32

pytestmark = pytest.mark.usefixtures("published")


@pytest.fixture
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.take_fewer_steps(monkeypatch)


KANGAROO = (
    "a photo of a kangaroo wearing an orange hoodie and blue sunglasses standing in front of the eiffel tower holding "
    'a sign that says "very deep learning"'
)
SKETCH = (
    "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/assets/stable-samples/img2img/"
    "sketch-mountains-input.jpg"
)
PERSON = "https://huggingface.co/datasets/diffusers/docs-images/resolve/main/if/person.png"
GLASSES = "https://huggingface.co/datasets/diffusers/docs-images/resolve/main/if/glasses_mask.png"


def stage_three(stage_1: Any) -> Any:
    from floyd import DiffusionPipeline

    safety_modules = {
        "feature_extractor": stage_1.feature_extractor,
        "safety_checker": stage_1.safety_checker,
        "watermarker": stage_1.watermarker,
    }
    stage_3 = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-x4-upscaler", **safety_modules, torch_dtype=HALF
    )
    stage_3.enable_model_cpu_offload()
    return stage_3


def is_painted(picture: Image.Image, width: int, height: int) -> bool:
    return picture.size == (width, height) and float(np.asarray(picture).std()) > 2


@pytest.mark.usefixtures("fewer_steps")
def test_text_to_image() -> None:
    from floyd import DiffusionPipeline
    from floyd.utils import make_image_grid, pt_to_pil

    stage_1 = DiffusionPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    stage_1.enable_model_cpu_offload()
    stage_2 = DiffusionPipeline.from_pretrained(
        "DeepFloyd/IF-II-L-v1.0", text_encoder=None, variant="fp16", torch_dtype=HALF
    )
    stage_2.enable_model_cpu_offload()
    stage_3 = stage_three(stage_1)

    generator = torch.manual_seed(1)
    prompt_embeds, negative_embeds = stage_1.encode_prompt(KANGAROO)
    stage_1_output = stage_1(
        prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_embeds, generator=generator, output_type="pt"
    ).images
    stage_2_output = stage_2(
        image=stage_1_output,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        generator=generator,
        output_type="pt",
    ).images
    stage_3_output = stage_3(prompt=KANGAROO, image=stage_2_output, noise_level=100, generator=generator).images
    pictures = [pt_to_pil(stage_1_output)[0], pt_to_pil(stage_2_output)[0], stage_3_output[0]]
    grid = make_image_grid(pictures, rows=1, cols=3)

    assert all(is_painted(picture, side, side) for picture, side in zip(pictures, SIDES.values(), strict=True))
    assert grid.size == (3 * SIDES["stage_3"], SIDES["stage_3"])
    assert stage_1.safety_checker is stage_3.safety_checker


@pytest.mark.usefixtures("fewer_steps")
def test_text_guided_image_to_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = standins.serve_pictures(monkeypatch)
    from floyd import IFImg2ImgPipeline, IFImg2ImgSuperResolutionPipeline
    from floyd.utils import load_image, make_image_grid, pt_to_pil

    original_image = load_image(SKETCH)
    original_image = original_image.resize((768, 512))
    stage_1 = IFImg2ImgPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    stage_1.enable_model_cpu_offload()
    stage_2 = IFImg2ImgSuperResolutionPipeline.from_pretrained(
        "DeepFloyd/IF-II-L-v1.0", text_encoder=None, variant="fp16", torch_dtype=HALF
    )
    stage_2.enable_model_cpu_offload()
    stage_3 = stage_three(stage_1)

    prompt = "A fantasy landscape in style minecraft"
    generator = torch.manual_seed(1)
    prompt_embeds, negative_embeds = stage_1.encode_prompt(prompt)
    stage_1_output = stage_1(
        image=original_image,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        generator=generator,
        output_type="pt",
    ).images
    stage_2_output = stage_2(
        image=stage_1_output,
        original_image=original_image,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        generator=generator,
        output_type="pt",
    ).images
    stage_3_output = stage_3(prompt=prompt, image=stage_2_output, generator=generator, noise_level=100).images
    pictures = [pt_to_pil(stage_1_output)[0], pt_to_pil(stage_2_output)[0], stage_3_output[0]]
    make_image_grid([original_image, *pictures], rows=1, cols=4)

    assert asked == [SKETCH]
    for picture, side in zip(pictures, SIDES.values(), strict=True):
        assert is_painted(picture, side * 3 // 2, side), "a picture of 3:2 keeps its shape"


@pytest.mark.usefixtures("fewer_steps")
def test_text_guided_inpainting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = standins.serve_pictures(monkeypatch)
    from floyd import IFInpaintingPipeline, IFInpaintingSuperResolutionPipeline
    from floyd.utils import load_image, make_image_grid, pt_to_pil

    original_image = load_image(PERSON)
    mask_image = load_image(GLASSES)
    stage_1 = IFInpaintingPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    stage_1.enable_model_cpu_offload()
    stage_2 = IFInpaintingSuperResolutionPipeline.from_pretrained(
        "DeepFloyd/IF-II-L-v1.0", text_encoder=None, variant="fp16", torch_dtype=HALF
    )
    stage_2.enable_model_cpu_offload()
    stage_3 = stage_three(stage_1)

    prompt = "blue sunglasses"
    generator = torch.manual_seed(1)
    prompt_embeds, negative_embeds = stage_1.encode_prompt(prompt)
    stage_1_output = stage_1(
        image=original_image,
        mask_image=mask_image,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        generator=generator,
        output_type="pt",
    ).images
    stage_2_output = stage_2(
        image=stage_1_output,
        original_image=original_image,
        mask_image=mask_image,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        generator=generator,
        output_type="pt",
    ).images
    stage_3_output = stage_3(prompt=prompt, image=stage_2_output, generator=generator, noise_level=100).images
    pictures = [pt_to_pil(stage_1_output)[0], pt_to_pil(stage_2_output)[0], stage_3_output[0]]
    make_image_grid([original_image, mask_image, *pictures], rows=1, cols=5)

    assert asked == [PERSON, GLASSES]
    assert all(is_painted(picture, side, side) for picture, side in zip(pictures, SIDES.values(), strict=True))


def test_converting_between_pipelines() -> None:
    from floyd import IFPipeline, IFSuperResolutionPipeline

    pipe_1 = IFPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0")
    pipe_2 = IFSuperResolutionPipeline.from_pretrained("DeepFloyd/IF-II-L-v1.0")
    networks = pipe_1.unet, pipe_1.text_encoder, pipe_2.unet

    from floyd import IFImg2ImgPipeline, IFImg2ImgSuperResolutionPipeline

    pipe_1 = IFImg2ImgPipeline(**pipe_1.components)
    pipe_2 = IFImg2ImgSuperResolutionPipeline(**pipe_2.components)

    from floyd import IFInpaintingPipeline, IFInpaintingSuperResolutionPipeline

    pipe_1 = IFInpaintingPipeline(**pipe_1.components)
    pipe_2 = IFInpaintingSuperResolutionPipeline(**pipe_2.components)
    assert (pipe_1.unet, pipe_1.text_encoder, pipe_2.unet) == networks


def test_everything_on_the_gpu_and_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.take_the_cpu_for_a_gpu(monkeypatch)
    from floyd import DiffusionPipeline, IFImg2ImgPipeline
    from floyd.pipelines.deepfloyd_if import fast27_timesteps

    pipe = DiffusionPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    pipe.to("cuda")
    seen: list[int] = []
    pipe("<prompt>", num_inference_steps=30, callback=lambda i, t, x: seen.append(t))
    assert len(seen) == 30
    seen.clear()
    pipe("<prompt>", timesteps=fast27_timesteps, callback=lambda i, t, x: seen.append(t))
    assert seen == fast27_timesteps

    image = Image.effect_noise((48, 32), 60)
    pipe = IFImg2ImgPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    pipe.to("cuda")
    seen.clear()
    image = pipe(image=image, prompt="<prompt>", strength=0.3, callback=lambda i, t, x: seen.append(t)).images
    assert len(seen) == 24
    assert is_painted(image[0], 24, 16)


def test_compiled_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.take_the_cpu_for_a_gpu(monkeypatch)
    standins.compile_without_a_compiler(monkeypatch)
    from floyd import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    pipe.to("cuda")
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    plain = pipe("<prompt>", generator=torch.manual_seed(0), **options).images

    pipe.text_encoder = torch.compile(pipe.text_encoder, mode="reduce-overhead", fullgraph=True)
    pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
    compiled = pipe("<prompt>", generator=torch.manual_seed(0), **options).images
    torch.testing.assert_close(compiled, plain, atol=2e-2, rtol=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_where_there_is_nothing_to_offload_from(method: str, caplog: pytest.LogCaptureFixture) -> None:
    from floyd import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", variant="fp16", torch_dtype=HALF)
    with caplog.at_level(logging.INFO):
        getattr(pipe, method)()
    assert "no accelerator" in caplog.text
    assert is_painted(pipe("<prompt>", num_inference_steps=2).images[0], 16, 16)


def eight_bit_t5() -> Any:
    from transformers import BitsAndBytesConfig, T5EncoderModel

    return T5EncoderModel.from_pretrained(
        "DeepFloyd/IF-I-XL-v1.0",
        subfolder="text_encoder",
        device_map="auto",
        variant="fp16",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )


def test_t5_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.quantize_without_bitsandbytes(monkeypatch)
    from floyd import DiffusionPipeline

    text_encoder = eight_bit_t5()
    pipe = DiffusionPipeline.from_pretrained(
        "DeepFloyd/IF-I-XL-v1.0", text_encoder=text_encoder, unet=None, device_map="auto"
    )
    prompt_embeds, negative_embeds = pipe.encode_prompt("<prompt>")
    assert pipe.text_encoder is text_encoder
    assert any(tensor.dtype == torch.int8 for tensor in text_encoder.state_dict().values())

    whole = DiffusionPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", unet=None)
    for quantized, full in zip((prompt_embeds, negative_embeds), whole.encode_prompt("<prompt>"), strict=True):
        assert torch.cosine_similarity(quantized.float().flatten(), full.flatten(), dim=0) > 0.999


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_t5_in_8_bits_without_bitsandbytes_names_it() -> None:
    with pytest.raises(ImportError, match="bitsandbytes"):
        eight_bit_t5()


@pytest.mark.usefixtures("fewer_steps")
def test_little_main_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    standins.quantize_without_bitsandbytes(monkeypatch)
    from floyd import DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline
    from floyd.utils import make_image_grid, pt_to_pil

    text_encoder = eight_bit_t5()
    pipe = DiffusionPipeline.from_pretrained(
        "DeepFloyd/IF-I-XL-v1.0", text_encoder=text_encoder, unet=None, device_map="auto"
    )
    prompt_embeds, negative_embeds = pipe.encode_prompt(KANGAROO)
    del text_encoder
    del pipe
    gc.collect()
    torch.cuda.empty_cache()

    pipe = IFPipeline.from_pretrained(
        "DeepFloyd/IF-I-XL-v1.0", text_encoder=None, variant="fp16", torch_dtype=HALF, device_map="auto"
    )
    generator = torch.Generator().manual_seed(0)
    stage_1_output = pipe(
        prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_embeds, output_type="pt", generator=generator
    ).images
    pt_to_pil(stage_1_output)[0].save(tmp_path / "if_stage_I.png")
    del pipe
    gc.collect()
    torch.cuda.empty_cache()

    pipe = IFSuperResolutionPipeline.from_pretrained(
        "DeepFloyd/IF-II-L-v1.0", text_encoder=None, variant="fp16", torch_dtype=HALF, device_map="auto"
    )
    generator = torch.Generator().manual_seed(0)
    stage_2_output = pipe(
        image=stage_1_output,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        output_type="pt",
        generator=generator,
    ).images
    pictures = [pt_to_pil(stage_1_output)[0], pt_to_pil(stage_2_output)[0]]
    make_image_grid(pictures, rows=1, cols=2).save(tmp_path / "grid.png")
    assert all(is_painted(picture, side, side) for picture, side in zip(pictures, SIDES.values(), strict=False))


def test_a_t5_that_transformers_spread_over_the_machine_is_left_where_it_is(tmp_path: Path) -> None:
    """`device_map="auto"` does so where T5 does not fit onto the accelerator."""
    from transformers import T5EncoderModel

    from floyd import DiffusionPipeline

    spread = {"shared": "cpu", "encoder.embed_tokens": "cpu", "encoder.block.0": "cpu"}
    text_encoder = T5EncoderModel.from_pretrained(
        "DeepFloyd/IF-I-XL-v1.0",
        subfolder="text_encoder",
        device_map={**spread, "encoder.block.1": "disk", "encoder.final_layer_norm": "disk"},
        offload_folder=str(tmp_path),
        dtype=torch.float32,
    )
    pipe = DiffusionPipeline.from_pretrained(
        "DeepFloyd/IF-I-XL-v1.0", text_encoder=text_encoder, unet=None, device_map="auto"
    )
    whole = DiffusionPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0", unet=None, device_map="cpu")
    ours, other = (pipe.encode_prompt("<prompt>")[0] for pipe in (pipe, whole))
    torch.testing.assert_close(ours.cpu(), other)
