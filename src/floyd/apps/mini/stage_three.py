"""Stage III of the built-in cascade, in the layout of the x4 upscaler: 256 px to 1024 px through a latent.

First the autoencoder learns to hold a 1024 px picture in a 256 px latent, then the upscaler to paint such latents.

B images  C channels  H height  W width  Z latent channels  h, w of the latent  L text tokens
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floyd.apps.mini.beginnings import begin_as_resizing
from floyd.apps.mini.data import Crop, crops_of, scenes_at, texts_of
from floyd.apps.mini.stage_two import bent, near_edges, offset_noise, some_levels, windows, worn
from floyd.diffusion.losses import stratified_timesteps
from floyd.diffusion.schedule import NoiseSchedule
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.scenes.captions import Caption
from floyd.scenes.scene import Scene
from floyd.training.init import zero_residuals
from floyd.training.loop import LoopConfig, Losses, Phase, device_of

SMALL, LARGE = 256, 1024
SCALING_FACTOR = 0.08333  # what the pipeline multiplies latents by
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 1,  # flat colours must survive: a group's mean and scale do not
    "sample_size": SMALL,
    "scaling_factor": SCALING_FACTOR,
    "mid_block_add_attention": False,  # over 65,536 pixels it would cost more than all the rest
}
UNET: dict[str, Any] = {
    "sample_size": SMALL,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (24, 48, 96),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,  # the number of heads, as the x4 upscaler has it
    "only_cross_attention": True,
    "cross_attention_dim": 64,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
    "resnet_time_scale_shift": "scale_shift",  # the gains of x in what is predicted depend on the time
    "norm_num_groups": 1,
    "time_embedding_dim": 128,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LOW_RES_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
MOST_NOISE = 350  # highest noise level of the input in training; low ones are seen most
BENT = 1.0  # pixels of the input by which its outlines stray at most (standard deviation)
CELL = 8  # pixels of the input, of the field that bends them
EDGE_WEIGHT = 2.0  # of a latent within NEAR of an edge, over all others
NEAR = 2
SIDES = (256, 512, 1024)  # of the pictures that windows are cut from: far more edges than at 1024 px alone
TRIES = 4  # to find a window with an edge in it: there is little to learn from the others
WHOLE = 512  # whole pictures at the end, as small ones: a norm then takes the mean of what it will at 1024 px


@dataclass(frozen=True, kw_only=True)
class Evening(Phase):
    """All latents weigh the same: large areas become even."""


VAE_LOOP = LoopConfig(
    phases=(
        Phase(num_steps=600, batch_size=16, size=64, rate=1e-3, last_rate=1e-3),
        Phase(num_steps=1400, batch_size=16, size=64, rate=1e-3, last_rate=1e-5),
    ),
    optimizer="muon",
    warmup_steps=20,
    ema_decay=0.99,
    weight_decay=0.0,
    seed=41,
)
LOOP = LoopConfig(
    phases=(
        Phase(num_steps=1200, batch_size=12, size=192, rate=1e-3, last_rate=1e-3),
        Phase(num_steps=2200, batch_size=2, size=WHOLE, rate=1e-3, last_rate=4e-4),
        Evening(num_steps=1800, batch_size=2, size=WHOLE, rate=6e-4, last_rate=1e-5),
    ),
    optimizer="muon",
    ema_decay=0.99,
    seed=43,
)


def build_vae() -> AutoencoderKL:
    """It begins as resizing, its latents almost without noise: drowned in it, the means would take long to be heard."""
    torch.manual_seed(VAE_LOOP.seed)
    vae = AutoencoderKL(**VAE)
    begin_as_resizing(vae)
    bias = vae.quant_conv.bias
    assert isinstance(bias, nn.Parameter)
    nn.init.constant_(bias.data[vae.config.latent_channels :], -6.0)
    return vae


def holding_loss() -> Any:
    """L1 and L2 of pixels, L1 of their differences (edges), and a touch of KL, for `Trainer`."""

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        assert isinstance(model, AutoencoderKL)
        scenes = scenes_at(VAE_LOOP.seed, step, phase.batch_size)
        sides = [SIDES[int(i)] for i in torch.randint(0, len(SIDES), (phase.batch_size,), generator=generator)]
        seen = [_with_an_edge(scene, side, phase.size, generator) for scene, side in zip(scenes, sides, strict=True)]
        picture_BCHW = torch.cat(seen).to(device_of(model))
        (latent,) = model.encode(picture_BCHW, return_dict=False)
        moved_BZhw = latent.mean.float() + latent.std.float() * torch.randn(latent.mean.shape, generator=generator).to(
            picture_BCHW.device
        )
        error_BCHW = model.decode(moved_BZhw, return_dict=False)[0].float() - picture_BCHW
        edges = error_BCHW.diff(dim=-1).abs().mean() + error_BCHW.diff(dim=-2).abs().mean()
        kl = 0.5 * (latent.mean.float().square() + latent.std.float().square() - 1 - latent.logvar.float()).mean()
        return {
            "pixels": error_BCHW.abs().mean(),
            "squares": error_BCHW.square().mean(),
            "edges": edges,
            "kl": 1e-4 * kl,
        }

    return loss_of


def _with_an_edge(scene: tuple[Scene, Caption], size: int, side: int, generator: torch.Generator) -> Tensor:
    """A window by lot, [1, C, H, W]; of a few, the first that an edge goes through."""
    for _ in range(TRIES):
        picture_1CHW = crops_of([scene], windows(1, size, side, generator))
        if near_edges(picture_1CHW, 0).any():
            break
    return picture_1CHW


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, *, num_pictures: int = 64, side: int = 256) -> float:
    """Fold a scale into the layers around the latent, so that latents times SCALING_FACTOR have unit variance."""
    generator = torch.Generator().manual_seed(VAE_LOOP.seed)
    scenes = scenes_at(VAE_LOOP.seed + 1, 0, num_pictures)
    pictures_BCHW = crops_of(scenes, windows(num_pictures, LARGE, side, generator))
    std = float(torch.cat([_mean(vae, part_BCHW) for part_BCHW in pictures_BCHW.split(8)]).std())
    scale = 1 / (SCALING_FACTOR * std)
    channels = vae.config.latent_channels
    before, after = vae.quant_conv, vae.post_quant_conv
    assert isinstance(before, nn.Conv2d)
    assert isinstance(after, nn.Conv2d)
    assert before.bias is not None
    before.weight[:channels] *= scale
    before.bias[:channels] *= scale
    before.bias[channels:] += 2 * torch.log(torch.tensor(scale))
    after.weight /= scale
    return std


def train_clip_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """A small byte-pair tokenizer in CLIP's layout: vocab.json, merges.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator((text.replace(",", " ,").replace(":", " :") for text in captions), trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    for token in (*(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


