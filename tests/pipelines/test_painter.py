"""One stage, watched, stopped, and painted by networks of other makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

from floyd.diffusion.engine import STOP
from floyd.pipelines.task import Task
from floyd.runtime.placement import OneAtATime
from floyd.runtime.switches import Switches

POSITIVE, NEGATIVE = tiny.embeds()
TEXT: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE}
LOW: dict[str, Any] = {**TEXT, "image": torch.zeros(1, 3, 32, 32)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paint(pipe: Any, **arguments: Any) -> torch.Tensor:
    given = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    picture: torch.Tensor = pipe(generator=seeded(), **given).images
    return picture


class Foreign(nn.Module):
    """A network that can only be called whole, as a compiled one."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.config = network.config
        self.calls: list[dict[str, Any]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype  # type: ignore[no-any-return]

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **told: Any) -> Any:
        self.calls.append({"timestep": timestep, **told})
        told.pop("cross_attention_kwargs", None)
        return self.network(sample, timestep, **told)


@pytest.mark.parametrize("stage", ["one", "two", "three"])
def test_a_network_that_can_only_be_called_whole_paints_the_same(ours: dict[str, Any], stage: str) -> None:
    arguments = TEXT if stage == "one" else LOW
    pipe = ours[stage]
    pipe.switches = Switches(read_once=True)
    split = paint(pipe, **arguments)
    pipe.unet = Foreign(pipe.unet)
    torch.testing.assert_close(paint(pipe, **arguments), split, atol=1e-5, rtol=0)
    assert len(pipe.unet.calls) == 3
    assert all(isinstance(call["timestep"], torch.Tensor) for call in pipe.unet.calls)
    assert ("class_labels" in pipe.unet.calls[0]) == (stage != "one")


def test_a_foreign_network_is_told_the_attention_arguments(ours: dict[str, Any]) -> None:
    ours["one"].unet = Foreign(ours["one"].unet)
    paint(ours["one"], **TEXT, cross_attention_kwargs={"scale": 0.5})
    assert ours["one"].unet.calls[0]["cross_attention_kwargs"] == {"scale": 0.5}


def test_a_scale_without_lora_is_said_to_be_wasted(ours: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    paint(ours["one"], **TEXT, cross_attention_kwargs={"scale": 0.5})
    assert "none acts here: no effect" in caplog.text


def test_the_text_is_read_once_a_call(ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(ours["two"].unet)
    read, count = kind.read, []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(kind, "read", counting)
    paint(ours["two"], **LOW, num_inference_steps=4)
    assert len(count) == 1


def test_a_network_compiled_in_place_is_called_whole(ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    unet = ours["one"].unet
    split = paint(ours["one"], **TEXT)
    calls = []

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return unet.forward(*args, **kwargs)

    monkeypatch.setattr(unet, "_compiled_call_impl", compiled)  # where nn.Module.compile() leaves its work
    torch.testing.assert_close(paint(ours["one"], **TEXT), split, atol=1e-5, rtol=0)
    assert len(calls) == 3


def test_a_compiled_network_of_ours_is_not_told_what_it_does_not_take(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ours["one"].unet, "_compiled_call_impl", ours["one"].unet.forward)
    paint(ours["one"], **TEXT, num_inference_steps=1, cross_attention_kwargs={"scale": 0.5})
    assert "none acts here: no effect" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_paints_the_same(ours: dict[str, Any]) -> None:
    plain = paint(ours["one"], **TEXT)
    ours["one"].unet = torch.compile(ours["one"].unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(paint(ours["one"], **TEXT), plain, atol=1e-5, rtol=0)
    assert type(ours["one"].unet).__name__ == "OptimizedModule"


def test_the_callback_is_called_with_place_time_and_x(ours: dict[str, Any]) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []
    picture = paint(ours["one"], **TEXT, num_inference_steps=4, callback=lambda *a: seen.append(a), callback_steps=2)
    assert [(i, t) for i, t, _ in seen] == [(0, 750), (2, 250)]
    assert seen[0][2].shape == picture.shape
    assert not seen[0][2].requires_grad


def test_a_callback_may_return_anything_and_only_stop_ends_the_chain(ours: dict[str, Any]) -> None:
    whole = paint(ours["one"], **TEXT)
    assert torch.equal(paint(ours["one"], **TEXT, callback=lambda *_: {"latents": 3}), whole)

    seen: list[int] = []

    def stop(i: int, t: int, x_BCHW: torch.Tensor) -> Any:
        seen.append(i)
        return STOP if i == 1 else None

    stopped = paint(ours["one"], **TEXT, callback=stop)
    assert seen == [0, 1]
    assert stopped.shape == whole.shape
    assert not torch.equal(stopped, whole)


@pytest.mark.parametrize("stage", ["one", "two", "three"])
def test_watching_ends_where_the_call_ends(ours: dict[str, Any], stage: str) -> None:
    arguments = TEXT if stage == "one" else LOW
    pipe = ours[stage]
    task: Task = pipe.task(**arguments, num_inference_steps=3, generator=seeded())
    moves = list(pipe.watch(task))
    assert [move.step for move in moves] == list(task.steps)
    called = paint(pipe, **arguments, output_type="latent" if stage == "three" else "pt")
    assert torch.equal(moves[-1].x_BCHW, called)
    if stage != "three":  # the last step of IF goes all the way to its clean picture
        torch.testing.assert_close(moves[-1].clean_BCHW, moves[-1].x_BCHW, atol=1e-6, rtol=0)


def test_whoever_stops_watching_leaves_the_network_where_it_was(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    journey: list[str] = []

    class Watched(OneAtATime):
        def use(self, module: Any) -> Any:
            journey.append("out")
            return _Homecoming(super().use(module), journey)

    pipe._place(Watched(torch.device("cpu")))
    moves = pipe.watch(pipe.task(**TEXT, num_inference_steps=3))
    journey.clear()
    next(moves)
    assert journey == ["out"]
    moves.close()
    assert journey == ["out", "home"]


class _Homecoming:
    def __init__(self, inner: Any, journey: list[str]) -> None:
        self.inner, self.journey = inner, journey

    def __enter__(self) -> Any:
        return self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self.journey.append("home")
        return self.inner.__exit__(*error)


def test_half_precision_networks_paint_in_float32(ours: dict[str, Any], folders: dict[str, Any]) -> None:
    full = paint(ours["one"], **TEXT)
    pipe = type(ours["one"]).from_pretrained(folders["one"], torch_dtype=torch.bfloat16, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    half = paint(pipe, **TEXT)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05


def test_weights_that_want_gradients_record_none(ours: dict[str, Any]) -> None:
    assert any(parameter.requires_grad for parameter in ours["two"].unet.parameters())
    assert not paint(ours["two"], **LOW).requires_grad
