"""What the docs ask for and a test machine does not have: the web, bitsandbytes, a compiler, a GPU, patience."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from floyd.diffusion.samplers import Sampler
from floyd.diffusion.timesteps import Step
from floyd.pipelines.options import Options
from floyd.pipelines.painter import Painter
from floyd.store import weights

_MANY, _FEW = 50, 10  # steps


def take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten, where a call is told fifty or more, or nothing: of these networks they are noise all the same."""
    steps_for = Painter.steps_for

    def fewer(self: Painter, options: Options, strength: float = 1.0) -> tuple[Sampler, tuple[Step, ...]]:
        if options.timesteps is None and options.num_inference_steps >= _MANY:
            options = replace(options, num_inference_steps=_FEW)
        return steps_for(self, options, strength)

    monkeypatch.setattr(Painter, "steps_for", fewer)


def serve_pictures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`load_image` finds a picture at every address, a black and white one where its name says mask. Returns a list
    that will hold the addresses."""
    asked: list[str] = []

    def urlopen(request: Request, timeout: float) -> BytesIO:
        asked.append(request.full_url)
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        if "mask" in request.full_url:
            pixels[:] = 0
            pixels[12:24, 8:40] = 255
        content = BytesIO()
        Image.fromarray(pixels).save(content, format="PNG")
        return BytesIO(content.getvalue())

    monkeypatch.setattr("floyd.images.load.urlopen", urlopen)
    return asked


class Bytes(nn.Module):
    """A linear layer of int8 weights and a scale for each row, as bitsandbytes' is on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() @ (self.weight * self.scale).T).to(x.dtype)


def quantize_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`T5EncoderModel.from_pretrained(..., quantization_config=...)` quantizes as bitsandbytes does: every linear layer
    but `wo`, and what comes of it refuses to be cast. Where bitsandbytes is installed, it does so itself."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    from transformers import BitsAndBytesConfig, T5EncoderModel

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a quantized network cannot be moved or cast")

    def load(*args: Any, quantization_config: Any = None, **options: Any) -> Any:
        model = plain(*args, **options)
        if quantization_config is None:
            return model
        assert isinstance(quantization_config, BitsAndBytesConfig)
        assert quantization_config.load_in_8bit
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and not name.endswith(".wo"):
                model.set_submodule(name, Bytes(module))
        model.is_quantized = True
        monkeypatch.setattr(model, "to", refuse)
        return model

    plain = T5EncoderModel.from_pretrained
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", load)


def lay_out_a_single_t5(published: Path, folder: Path) -> None:
    """The T5 of the published checkpoints as one file, as other programs have it."""
    index = next(published.rglob("text_encoder/model.safetensors.index.json"))
    state = {key: tensor.half() for key, tensor in weights.read(index.parent).items()}
    weights.write_file(state, folder / "t5xxl_fp16.safetensors")


def compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces, as strictly as it is asked to, and runs what it traced as it is: no C++, no minutes."""
    compiled = torch.compile

    def traced(model: Any = None, *, mode: str | None = None, **options: Any) -> Any:
        if model is None:
            return partial(traced, **options)
        return compiled(model, **{"backend": "eager", **options})

    monkeypatch.setattr(torch, "compile", traced)


def take_the_cpu_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that is sent to "cuda" goes to the CPU."""
    for room in ("base", "assembly"):  # where a map of devices is read, and where networks are sent
        monkeypatch.setattr(f"floyd.pipelines.{room}.reachable", lambda device: torch.device("cpu"))
