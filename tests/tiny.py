"""Tiny checkpoints with random weights, built by the incumbent: what the golden tests compare with.

Every parameter is disturbed, norms and biases too: a fresh network hides mistakes behind its ones and zeros.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

STAGE_ONE_SIDE = 32
STAGE_TWO_SIDE = 48
ENCODER_WIDTH = 32
TOKENS = 16  # of the embeddings that `embeds` makes up; T5's own are 77

_WORDS = "a the of on in red blue green circle square triangle above below large small background cat dog hat".split()


def stage_one(*, with_text: bool = True, with_safety: bool = False, seed: int = 0) -> Any:
    """A diffusers IFPipeline."""
    from diffusers import IFPipeline

    return IFPipeline(
        **text_modules(with_text),
        unet=unet(STAGE_ONE, seed),
        scheduler=scheduler(sample_max_value=1.5),
        **safety_modules(with_safety),
        requires_safety_checker=False,
    )


def stage_two(*, with_text: bool = False, with_safety: bool = False, seed: int = 1) -> Any:
    """A diffusers IFSuperResolutionPipeline."""
    from diffusers import DDPMScheduler, IFSuperResolutionPipeline

    return IFSuperResolutionPipeline(
        **text_modules(with_text),
        unet=unet(STAGE_TWO, seed),
        scheduler=scheduler(sample_max_value=1.0),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **safety_modules(with_safety),
        requires_safety_checker=False,
    )


def upscaler(*, with_safety: bool = False, seed: int = 2) -> Any:
    """A diffusers StableDiffusionUpscalePipeline: four times the side, through latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline

    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
    return StableDiffusionUpscalePipeline(
        vae=disturbed(AutoencoderKL(**VAE), seed),
        text_encoder=clip_text(seed),
        tokenizer=clip_tokenizer(),
        unet=unet(UPSCALER, seed),
        low_res_scheduler=DDPMScheduler(**betas),
        scheduler=DDIMScheduler(
            **betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        **safety_modules(with_safety),
    )


def disturbed(module: nn.Module, seed: int = 0, amount: float = 0.05) -> Any:
    """The module in evaluation mode, with noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def unet(config: dict[str, Any], seed: int = 0) -> Any:
    """A disturbed diffusers UNet. A random network is chaotic, guidance and many steps more so: a quieter answer keeps
    the last bit of a float from deciding what the picture looks like."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(7)
    network = disturbed(UNet2DConditionModel(**config), seed)
    with torch.no_grad():
        network.conv_out.weight *= 0.25
    return network


def embeds(batch: int = 1, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up embeddings of a prompt and of a negative prompt, for pipelines without a text encoder."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, batch, TOKENS, ENCODER_WIDTH, generator=generator)
    return positive, negative


def text_modules(present: bool = True) -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer() if present else None, "text_encoder": t5() if present else None}


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -5.0) for letter in string.ascii_lowercase + string.digits + ",.'"]
    return T5Tokenizer(vocab=special + letters + [("▁" + word, -3.0) for word in _WORDS], extra_ids=0)


def t5(seed: int = 4) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=128, d_model=ENCODER_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return disturbed(T5EncoderModel(config), seed)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ",.'"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def clip_text(seed: int = 5) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    last = len(clip_tokenizer()) - 1
    config = CLIPTextConfig(
        vocab_size=last + 1, hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="gelu", bos_token_id=last - 1, eos_token_id=last, pad_token_id=last,
    )  # fmt: skip
    return disturbed(CLIPTextModel(config), seed)


def safety_modules(present: bool = True) -> dict[str, Any]:
    if not present:
        return {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    return {
        "safety_checker": safety_checker(),
        "feature_extractor": feature_extractor(),
        "watermarker": watermarker(),
    }


def safety_checker(*, nsfw: float = -10.0, watermarked: float = -10.0) -> Any:
    """A diffusers checker whose verdict is known: the biases drown what the picture says."""
    from diffusers.pipelines.deepfloyd_if.safety_checker import IFSafetyChecker
    from transformers import CLIPConfig

    vision = {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 30, "patch_size": 15, "projection_dim": 16,
    }  # fmt: skip
    torch.manual_seed(6)
    checker = disturbed(IFSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)), 6)
    with torch.no_grad():
        checker.p_head.bias.fill_(nsfw)
        checker.w_head.bias.fill_(watermarked)
    return checker


def feature_extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})


def watermarker() -> Any:
    """A diffusers watermarker, red and half transparent."""
    from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker

    marker = IFWatermarker()
    marker.watermark_image[:] = torch.tensor([255.0, 0.0, 0.0, 128.0])
    return marker


def scheduler(**overrides: Any) -> Any:
    """IF's: learned variance, dynamic thresholding, the cosine schedule."""
    from diffusers import DDPMScheduler

    keys: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
        "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5, "prediction_type": "epsilon",
    }  # fmt: skip
    return DDPMScheduler(**{**keys, **overrides})


def save(pipeline: Any, folder: Path, **options: Any) -> Path:
    pipeline.save_pretrained(folder, **options)
    return folder


_DEEPFLOYD: dict[str, Any] = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "attention_head_dim": 16,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "encoder_hid_dim": ENCODER_WIDTH,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
STAGE_ONE: dict[str, Any] = {**_DEEPFLOYD, "sample_size": STAGE_ONE_SIDE, "in_channels": 3, "layers_per_block": 1}
STAGE_TWO: dict[str, Any] = {
    **_DEEPFLOYD,
    "sample_size": STAGE_TWO_SIDE,
    "in_channels": 6,
    "layers_per_block": (1, 2),
    "class_embed_type": "timestep",
    "time_embedding_dim": 32,
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552,
    "mid_block_scale_factor": 1.4142271248762552,
}
UPSCALER: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "only_cross_attention": (True, True, False),
    "num_class_embeds": 1000,
    "use_linear_projection": True,
    "norm_num_groups": 16,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "scaling_factor": 0.08333,
    "layers_per_block": 1,
}
