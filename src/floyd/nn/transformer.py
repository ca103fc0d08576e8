"""The transformer block of latent UNets (Rombach et al., arXiv:2112.10752).

B images  C channels  H height  W width  P pixels (H*W)  L text tokens  D text width
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.attention import Attention, TextKV
from floyd.nn.norm import normed


class GEGLU(nn.Module):
    """value * gelu(gate): arXiv:2002.05202."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x_BPC: Tensor) -> Tensor:
        value, gate = self.proj(x_BPC).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, *, expansion: int = 4) -> None:
        super().__init__()
        inner = width * expansion
        self.net = nn.ModuleList([GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x_BPC: Tensor) -> Tensor:
        for layer in self.net:
            x_BPC = layer(x_BPC)
        return x_BPC


class TransformerBlock(nn.Module):
    """Attention to the pixels (or, with `only_cross_attention`, to the text), to the text, and a feed-forward layer."""

    def __init__(
        self, width: int, text_width: int, *, num_heads: int, head_width: int, only_cross_attention: bool
    ) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        source_width = text_width if only_cross_attention else width
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, source_width, num_heads=num_heads, head_width=head_width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, text_width, num_heads=num_heads, head_width=head_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def read(self, text_BLD: Tensor) -> tuple[TextKV, ...]:
        texts = (self.attn2.read(text_BLD),)
        return (self.attn1.read(text_BLD), *texts) if self.only_cross_attention else texts

    def forward(self, x_BPC: Tensor, text: tuple[TextKV, ...], bias_B11L: Tensor | None = None) -> Tensor:
        h_BPC = self.norm1(x_BPC)
        if self.only_cross_attention:
            x_BPC = x_BPC + self.attn1(h_BPC, text[0], bias_B11L)
        else:
            x_BPC = x_BPC + self.attn1(h_BPC, self.attn1.read(h_BPC))
        x_BPC = x_BPC + self.attn2(self.norm2(x_BPC), text[-1], bias_B11L)
        return x_BPC + self.ff(self.norm3(x_BPC))


class Transformer2D(nn.Module):
    """One transformer block over the pixels of a feature map."""

    def __init__(
        self,
        channels: int,
        text_width: int,
        *,
        num_heads: int,
        groups: int = 32,
        linear_projection: bool = False,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        head_width = channels // num_heads
        width = num_heads * head_width
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width) if linear_projection else nn.Conv2d(channels, width, 1)
        block = TransformerBlock(
            width, text_width, num_heads=num_heads, head_width=head_width, only_cross_attention=only_cross_attention
        )
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(width, channels) if linear_projection else nn.Conv2d(width, channels, 1)

    def read(self, text_BLD: Tensor) -> tuple[TextKV, ...]:
        block = self.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        return block.read(text_BLD)

    def forward(self, x_BCHW: Tensor, text: tuple[TextKV, ...], bias_B11L: Tensor | None = None) -> Tensor:
        size = x_BCHW.shape[-2:]
        h_BCHW = normed(self.norm, x_BCHW)
        if self.linear_projection:
            h_BPC = self.proj_in(h_BCHW.flatten(2).transpose(1, 2))
        else:
            h_BPC = self.proj_in(h_BCHW).flatten(2).transpose(1, 2)
        h_BPC = self.transformer_blocks[0](h_BPC, text, bias_B11L)
        if self.linear_projection:
            return x_BCHW + self.proj_out(h_BPC).transpose(1, 2).unflatten(2, size)
        return x_BCHW + self.proj_out(h_BPC.transpose(1, 2).unflatten(2, size))
