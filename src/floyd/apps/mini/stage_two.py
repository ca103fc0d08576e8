"""Stage II of the built-in cascade: 64 px to 256 px, told how noisy its input is.

It is local work, so it is learned mostly on windows of the picture, and on whole ones at the end.

B images  C channels  H height  W width  S side of a window
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.apps.mini.data import Crop, crops_of, pictures_of, scenes_at, texts_of
from floyd.apps.mini.stage_one import Embed
from floyd.diffusion.losses import hybrid_loss, layout_density, snr_weights, stratified_timesteps
from floyd.diffusion.schedule import NoiseSchedule
from floyd.models.unet import UNet2DConditionModel
from floyd.training.init import zero_residuals
from floyd.training.loop import LoopConfig, Losses, Phase, device_of

SMALL, LARGE = 64, 256
UNET: dict[str, Any] = {
    "sample_size": LARGE,
    "in_channels": 6,
    "out_channels": 6,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 3,
    "only_cross_attention": True,
    "cross_attention_dim": 64,
    "encoder_hid_dim": 128,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 32,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "class_embed_type": "timestep",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552,
    "mid_block_scale_factor": 1.4142271248762552,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 128,
    "act_fn": "gelu",
    "norm_num_groups": 1,  # flat colours must survive: a group's mean does not
}
OFFSET = 0.1  # standard deviation of the noise's mean
# Of the noise's error at the noisy end. The small picture tells the clean one at every noise level: so may the loss.
MOST_WEIGHT = 200.0
FINISH_SNR = 100.0  # of whole pictures, up to which the noise itself is asked for: less leaves grain
MOST_NOISE = 400  # highest noise level of the input in training; low ones are seen most
BENT = 0.5  # pixels of the input by which its outlines stray at most (standard deviation)
CELLS = 20  # of the field that bends them, along a side
EDGE_WEIGHT = 2.0  # of a pixel within NEAR of an edge, over all others
NEAR = 3
LOOP = LoopConfig(
    phases=(
        Phase(num_steps=1100, batch_size=16, size=64, rate=1e-3, last_rate=1e-3),
        Phase(num_steps=1700, batch_size=3, size=LARGE, rate=8e-4, last_rate=1e-5),
    ),
    optimizer="muon",
    ema_decay=0.995,
    seed=31,
)


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(LOOP.seed)
    unet = UNet2DConditionModel(**UNET)
    zero_residuals(unet)
    return unet


def windows(batch: int, size: int, side: int, generator: torch.Generator, *, multiple: int = 1) -> list[Crop]:
    """Where to look, by lot: `side` px windows of pictures of `size` px, at multiples of `multiple`."""
    corners = torch.randint(0, (size - side) // multiple + 1, (batch, 2), generator=generator) * multiple
    return [Crop(size, int(top), int(left), side) for top, left in corners]


def offset_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Noise whose mean differs from channel to channel.

    Over many pixels the mean of a noisy picture tells its colour almost surely, however noisy it is. A sampler starts
    from pure noise, whose mean tells nothing; a network that trusts it turns colours gray. This one cannot trust it.
    """
    return torch.randn(shape, generator=generator) + OFFSET * torch.randn(*shape[:2], 1, 1, generator=generator)


