"""LoRA on networks that are compiled, before it comes and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from tests import tiny
from tests.adapters import lora_files
from tests.adapters.conftest import answer, made, stage_one
from tests.adapters.lora_files import made_up
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from floyd import IFPipeline
from floyd.adapters import attached
from floyd.adapters.calls import call_scale
from floyd.adapters.factors import Factors


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipe() -> IFPipeline:
    """Over a network of one level, which is traced in a second."""
    own = {"block_out_channels": (32,), "down_block_types": ("SimpleCrossAttnDownBlock2D",),
           "up_block_types": ("SimpleCrossAttnUpBlock2D",)}  # fmt: skip
    return stage_one(made({**tiny.STAGE_ONE, **own}, 0))


def test_a_compiled_unet_heeds_lora_that_comes_later(pipe: IFPipeline) -> None:
    compiled = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    plain = answer(compiled)
    pipe.unet = compiled
    pipe.load_lora_weights(lora_files.mixed(made_up(pipe.unet._orig_mod)))
    assert torch.equal(answer(compiled), answer(pipe.unet._orig_mod))
    pipe.unload_lora_weights()
    assert torch.equal(answer(compiled), plain)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_whatever_is_done_to_lora_a_compiled_network_follows(
    pipe: IFPipeline, paint: Callable[..., Tensor], in_place: bool
) -> None:
    """Traced in one piece and run as it is: what a compiler makes of it is the compiler's."""
    layers = lora_files.mixed(made_up(pipe.unet))
    plain = paint(pipe)
    pipe.load_lora_weights(layers)
    full, half = paint(pipe), paint(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.unload_lora_weights()
    count = CompileCounter()
    if in_place:
        pipe.unet.compile(backend=count, fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=count, fullgraph=True)

    def is_now(wanted: Tensor, **options: Any) -> None:
        torch.testing.assert_close(paint(pipe, **options), wanted, atol=1e-5, rtol=0)

    is_now(plain)
    pipe.load_lora_weights(layers)
    is_now(full)
    is_now(half, cross_attention_kwargs={"scale": 0.5})
    is_now(full)
    pipe.disable_lora()
    is_now(plain)
    pipe.enable_lora()
    pipe.fuse_lora()
    is_now(full)
    pipe.unfuse_lora()
    pipe.set_adapters("default_0", 0.5)
    is_now(half)
    pipe.unload_lora_weights()
    is_now(plain)
    assert count.frame_count > 1


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    toy = Toy().eval()
    layers = {name: Factors(lora.down, lora.up, 2.0) for name, lora in made_up(toy, ("one", "two")).items()}
    attached.attach(toy, "a", layers)
    attached.activate(toy, ["a"])
    return toy


X = torch.linspace(-1, 1, 16).view(2, 8)


@torch.no_grad()
def test_every_thread_has_the_scale_of_its_own_call(toy: Toy) -> None:
    scales, wanted, found = (1.0, 0.5, 0.25), {}, {}
    for scale in scales:
        with call_scale(scale):
            wanted[scale] = toy(X)
    assert not torch.equal(wanted[1.0], wanted[0.5])
    compiled = torch.compile(toy, backend="eager", fullgraph=True)

    @torch.no_grad()
    def work(scale: float) -> None:
        with call_scale(scale):
            found[scale] = compiled(X)

    for scale in scales * 2:
        thread = Thread(target=work, args=(scale,))
        thread.start()
        thread.join()
        assert torch.equal(found.pop(scale), wanted[scale])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, at its own words
@torch.no_grad()
def test_a_compiler_of_machine_code_follows_too(toy: Toy) -> None:
    with call_scale(0.5):
        wanted = toy(X)
    compiled = torch.compile(toy)
    with call_scale(0.5):
        torch.testing.assert_close(compiled(X), wanted, atol=1e-5, rtol=0)
    attached.remove(toy, ["a"])
    torch.testing.assert_close(compiled(X), toy(X), atol=1e-5, rtol=0)
