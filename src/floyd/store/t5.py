"""T5 encoders as people have them: what their files call the weights, and what the weights say of the network.

shared.weight, encoder.block.0.…                    IF's and google's; the latter with a decoder, which is left out
the same behind a prefix, `…transformer.`           whole checkpoints of other programs
X.weight in float8, beside it X.scale_weight        ComfyUI's scaled files (X.weight_scale in younger ones)
token_embd.weight, enc.blk.0.attn_q.weight, …       GGUF, as llama.cpp names them
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from floyd.errors import CheckpointError
from floyd.store.lazy import LazyState, shape_of

EMBEDDING = "shared.weight"
_TWIN = "encoder.embed_tokens.weight"
_FIRST = "encoder.block.0.layer.0.SelfAttention."
_SCALES = ("scale_weight", "weight_scale")
_IDLE = re.compile(
    r"(decoder\.|dec\.|lm_head\.|output\.weight$|scaled_fp8$|spiece_model$|logit_scale$)"
    r"|.*\.(scale_input|input_scale|comfy_quant|scale_weight|weight_scale)$"
)
_GGUF = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_GGUF_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
_GGUF_REST = {"token_embd.weight": EMBEDDING, "enc.output_norm.weight": "encoder.final_layer_norm.weight"}


class T5State(Mapping[str, Tensor]):
    """An encoder's weights under transformers' names, each read, and unscaled, when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.names = _names(state)  # theirs, by ours
        if EMBEDDING not in self.names:
            raise CheckpointError(
                f"These are not the weights of a T5 encoder: no {EMBEDDING} among {', '.join(list(state)[:3])}, ..."
            )

    def __getitem__(self, key: str) -> Tensor:
        name = self.names[key]
        tensor = self.state[name]
        for scale in _SCALES:
            beside = f"{name.removesuffix('weight')}{scale}"
            if name.endswith(".weight") and beside in self.state:
                return _unscaled(tensor, self.state[beside], name)
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self.names  # without reading it, as a Mapping by itself would

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, key: str) -> tuple[int, ...]:
        return shape_of(self.state, self.names[key])

    def rows(self, key: str, ids: Tensor) -> Tensor:
        """Some rows of a table, of which no more is read where it lies as it is."""
        name, state = self.names[key], self.state
        is_scaled = any(f"{name.removesuffix('weight')}{scale}" in state for scale in _SCALES)
        if isinstance(state, LazyState) and not is_scaled:
            return state.lying[name].rows(ids)
        return self[key][ids]


def config_keys(state: T5State) -> dict[str, Any]:
    """What a T5Config must say for these weights; of what no shape tells, what all published T5 say."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"These are not the weights of a T5 encoder: {key} is missing.")
        return state.shape(key)

    vocab_size, d_model = shape(EMBEDDING)
    buckets, num_heads = shape(f"{_FIRST}relative_attention_bias.weight")
    inner = shape(f"{_FIRST}q.weight")[0]
    dense = "encoder.block.0.layer.1.DenseReluDense."
    is_gated = f"{dense}wi_0.weight" in state
    blocks = {int(key.split(".")[2]) for key in state if key.startswith("encoder.block.")}
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": inner // num_heads,
        "num_heads": num_heads,
        "d_ff": shape(f"{dense}{'wi_0' if is_gated else 'wi'}.weight")[0],
        "num_layers": max(blocks) + 1,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    first = next((key for key in state if key.endswith(f"{_FIRST}q.weight") or key.endswith(f"{_FIRST}q.codes")), "")
    prefix = first[: first.find(_FIRST)] if first else ""
    names: dict[str, str] = {}
    for theirs in state:
        ours = _translated(theirs.removeprefix(prefix))
        if _IDLE.match(ours) or (prefix and not theirs.startswith(prefix)):
            continue
        names[ours] = theirs
    if _TWIN in names:
        twin = names.pop(_TWIN)
        names.setdefault(EMBEDDING, twin)
    return names


def _translated(name: str) -> str:
    if match := _GGUF_BLOCK.fullmatch(name):
        if match[2] not in _GGUF:
            raise CheckpointError(f"{name} is in no T5 encoder that floyd knows.")
        return f"encoder.block.{match[1]}.{_GGUF[match[2]]}.weight"
    return _GGUF_REST.get(name, name)


def _unscaled(tensor: Tensor, scale: Tensor, name: str) -> Tensor:
    is_by_row = scale.shape[:1] == tensor.shape[:1] and scale.numel() == len(tensor)
    if not (tensor.is_floating_point() and scale.is_floating_point() and (is_by_row or scale.numel() == 1)):
        raise CheckpointError(
            f"{name} is stored as {tensor.dtype} with scales of shape {tuple(scale.shape)}, which floyd does not read: "
            "take the fp16 or the plain fp8 file, and quantize it with quantization=."
        )
    return tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
