"""The networks that bench_gpu.py compares: made where they run, with random weights that both sides share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from pairs import BUILT_IN
from torch import Tensor, nn

from floyd.models.configs import PRESETS
from floyd.models.t5 import T5EncoderModel
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.store.files import read_json
from floyd.store.text_encoders import load_tokenizer

VAE = {  # of the x4 upscaler
    "block_out_channels": (128, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 256,
    "scaling_factor": 0.08333,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# What stands in for each where everything is tried at small size.
TINY = {"IF-II-L": "mini-2", "x4-upscaler": "mini-3"}


@dataclass(frozen=True)
class Bench:
    """Where, in what precision, and at which size networks are made."""

    device: torch.device
    dtype: torch.dtype
    is_tiny: bool

    def unets(self, name: str) -> tuple[Any, UNet2DConditionModel]:
        """diffusers' and ours, by a preset's name."""
        network = self._made(UNet2DConditionModel, self._unet_keys(name))
        return self._twin(diffusers.UNet2DConditionModel, network), network

    def vaes(self) -> tuple[Any, AutoencoderKL]:
        keys = _stored(BUILT_IN["mini-3"] / "vae") if self.is_tiny else VAE
        network = self._made(AutoencoderKL, keys)
        return self._twin(diffusers.AutoencoderKL, network), network

    def t5s(self) -> tuple[Any, T5EncoderModel]:
        """transformers', which diffusers reads with, and ours."""
        keys = _stored(BUILT_IN["mini-1"] / "text_encoder") if self.is_tiny else T5_XXL
        network = self._made(partial(T5EncoderModel.from_config, keys), {})
        with torch.device("meta"):
            twin = transformers.T5EncoderModel(transformers.T5Config(**keys))
        state = network.state_dict()
        twin.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
        return twin.eval().requires_grad_(False), network

    def tokenizers(self) -> tuple[Any, Any]:
        """The built-in model's: its few pieces are pieces of T5-XXL's many numbers, too."""
        folder = BUILT_IN["mini-1"] / "tokenizer"
        return transformers.T5Tokenizer.from_pretrained(folder), load_tokenizer(folder)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(size, generator=generator, device=self.device).to(dtype or self.dtype)

    def _unet_keys(self, name: str) -> dict[str, Any]:
        return _stored(BUILT_IN[TINY.get(name, "mini-1")] / "unet") if self.is_tiny else PRESETS[name]

    def _made(self, kind: Any, keys: dict[str, Any]) -> Any:
        with torch.device("meta"):
            network = kind(**keys)
        return self._filled(network)

    def _filled(self, network: nn.Module) -> Any:
        """Numbers of a size that neither dies out nor overflows on the way through."""
        network = network.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        generator = torch.Generator(self.device).manual_seed(0)
        for weight in network.parameters():
            if weight.ndim == 1:
                weight.fill_(0.5)
            else:
                weight.normal_(0, (2 / weight[0].numel()) ** 0.5 / 2, generator=generator)
        return network

    def _twin(self, kind: Any, network: Any) -> Any:
        with torch.device("meta"):
            twin = kind.from_config(network.config.to_json())
        twin.load_state_dict(network.state_dict(), assign=True)
        return twin.eval().requires_grad_(False)


def _stored(folder: Any) -> dict[str, Any]:
    return {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
