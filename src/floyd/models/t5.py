"""T5's encoder (arXiv:1910.10683; T5 1.1's is gated, arXiv:2002.05202), which reads the prompts of stages I and II.

It computes what transformers' T5EncoderModel does, from the same files, and saves what that reads. It is here because
to import that one takes longer than to import torch.

B texts  L tokens  E width  N heads  K width of a head  F width of the feed-forward
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.errors import ConfigError
from floyd.store.config import Config
from floyd.store.filling import fill, refuse_packed
from floyd.store.pretrained import Model
from floyd.store.t5 import T5State


def gelu_new(x: Tensor) -> Tensor:
    """By tanh (arXiv:1606.08415, section 2), as T5 1.1 was trained. In float32 its terms are summed in transformers'
    order, whose states are then met to the last bit."""
    if x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


# `feed_forward_proj` -> what the feed-forward applies, and whether a second projection is multiplied with that.
FEED_FORWARDS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, False),
    "gelu": (F.gelu, False),
    "gelu_new": (gelu_new, False),
    "gated-relu": (F.relu, True),
    "gated-gelu": (gelu_new, True),
    "gated-silu": (F.silu, True),
}


@dataclass(frozen=True, kw_only=True)
class T5EncoderConfig(Config):
    """The keys of a T5's config.json that shape its encoder, with the defaults that absent ones have."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise ConfigError(
                f"feed_forward_proj must be one of {', '.join(FEED_FORWARDS)}, got {self.feed_forward_proj!r}."
            )


class T5EncoderOutput(NamedTuple):
    last_hidden_state: Tensor  # BLE


