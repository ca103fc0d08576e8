"""No device is special: what a Mac cannot do is not asked of it, and half precision paints the same picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.mac import DEVICE, Mac, MacGenerator, MacTensor
from tests.pipelines.seven import SEVEN, STAGE_OF, built, told
from torch import Tensor

import floyd
from floyd.pipelines.cascade import Cascade
from floyd.runtime.switches import Switches

SCHEDULERS = [name for name in floyd.__all__ if name.endswith("Scheduler")]
SRC = Path(__file__).parents[2] / "src" / "floyd"


def copied(ours: dict[str, Any]) -> dict[str, Any]:
    """Pipelines over components of their own, to be moved and cast."""
    memo: dict[int, Any] = {}
    copies = {}
    for name, pipe in ours.items():
        values = {value: pipe.config[value] for value in pipe.value_names}
        copies[name] = type(pipe)(**deepcopy(pipe.components, memo), **values)
        copies[name].set_progress_bar_config(disable=True)
    return copies


@pytest.fixture
def mac() -> Iterator[Mac]:
    with Mac() as mac:
        yield mac


@pytest.fixture(scope="module")
def moved(loaded: dict[str, Any]) -> dict[str, Any]:
    copies = copied(loaded)
    with Mac():
        return {name: pipe.to("mps") for name, pipe in copies.items()}


@pytest.fixture
def on_mac(moved: dict[str, Any], mac: Mac) -> dict[str, Any]:
    """Pipelines on the Mac, which is there for the test."""
    return moved


# ------------------------------------------------------------------------------------------------------ the stand-in


REFUSED: dict[str, Any] = {
    "a table made in float64": lambda: torch.linspace(0, 1, 4, dtype=torch.float64, device="mps"),
    "a cast to float64": lambda: torch.ones(2, device="mps").double(),
    "float64 from the CPU": lambda: torch.from_numpy(np.ones(3)).to("mps"),
    "a factor in float64": lambda: torch.ones(2, device="mps") * torch.ones(2, dtype=torch.float64),
    "tensors of two devices": lambda: torch.ones(2, device="mps") + torch.ones(2),
    "an operator for CUDA alone": lambda: torch.ops.aten._scaled_dot_product_flash_attention(
        *[torch.ones(1, 1, 2, 8, device="mps")] * 3
    ),
    "an operator that MPS lacks": lambda: torch.linalg.eig(torch.ones(2, 2, device="mps")),
    "CUDA itself": lambda: torch.cuda.synchronize(),
    "a generator of the CPU": lambda: torch.randn(2, generator=torch.Generator(), device="mps"),
}


@pytest.mark.parametrize("offence", REFUSED.values(), ids=REFUSED)
def test_the_stand_in_for_a_mac_refuses(mac: Mac, offence: Any) -> None:
    with pytest.raises((TypeError, RuntimeError, NotImplementedError, AssertionError), match=r"Mac|MPS|CPU|mps"):
        offence()


# --------------------------------------------------------------------------------------------------------- on a Mac


@pytest.mark.parametrize("name", SEVEN)
def test_every_pipeline_paints_on_a_mac_what_it_paints_on_the_cpu(
    ours: dict[str, Any], on_mac: dict[str, Any], mac: Mac, name: str
) -> None:
    expected = built(name, ours)(**told(name, 0)).images
    images = built(name, on_mac)(**told(name, 0)).images
    assert isinstance(images, MacTensor)
    torch.testing.assert_close(images.cpu(), expected, atol=1e-4, rtol=0)
    assert "aten::_scaled_dot_product_attention_math_for_mps" in mac.seen
    assert not {operator for operator in mac.seen if "randn" in operator or "normal_" in operator}


@pytest.mark.parametrize("name", ["IFSuperResolutionPipeline", "StableDiffusionUpscalePipeline"])
@pytest.mark.parametrize("switches", [Switches.off(), Switches.on()], ids=["off", "on"])
def test_nothing_that_makes_it_faster_asks_a_mac_for_what_it_lacks(
    ours: dict[str, Any], on_mac: dict[str, Any], name: str, switches: Switches
) -> None:
    """More than what is on for a Mac by itself, and less."""
    expected = built(name, ours)(**told(name, 0)).images
    pipe = built(name, on_mac)
    assert pipe.switches not in (Switches.off(), Switches.on())
    pipe.switches = switches
    torch.testing.assert_close(pipe(**told(name, 0)).images.cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "the stochastic solver"])
def test_every_scheduler_steps_on_a_mac(ours: dict[str, Any], on_mac: dict[str, Any], scheduler: str) -> None:
    cls = getattr(floyd, scheduler, floyd.DPMSolverMultistepScheduler)
    changes = {} if scheduler in SCHEDULERS else {"algorithm_type": "sde-dpmsolver++"}

    def painted(pipes: dict[str, Any]) -> Tensor:
        pipe = built("IFPipeline", pipes, scheduler=cls.from_config(pipes["one"].scheduler.config, **changes))
        images: Tensor = pipe(**told("IFPipeline", 0) | {"eta": 0.5 if scheduler == "DDIMScheduler" else 0}).images
        return images.cpu()

    torch.testing.assert_close(painted(on_mac), painted(ours), atol=1e-4, rtol=0)


def test_a_cascade_paints_on_a_mac_in_half_precision_and_batch_invariant(ours: dict[str, Any], mac: Mac) -> None:
    cascade = Cascade(*copied(ours).values()).to("mps", torch.float16)
    plain = cascade("a red circle", steps=1, count=2)
    apart = cascade("a red circle", steps=1, count=2, batch_invariant=True)
    assert plain.images[0].size == (192, 192)
    for one, other in zip(plain.images, apart.images, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean() < 3


def test_a_generator_draws_on_its_own_device(on_mac: dict[str, Any], mac: Mac) -> None:
    pipe = built("IFImg2ImgSuperResolutionPipeline", on_mac)
    arguments = told("IFImg2ImgSuperResolutionPipeline", 0)
    by_cpu = pipe(**arguments).images
    assert "aten::randn" not in mac.seen
    by_mac = pipe(**arguments | {"generator": MacGenerator().manual_seed(11)}).images
    assert "aten::randn" in mac.seen
    assert by_cpu.device == by_mac.device == DEVICE
    pipe(**arguments | {"generator": None})


def test_no_room_but_runtime_and_the_apps_names_a_make_of_devices() -> None:
    makes = re.compile(r"torch\.(cuda|mps|xpu)\b|\.cuda\(|is_cuda|is_mps")
    files = [path for path in SRC.rglob("*.py") if path.relative_to(SRC).parts[0] not in ("apps", "runtime")]
    assert len(files) > 60
    assert not [path.name for path in files if makes.search(path.read_text())]


@pytest.mark.parametrize("name", ["IFPipeline", "StableDiffusionUpscalePipeline"])
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_calls_at_the_same_time_may_share_what_is_offloaded(ours: dict[str, Any], name: str, offload: str) -> None:
    expected = [built(name, ours)(**told(name, i)).images for i in (0, 1)]
    pipe = built(name, copied({stage: ours[stage] for stage in {"one", STAGE_OF[name]}}))

    def call(image: int) -> Tensor:
        with Mac():
            images: Tensor = pipe(**told(name, image)).images
            return images.cpu()

    with Mac(), ThreadPoolExecutor(2) as pool:
        getattr(pipe, offload)(device="mps")
        images = list(pool.map(call, (0, 1)))
        assert pipe.device == DEVICE
    for image, wanted in zip(images, expected, strict=True):
        torch.testing.assert_close(image, wanted, atol=1e-4, rtol=0)
    assert {p.device.type for part in pipe.components.values() for p in getattr(part, "parameters", list)()} == {"cpu"}


# ---------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEVEN)
def test_half_precision_paints_nearly_the_same_on_the_cpu(ours: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    expected = built(name, ours)(**told(name, 0)).images
    pipe = built(name, copied({stage: ours[stage] for stage in {"one", STAGE_OF[name]}})).to(dtype)
    images = pipe(**told(name, 0)).images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert (images - expected).abs().mean() < (0.02 if dtype == torch.float16 else 0.1)


def test_a_text_encoder_that_overflows_in_float16_reads_the_same_once_it_is_cast(ours: dict[str, Any]) -> None:
    """T5's last layers, as they do in the published weights."""
    pipe = copied({"one": ours["one"]})["one"]
    with torch.no_grad():
        for name, weight in pipe.text_encoder.named_parameters():
            if name.endswith("wo.weight"):
                weight *= 30_000
    expected = pipe.encode_prompt("a red circle")[0]
    states = pipe.to(torch.float16).encode_prompt("a red circle")[0]
    assert states.dtype == pipe.dtype == torch.float16
    assert (states - expected).abs().mean() < 0.005
