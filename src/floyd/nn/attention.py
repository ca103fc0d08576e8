"""Attention between the pixels of a feature map and a text.

B images  C channels  H height  W width  P pixels (H*W)  R some of them  L text tokens  M all keys  D text width
N heads  K head width

A layer reads the text once (`read`): its keys and values depend on the prompt alone and serve every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.norm import normed
from floyd.nn.rewrites import Joined


class TextKV(NamedTuple):
    """One layer's view of the text."""

    key_BNLK: Tensor
    value_BNLK: Tensor
    qkv: Joined | None = None  # the layer's own projections of the pixels as one, where those are rewritten


def split_heads(x_BMC: Tensor, num_heads: int) -> Tensor:
    return x_BMC.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x_BNMK: Tensor) -> Tensor:
    return x_BNMK.transpose(1, 2).flatten(2)


# In bytes: what stays in a processor's cache until the way back needs it.
_MOST_WRITTEN_OUT = 2**25


def attended(q_BNPK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(K) + bias) v."""
    if not _goes_back_faster_written_out(q_BNPK, k_BNMK):
        return fitting(q_BNPK, k_BNMK, v_BNMK, bias_B11L)
    score_BNPM = (q_BNPK @ k_BNMK.transpose(-1, -2)) * q_BNPK.shape[-1] ** -0.5
    if bias_B11L is not None:
        score_BNPM = score_BNPM + bias_B11L
    return score_BNPM.softmax(-1).to(v_BNMK.dtype) @ v_BNMK


def _goes_back_faster_written_out(q_BNPK: Tensor, k_BNMK: Tensor) -> bool:
    """In training on the CPU in bfloat16, 1.3 times as fast while the scores are few.

    In float32 the fused kernel's way back is the faster one, 1.1 to 1.4 times for few and 3 times for many.
    """
    is_trained_on_cpu = q_BNPK.device.type == "cpu" and torch.is_grad_enabled() and q_BNPK.requires_grad
    batch, heads, pixels, _ = q_BNPK.shape
    written_bytes = batch * heads * pixels * k_BNMK.shape[2] * q_BNPK.element_size()
    return is_trained_on_cpu and q_BNPK.dtype == torch.bfloat16 and written_bytes <= _MOST_WRITTEN_OUT


# Devices whose attention writes the whole table of scores down; the others' kernels never hold it.
_WRITES_SCORES = frozenset({"mps"})
_MOST_SCORES = 2**28  # a gigabyte in float32


def fitting(
    q_BNPK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, bias_B11L: Tensor | None = None, *, most: int | None = None
) -> Tensor:
    """Attention with at most so many scores at once: some pixels after the others, which is exact, as each looks for
    itself. No limit where scores are never written down."""
    if most is None and q_BNPK.device.type not in _WRITES_SCORES:
        return F.scaled_dot_product_attention(q_BNPK, k_BNMK, v_BNMK, attn_mask=bias_B11L)
    batch, heads, pixels, _ = q_BNPK.shape
    at_once = max(1, (most or _MOST_SCORES) // (batch * heads * k_BNMK.shape[2]))
    parts = [
        F.scaled_dot_product_attention(q_BNRK, k_BNMK, v_BNMK, attn_mask=bias_B11L)
        for q_BNRK in q_BNPK.split(at_once, dim=2)
    ]
    return parts[0] if pixels <= at_once else torch.cat(parts, dim=2)


class AddedKVAttention(nn.Module):
    """IF's attention: every pixel looks at the text and at all pixels at once (GLIDE, arXiv:2112.10741).

    The text is normalized (GroupNorm over channels and all its positions, padding included) and projected to keys and
    values that stand before those of the pixels. With `only_cross_attention` the pixels' own are left out.
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        *,
        head_width: int,
        groups: int = 32,
        norm_text: bool = True,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = channels // head_width
        self.only_cross_attention = only_cross_attention
        width = self.num_heads * head_width
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.norm_cross = nn.GroupNorm(32, text_width, eps=1e-5) if norm_text else None
        self.to_q = nn.Linear(channels, width)
        if not only_cross_attention:
            self.to_k = nn.Linear(channels, width)
            self.to_v = nn.Linear(channels, width)
        self.add_k_proj = nn.Linear(text_width, width)
        self.add_v_proj = nn.Linear(text_width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, channels)])

    def read(self, text_BLD: Tensor) -> TextKV:
        if self.norm_cross is not None:
            text_BLD = self.norm_cross(text_BLD.transpose(1, 2)).transpose(1, 2)
        key, value = self.add_k_proj(text_BLD), self.add_v_proj(text_BLD)
        return TextKV(split_heads(key, self.num_heads), split_heads(value, self.num_heads))

    def forward(self, x_BCHW: Tensor, text: TextKV, bias_B11L: Tensor | None = None) -> Tensor:
        h_BPC = normed(self.group_norm, x_BCHW).flatten(2).transpose(1, 2)
        q_BNPK, *own = (split_heads(part, self.num_heads) for part in self._projected(h_BPC, text.qkv))
        k_BNMK, v_BNMK = text.key_BNLK, text.value_BNLK
        if own:
            k_BNMK, v_BNMK = torch.cat([k_BNMK, own[0]], dim=2), torch.cat([v_BNMK, own[1]], dim=2)
        if bias_B11L is not None:
            bias_B11L = F.pad(bias_B11L, (0, k_BNMK.shape[2] - bias_B11L.shape[-1]))
        out_BNPK = attended(q_BNPK, k_BNMK, v_BNMK, bias_B11L)
        out_BPC = self.to_out[0](merge_heads(out_BNPK))
        return x_BCHW + out_BPC.transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])

    def joined(self) -> Joined | None:
        """The projections of the pixels as one, where there are several and all are plain."""
        return None if self.only_cross_attention else Joined.of([self.to_q, self.to_k, self.to_v])

    def _projected(self, h_BPC: Tensor, qkv: Joined | None) -> Sequence[Tensor]:
        if self.only_cross_attention:
            return (self.to_q(h_BPC),)
        if qkv is None or torch.is_grad_enabled():
            return self.to_q(h_BPC), self.to_k(h_BPC), self.to_v(h_BPC)
        return qkv(h_BPC).chunk(3, dim=-1)


class Attention(nn.Module):
    """Plain multi-head attention; `source_width` is the width of what it looks at."""

    def __init__(self, width: int, source_width: int, *, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(source_width, inner, bias=False)
        self.to_v = nn.Linear(source_width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def read(self, source_BLD: Tensor) -> TextKV:
        key, value = self.to_k(source_BLD), self.to_v(source_BLD)
        return TextKV(split_heads(key, self.num_heads), split_heads(value, self.num_heads))

    def forward(self, x_BPC: Tensor, source: TextKV, bias_B11L: Tensor | None = None) -> Tensor:
        q_BNPK = split_heads(self.to_q(x_BPC), self.num_heads)
        out_BNPK = attended(q_BNPK, source.key_BNLK, source.value_BNLK, bias_B11L)
        return self.to_out[0](merge_heads(out_BNPK))
