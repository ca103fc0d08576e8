from __future__ import annotations

import pytest
import torch

from floyd.models.unet import UNet2DConditionModel
from floyd.training.growing import keep_resolution

CHANNELS = (8, 8, 16, 16)


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * 2 + ("SimpleCrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def sides(model: UNet2DConditionModel, size: int) -> list[int]:
    """Of the pictures that the middle and the blocks going up hand on."""
    seen: list[int] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out_BCHW: seen.append(out_BCHW.shape[-1]))
        for block in (model.mid_block, *model.up_blocks)
    ]
    with torch.no_grad():
        model(torch.randn(1, 3, size, size), 5, torch.randn(1, 4, 32))
    for hook in hooks:
        hook.remove()
    return seen


def test_the_inner_levels_see_the_same_sides_of_small_pictures() -> None:
    model = unet()
    assert sides(model, 32) == [4, 8, 16, 32, 32]
    keep_resolution(model, 1)
    assert sides(model, 16) == [4, 8, 16, 16, 16]
    keep_resolution(model, 2)
    assert sides(model, 8) == [4, 8, 8, 8, 8]


def test_it_can_be_undone_to_the_bit() -> None:
    model, x_BCHW, text_BLE = unet(), torch.randn(1, 3, 32, 32), torch.randn(1, 4, 32)
    with torch.no_grad():
        before = model(x_BCHW, 5, text_BLE, return_dict=False)[0]
        keep_resolution(model, 2)
        keep_resolution(model, 0)
        assert torch.equal(model(x_BCHW, 5, text_BLE, return_dict=False)[0], before)


@pytest.mark.parametrize("levels", [-1, 4])
def test_there_must_be_a_level_left_to_train(levels: int) -> None:
    with pytest.raises(ValueError, match=r"levels must be in \[0, 4\)"):
        keep_resolution(unet(), levels)