def worn(picture_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a stage before might hand them over: a little soft, a little noisy, colours slightly off."""
    batch = len(picture_BCHW)
    lot_B111 = [torch.rand(batch, 1, 1, 1, generator=generator) for _ in range(2)]
    soft_BCHW = F.avg_pool2d(F.pad(picture_BCHW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    picture_BCHW = torch.lerp(picture_BCHW, soft_BCHW, lot_B111[0] ** 2)
    tint_BC11 = 0.04 * torch.randn(batch, 3, 1, 1, generator=generator)
    grain_BCHW = 0.05 * lot_B111[1] ** 2 * torch.randn(picture_BCHW.shape, generator=generator)
    return (picture_BCHW + tint_BC11 * lot_B111[1] + grain_BCHW).clamp(-1, 1)


def bent(picture_BCHW: Tensor, generator: torch.Generator, *, most: float, cells: int) -> Tensor:
    """Pictures whose outlines wobble, as a sampler draws them: moved by a smooth field, by up to `most` pixels.

    The target stays straight and round, and so the network learns what outlines are, not to trust its input's.
    """
    batch, _, height, width = picture_BCHW.shape
    amount_B111 = most * torch.rand(batch, 1, 1, 1, generator=generator)
    lattice_B2NN = amount_B111 * torch.randn(batch, 2, cells, cells, generator=generator)
    moved_B2HW = F.interpolate(lattice_B2NN, (height, width), mode="bicubic", align_corners=True)
    own_HW2 = torch.stack(torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy"), dim=-1)
    places_BHW2 = (own_HW2 + moved_B2HW.permute(0, 2, 3, 1)) * 2 / torch.tensor([width, height]) - 1
    return F.grid_sample(picture_BCHW, places_BHW2, padding_mode="border", align_corners=False)


def some_levels(batch: int, most: int, generator: torch.Generator) -> Tensor:
    """Noise levels below `most`, low ones more often."""
    return (most * torch.rand(batch, generator=generator) ** 3).long()


def near_edges(picture_BCHW: Tensor, within: int) -> Tensor:
    """Which pixels lie on an edge or so near to one: [B, 1, H, W] in {0, 1}."""
    spread_BCHW = F.max_pool2d(picture_BCHW, 3, 1, 1) + F.max_pool2d(-picture_BCHW, 3, 1, 1)
    is_edge_B1HW = (spread_BCHW.amax(dim=1, keepdim=True) > 0.25).float()
    return F.max_pool2d(is_edge_B1HW, 2 * within + 1, stride=1, padding=within)


def enlarging_loss(embed: Embed) -> Any:
    """The hybrid loss of stage II for `Trainer`."""
    schedule = NoiseSchedule.cosine()
    weight_T = snr_weights(schedule, most=MOST_WEIGHT)
    finish_T = snr_weights(schedule, high=FINISH_SNR, most=MOST_WEIGHT)
    density_T = layout_density(schedule, share=0.4)

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        device, batch = device_of(model), phase.batch_size
        scenes = scenes_at(LOOP.seed, step, batch)
        crops = windows(batch, LARGE, phase.size, generator)
        clean_BCHW = crops_of(scenes, crops)
        small_BChw = bent(pictures_of(scenes, SMALL), generator, most=BENT, cells=CELLS)
        low_BCHW = F.interpolate(worn(small_BChw, generator), (LARGE, LARGE), mode="bilinear", align_corners=True)
        low_BCHW = torch.stack(
            [
                whole[:, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
                for whole, crop in zip(low_BCHW, crops, strict=True)
            ]
        )
        level_B = some_levels(batch, MOST_NOISE, generator)
        low_BCHW = schedule.noised(low_BCHW, torch.randn(low_BCHW.shape, generator=generator), level_B)
        text_BLE = embed(texts_of(scenes, generator)).to(device)

        clean_BCHW, low_BCHW, level_B = clean_BCHW.to(device), low_BCHW.to(device), level_B.to(device)
        t_B = stratified_timesteps(density_T, batch, generator).to(device)
        noise_BCHW = offset_noise(clean_BCHW.shape, generator).to(device)
        noisy_BCHW = torch.cat([schedule.noised(clean_BCHW, noise_BCHW, t_B), low_BCHW], dim=1)
        out_BCHW = model(noisy_BCHW, t_B, text_BLE, level_B, return_dict=False)[0]
        snr_T = finish_T if phase.size == LARGE else weight_T
        near_B1HW = 1 + EDGE_WEIGHT * near_edges(clean_BCHW, NEAR)
        simple_B, bound_B = hybrid_loss(out_BCHW, clean_BCHW, noise_BCHW, t_B, schedule, snr_T, near_B1HW)
        return {"noise": simple_B.mean(), "variance": bound_B.mean()}

    return loss_of