class T5EncoderModel(Model):
    """Token ids in, a state for each of them out."""

    config_class = T5EncoderConfig
    config: T5EncoderConfig
    weights_name: ClassVar[str] = "model"
    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = ("wo",)  # T5-XXL's overflow in float16

    def __init__(self, **keywords: object) -> None:
        super().__init__(**keywords)
        self.shared = nn.Embedding(self.config.vocab_size, self.config.d_model)
        self.encoder = T5Stack(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        return_dict: bool = True,
    ) -> T5EncoderOutput | tuple[Tensor]:
        """`input_ids` [B, L] or their embeddings [B, L, E]; no token attends to where `attention_mask` [B, L] is 0.

        Without `return_dict` what comes is a plain tuple.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        x_BLE = self.shared(input_ids) if inputs_embeds is None else inputs_embeds
        mask_B11L = None if attention_mask is None else attention_mask.bool()[:, None, None]
        states_BLE = self.encoder(x_BLE, mask_B11L)
        return T5EncoderOutput(states_BLE) if return_dict else (states_BLE,)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool = True) -> nn.Module:
        """Rows for more tokens: their mean is that of the known ones, or they are zero until somebody fills them."""
        known_VE = self.shared.weight
        least = len(known_VE)
        if new_num_tokens < least:
            raise ValueError(f"new_num_tokens must be at least the {least} that there are, got {new_num_tokens}.")
        new_E = known_VE.mean(0) if mean_resizing else torch.zeros_like(known_VE[0])
        grown_VE = torch.cat([known_VE, new_E.expand(new_num_tokens - least, -1)])
        self.shared.weight = nn.Parameter(grown_VE, requires_grad=known_VE.requires_grad)
        self.shared.num_embeddings = new_num_tokens
        self.config = T5EncoderConfig.from_json(self.config.to_json(), vocab_size=new_num_tokens)
        return self.shared

    @classmethod
    def rename_keys(cls, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return T5State(state_dict)

    def _fill(self, state: Mapping[str, Tensor], dtype: torch.dtype, place: str) -> None:
        assert isinstance(state, T5State), "as `rename_keys` made it"
        refuse_packed(state.state, place)
        fill(self, state, dtype=dtype, place=place)

    def _own_keys(self) -> dict[str, Any]:
        """As transformers finds out which class it is."""
        told = {"architectures": [type(self).__name__], "model_type": "t5", "is_encoder_decoder": False}
        return {**told, "use_cache": False, "dtype": str(self.dtype).removeprefix("torch.")}


class T5Stack(nn.Module):
    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, is_first=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x_BLE: Tensor, mask_B11L: Tensor | None) -> Tensor:
        x_BLE, bias_BNLL = self.dropout(x_BLE), None
        for block in self.block:
            x_BLE, bias_BNLL = block(x_BLE, mask_B11L, bias_BNLL)
        states_BLE: Tensor = self.dropout(self.final_layer_norm(x_BLE))
        return states_BLE


class T5Block(nn.Module):
    """The first one makes what is added to all attention scores, from where tokens stand and from the mask."""

    def __init__(self, config: T5EncoderConfig, *, is_first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, is_first=is_first), T5LayerFF(config)])

    def forward(self, x_BLE: Tensor, mask_B11L: Tensor | None, bias_BNLL: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        x_BLE, bias_BNLL = attention(x_BLE, mask_B11L, bias_BNLL)
        return _bounded(feed_forward(_bounded(x_BLE))), bias_BNLL


class T5LayerSelfAttention(nn.Module):
    def __init__(self, config: T5EncoderConfig, *, is_first: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_table=is_first)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x_BLE: Tensor, mask_B11L: Tensor | None, bias_BNLL: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias_BNLL is None:
            bias_BNLL = self.SelfAttention.bias(x_BLE.shape[1], mask_B11L)
        read_BLE = self.SelfAttention(self.layer_norm(x_BLE), bias_BNLL)
        return x_BLE + self.dropout(read_BLE), bias_BNLL


class T5Attention(nn.Module):
    """Its scores are not divided by the root of the heads' width: T5's weights were drawn so as to need no division."""

    def __init__(self, config: T5EncoderConfig, *, has_table: bool) -> None:
        super().__init__()
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        if has_table:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.num_heads, self.dropout = config.num_heads, config.dropout_rate
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance

    def forward(self, x_BLE: Tensor, bias_BNLL: Tensor) -> Tensor:
        q_BNLK, k_BNLK, v_BNLK = (
            layer(x_BLE).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        dropout = self.dropout if self.training else 0.0
        bias_BNLL = bias_BNLL.to(q_BNLK.dtype)
        out_BNLK = F.scaled_dot_product_attention(
            q_BNLK, k_BNLK, v_BNLK, attn_mask=bias_BNLL, dropout_p=dropout, scale=1.0
        )
        out_BLE: Tensor = self.o(out_BNLK.transpose(1, 2).flatten(2))
        return out_BLE

    def bias(self, length: int, mask_B11L: Tensor | None) -> Tensor:
        """[B or 1, N, L, L]: a learned number for how far a key is from its query; what is masked is far below all."""
        place = mask_B11L.device if mask_B11L is not None else self.relative_attention_bias.weight.device
        at_L = torch.arange(length, device=place)
        buckets_LL = bucket(at_L - at_L[:, None], num_buckets=self.num_buckets, max_distance=self.max_distance)
        bias_1NLL: Tensor = self.relative_attention_bias(buckets_LL).permute(2, 0, 1)[None].contiguous()
        if mask_B11L is None:
            return bias_1NLL
        return torch.where(mask_B11L, bias_1NLL, torch.finfo(bias_1NLL.dtype).min)


def bucket(offset_LL: Tensor, *, num_buckets: int, max_distance: int) -> Tensor:
    """Which distances share a number (arXiv:1910.10683, section 2.1).

    Half of the buckets is for keys before their query, the other for those behind. Of each, half again is for one
    distance each, and the rest grows with its logarithm up to `max_distance`; what is further is in the last one.
    """
    half = num_buckets // 2
    exact = half // 2
    distance_LL = offset_LL.abs()
    grown_LL = torch.log(distance_LL.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far_LL = (exact + (grown_LL * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance_LL < exact, distance_LL, far_LL) + half * (offset_LL > 0).long()


class T5LayerFF(nn.Module):
    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.DenseReluDense = T5FeedForward(config)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return x_BLE + self.dropout(self.DenseReluDense(self.layer_norm(x_BLE)))


class T5FeedForward(nn.Module):
    wi: nn.Linear
    wi_0: nn.Linear
    wi_1: nn.Linear

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.kind = config.feed_forward_proj
        for name in ("wi_0", "wi_1") if FEED_FORWARDS[self.kind][1] else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x_BLE: Tensor) -> Tensor:
        act, is_gated = FEED_FORWARDS[self.kind]
        h_BLF = act(self.wi_0(x_BLE)) * self.wi_1(x_BLE) if is_gated else act(self.wi(x_BLE))
        h_BLF, weight = self.dropout(h_BLF), self.wo.weight
        if isinstance(weight, Tensor) and weight.is_floating_point():  # not codes that stand for one
            h_BLF = h_BLF.to(dtype=weight.dtype)
        out_BLE: Tensor = self.wo(h_BLF)
        return out_BLE


class RMSNorm(nn.Module):
    """arXiv:1910.07467, eq. 4. In half precision the weight multiplies what is rounded already."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLE: Tensor) -> Tensor:
        return F.rms_norm(x_BLE, self.weight.shape, eps=self.eps).to(self.weight.dtype) * self.weight


def _bounded(x_BLE: Tensor) -> Tensor:
    """In float16, the largest number in place of infinite ones, so that the next layer does not make NaN of them."""
    if x_BLE.dtype != torch.float16:
        return x_BLE
    largest = torch.finfo(torch.float16).max
    limit = torch.where(x_BLE.isinf().any(), largest - 1000, largest)
    return x_BLE.clamp(-limit, limit)