class Upscaler(nn.Module):
    """What is trained together: the upscaler and its small text encoder."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        torch.manual_seed(LOOP.seed)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends)
        )
        self.unet = UNet2DConditionModel(**UNET)
        zero_residuals(self.unet)


def upscaling_loss(vae: AutoencoderKL, tokenizer: Any) -> Any:
    """v-prediction (arXiv:2202.00512) of latents, told the noisy 256 px picture, for `Trainer`."""
    schedule = NoiseSchedule.scaled_linear()
    density_T = torch.ones(len(schedule))
    weight_T = (1 - schedule.alpha_bar_T).to(device_of(vae))  # a velocity's error counts as the clean latents' does

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        assert isinstance(model, Upscaler)
        device, batch = device_of(model), phase.batch_size
        scenes = scenes_at(LOOP.seed, step, batch)
        sides = [max(phase.size, SIDES[int(i)]) for i in torch.randint(0, len(SIDES), (batch,), generator=generator)]
        sides = [WHOLE] * batch if phase.size == WHOLE else sides
        crops = [windows(1, side, phase.size, generator, multiple=4)[0] for side in sides]
        low_crops = [Crop(crop.size // 4, crop.top // 4, crop.left // 4, crop.side // 4) for crop in crops]
        clean_BZhw = _latents(vae, crops_of(scenes, crops).to(device))
        small_BChw = crops_of(scenes, low_crops)
        cells = max(phase.size // 4 // CELL, 2)
        low_BChw = worn(bent(small_BChw, generator, most=BENT, cells=cells), generator)
        level_B = some_levels(batch, MOST_NOISE, generator)
        low_BChw = schedule.noised(low_BChw, torch.randn(low_BChw.shape, generator=generator), level_B)
        texts = texts_of(scenes, generator)

        low_BChw, level_B = low_BChw.to(device), level_B.to(device)
        t_B = stratified_timesteps(density_T, batch, generator).to(device)
        noise_BZhw = offset_noise(clean_BZhw.shape, generator).to(device)
        noisy_BZhw = torch.cat([schedule.noised(clean_BZhw, noise_BZhw, t_B), low_BChw], dim=1)
        ids_BL = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        text_BLD = model.text_encoder(ids_BL.to(device))[0]
        out_BZhw = model.unet(noisy_BZhw, t_B, text_BLD, level_B, return_dict=False)[0]
        error_BZhw = out_BZhw.float() - schedule.velocity(clean_BZhw, noise_BZhw, t_B)
        edge_weight = 0.0 if isinstance(phase, Evening) else EDGE_WEIGHT
        near_B1hw = 1 + edge_weight * near_edges(small_BChw, NEAR).to(device)
        return {"velocity": (weight_T[t_B].view(-1, 1, 1, 1) * near_B1hw * error_BZhw.square()).mean()}

    return loss_of


@torch.no_grad()
def _latents(vae: AutoencoderKL, picture_BCHW: Tensor) -> Tensor:
    return _mean(vae, picture_BCHW).float() * SCALING_FACTOR


def _mean(vae: AutoencoderKL, picture_BCHW: Tensor) -> Tensor:
    (latent,) = vae.encode(picture_BCHW, return_dict=False)
    return latent.mean
