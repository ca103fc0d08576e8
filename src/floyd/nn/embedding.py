"""Embeddings of scalars (time, noise level) and of a whole prompt.

B images  L text tokens  E encoder width  D embedding width  N heads  K head width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from floyd.nn.activation import activation


def sinusoid(value_B: Tensor, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Fourier features [B, width] of a scalar, in float32: DDPM (arXiv:2006.11239), appendix B."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=value_B.device) / (half - freq_shift)
    angle_BH = value_B.float()[:, None] * torch.exp(-math.log(10000) * exponent)[None]
    parts = (angle_BH.cos(), angle_BH.sin()) if flip_sin_to_cos else (angle_BH.sin(), angle_BH.cos())
    return nn.functional.pad(torch.cat(parts, dim=-1), (0, width % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers over Fourier features."""

    def __init__(self, in_channels: int, width: int, *, act_fn: str = "silu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features_BC: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features_BC)))


class AttentionPooling(nn.Module):
    """One query, the mean of the text, gathers the text: no output projection, padding takes part."""

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, text_BLE: Tensor) -> Tensor:
        mean_B1E = text_BLE.mean(dim=1, keepdim=True) + self.positional_embedding.to(text_BLE.dtype)
        all_BME = torch.cat([mean_B1E, text_BLE], dim=1)
        q_BN1K = self._heads(self.q_proj(mean_B1E))
        k_BNMK = self._heads(self.k_proj(all_BME))
        v_BNMK = self._heads(self.v_proj(all_BME))
        scale = q_BN1K.shape[-1] ** -0.25
        weight_BN1M = ((q_BN1K * scale) @ (k_BNMK * scale).transpose(-1, -2)).float().softmax(dim=-1)
        return (weight_BN1M.to(v_BNMK.dtype) @ v_BNMK).flatten(1)

    def _heads(self, x_BME: Tensor) -> Tensor:
        return x_BME.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class TextTimeEmbedding(nn.Module):
    """The whole prompt as one vector, to be added to the embedding of time."""

    def __init__(self, encoder_width: int, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(encoder_width)
        self.pool = AttentionPooling(num_heads, encoder_width)
        self.proj = nn.Linear(encoder_width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, text_BLE: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text_BLE))))
