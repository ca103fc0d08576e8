"""Nothing in a sampler's step waits for the device, and none of it sorts a whole picture: watched from below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import floyd
from floyd.diffusion.canvas import Canvas
from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.engine import denoise
from floyd.diffusion.guidance import Guidance
from floyd.diffusion.noise import Noise

# What reads a number of the device's on the host, or has a size that only the device knows.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
SCHEDULERS = (
    floyd.DDPMScheduler,
    floyd.DDIMScheduler,
    floyd.DPMSolverMultistepScheduler,
    floyd.UniPCMultistepScheduler,
    floyd.EulerDiscreteScheduler,
    floyd.EulerAncestralDiscreteScheduler,
    floyd.HeunDiscreteScheduler,
)


class Watched(TorchDispatchMode):
    """Refuses to wait for the "device", which is where pictures are: all tensors as large as one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        large = any(isinstance(x, Tensor) and x.ndim > 0 for x in args)
        assert not (large and name in WAITS), f"{name} waits for the device"
        assert not (large and name in ("sort", "argsort", "msort")), f"{name} puts a whole picture in order"
        return func(*args, **(kwargs or {}))


def network(x_KCHW: Tensor, t: int, told: Conditioning) -> Tensor:
    return torch.cat([x_KCHW, x_KCHW * 0.1], dim=1).mul(0.9)


def painted(scheduler: Any) -> Tensor:
    text_BLD = torch.zeros(2, 1, 1)
    guidance = Guidance.classifier_free(Conditioning(text_BLD), Conditioning(text_BLD), 4.0)
    canvas, noise = Canvas.blank(2, 8, 8), Noise(torch.Generator().manual_seed(0))
    steps = scheduler.steps(scheduler.timesteps_for(5))
    sampler = scheduler.sampler(5)
    x_BCHW = canvas.first(sampler.schedule, steps[0].t, noise)
    return denoise(x_BCHW, guidance.predictor(network), sampler, steps, canvas, noise)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_no_step_waits_for_the_device_or_sorts(kind: Any) -> None:
    thresholding = {"thresholding": True, "sample_max_value": 1.5} if kind in SCHEDULERS[:4] else {}  # Euler has none
    with Watched():
        picture_BCHW = painted(kind(beta_schedule="squaredcos_cap_v2", **thresholding))
    assert picture_BCHW.isfinite().all()


@pytest.mark.parametrize("waiting", [lambda x: x.reshape(6)[:1].item(), lambda x: x.sort(), lambda x: x.nonzero()])
def test_waiting_would_be_noticed(waiting: Any) -> None:
    with Watched(), pytest.raises(AssertionError):
        waiting(torch.ones(2, 3))
