from __future__ import annotations

import pytest
import torch

from floyd.nn.autoencoder import DoublingConv, HalvingConv, MiddleBlock, PixelAttention, PlainResnetBlock


@torch.no_grad()
def test_attention_equals_its_formula() -> None:
    attention = PixelAttention(8, groups=2)
    x_BCHW = torch.randn(2, 8, 3, 5)
    x_BLC = attention.group_norm(x_BCHW).flatten(2).mT
    q_BLC, k_BLC, v_BLC = attention.to_q(x_BLC), attention.to_k(x_BLC), attention.to_v(x_BLC)
    seen_BLC = torch.softmax(q_BLC @ k_BLC.mT / 8**0.5, dim=-1) @ v_BLC
    expected_BCHW = x_BCHW + attention.to_out[0](seen_BLC).mT.reshape(x_BCHW.shape)
    torch.testing.assert_close(attention(x_BCHW), expected_BCHW, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_does_not_know_where_a_pixel_lies() -> None:
    attention = PixelAttention(8, groups=2)
    x_BCHW = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(attention(x_BCHW).flip(3), attention(x_BCHW.flip(3)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_halving_and_doubling_change_the_size() -> None:
    x_BCHW = torch.randn(1, 4, 6, 10)
    assert HalvingConv(4)(x_BCHW).shape == (1, 4, 3, 5)
    assert DoublingConv(4)(x_BCHW).shape == (1, 4, 12, 20)


def test_a_shortcut_is_learned_only_where_the_width_changes() -> None:
    assert PlainResnetBlock(4, 4, groups=2, act_fn="silu").conv_shortcut is None
    assert PlainResnetBlock(4, 8, groups=2, act_fn="silu").conv_shortcut is not None


@pytest.mark.parametrize("attends", [True, False])
def test_the_middle_attends_on_request(attends: bool) -> None:
    block = MiddleBlock(4, attends=attends, groups=2, act_fn="silu")
    assert any("attentions" in name for name, _ in block.named_parameters()) is attends
