"""A plan at work: the same pictures in less memory, weights that come and go, and a second try."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.adapters import lora_files
from tests.adapters.lora_files import made_up
from torch import nn

from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.deepfloyd_if import IFPipeline
from floyd.pipelines.events import StageStarted
from floyd.pipelines.memory import Managed, managed
from floyd.pipelines.sizing import Sizing, Workload
from floyd.runtime import sleeping
from floyd.runtime.budget import Budget
from floyd.runtime.machine import ANY_CARD
from floyd.runtime.parts import Precision
from floyd.runtime.placement import Assigned
from floyd.runtime.places import CARD_WORKSPACE
from floyd.runtime.plan import plan
from floyd.runtime.sleeping import is_asleep
from floyd.runtime.streaming import Streamed
from floyd.runtime.switches import Switches

PROMPT, STEPS = "a red circle", 2


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> list[Path]:
    return list(folders.values())


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> np.ndarray:
    return painted(Cascade.from_pretrained(*models))


def painted(cascade: Cascade, **options: Any) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in cascade(PROMPT, steps=STEPS, **options).images])


def tight(models: list[Path]) -> Cascade:
    """With so little main memory that networks are read for each use."""
    roomy = managed(models, Budget(vram=0, ram="64GB"), dtype="float32")
    budget, planned = roomy.plan.ram_peak, roomy
    while all(choice.is_kept for choice in planned.plan.choices):
        budget -= 50_000
        planned = Managed.of(roomy.sizing, Budget(vram=0, ram=budget))
    cascade = Cascade.from_pretrained(*models, memory=Budget(vram=0, ram=budget), torch_dtype="float32")
    assert cascade.memory is not None
    assert not all(choice.is_kept for choice in cascade.memory.plan.choices)
    return cascade


def smallest_card(sizing: Sizing) -> int:
    size = CARD_WORKSPACE
    while True:
        try:
            plan(sizing.parts(), Budget(vram=size, ram="64GB"), ANY_CARD)
            return size
        except ValueError:
            size += 500_000


# ------------------------------------------------------------------------------------------------------------ planned


def test_with_a_plan_the_pictures_are_the_same(models: list[Path], expected: np.ndarray) -> None:
    cascade = Cascade.from_pretrained(*models, memory="auto")
    assert cascade.memory is not None
    assert {choice.place for choice in cascade.memory.plan.choices} <= {"cpu", "card"}
    assert np.array_equal(painted(cascade), expected)


def test_networks_that_main_memory_cannot_keep_are_read_for_each_use(models: list[Path], expected: np.ndarray) -> None:
    cascade = tight(models)
    assert cascade.memory is not None
    napping = [choice.part for choice in cascade.memory.plan.choices if not choice.is_kept]
    networks = {f"{name}.{part}": network for name, stage in cascade.stages.items()
                for part, network in stage.components.items()}  # fmt: skip
    for _ in range(2):
        assert all(is_asleep(networks[part]) for part in napping)
        assert np.abs(painted(cascade) - expected).max() <= 1
    resting = {id(networks[part]) for part in napping}  # the safety checker is that of all stages
    assert not any(is_asleep(network) for network in networks.values() if id(network) not in resting)


def test_each_of_them_is_read_once_for_a_picture(models: list[Path]) -> None:
    """T5 too: stages that are given its states have no use for it."""
    cascade = tight(models)
    assert cascade.memory is not None
    napping = {choice.part for choice in cascade.memory.plan.choices if not choice.is_kept}
    read: list[str] = []

    def counted(part: str, load: Any) -> Any:
        return lambda: (read.append(part), load())[1]

    for name, stage in cascade.stages.items():
        for component, network in stage.components.items():
            if (part := f"{name}.{component}") in napping:
                sleeper = sleeping._SLEEPERS[network]
                sleeper.load = counted(part, sleeper.load)
    painted(cascade)
    assert "stage_1.text_encoder" in napping
    assert sorted(read) == sorted(napping)


def test_the_next_stage_is_read_behind_the_one_that_paints(
    models: list[Path], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = tight(models)
    assert cascade.memory is not None
    last = cascade.stages["stage_3"].unet
    choices = [replace(c, is_kept=c.part != "stage_3.unet") for c in cascade.memory.plan.choices]
    cascade.memory.plan = replace(cascade.memory.plan, choices=tuple(choices))
    cascade.memory.budget = replace(cascade.memory.budget, ram=2**40)
    cascade.unload()
    fetched: list[tuple[str, Any]] = []
    running: list[str] = []
    monkeypatch.setattr("floyd.pipelines.memory.fetch_ahead", lambda network: fetched.append((running[-1], network)))
    for event in cascade.run(PROMPT, steps=STEPS):
        if isinstance(event, StageStarted):
            running.append(event.stage)
        elif not running:
            running.append("text")
    assert ("stage_1", last) in fetched or ("stage_2", last) in fetched


def test_a_pipeline_by_itself_is_planned_too(folders: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["one"], memory=Budget(ram="32GB"))
    assert pipe.memory is not None
    assert {choice.part for choice in pipe.memory.plan.choices} == {"text_encoder", "unet", "safety_checker"}
    assert isinstance(pipe._placement, Assigned)
    without = DiffusionPipeline.from_pretrained(
        folders["one"], memory="auto", text_encoder=None, torch_dtype="bfloat16"
    )
    assert without.memory is not None
    assert {choice.part for choice in without.memory.plan.choices} == {"unet", "safety_checker"}
    assert without.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("is_small", [True, False])
def test_on_a_card_it_would_stream_the_same_picture(models: list[Path], expected: np.ndarray, is_small: bool) -> None:
    """The plan of a card, on a device that is the CPU's memory once more."""
    cascade = Cascade.from_pretrained(*models)
    sizing = Sizing.of_models(models, machine=ANY_CARD, workload=Workload(steps=(STEPS,) * 3))
    exact = sizing.with_fixed({part.name: Precision("float32") for part in sizing.parts()})
    managed = Managed.of(exact, Budget(vram=smallest_card(exact) if is_small else "1GB", ram="64GB"))
    for name, stage in cascade.stages.items():
        stage.manage(managed.stage(name))
    cascade.stages["stage_3"].vae.disable_tiling()  # the smallest card would want it
    placed = cascade.stages["stage_2"]._placement
    assert isinstance(placed, Assigned)
    assert isinstance(placed.of(cascade.stages["stage_2"].unet), Streamed) == is_small
    assert np.abs(painted(cascade) - expected).max() <= 1  # where a batch is cut, kernels may round otherwise


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"memory": "auto", "device_map": "cpu"}, "leave one out"),
        ({"memory": "plenty"}, "must be 'auto' or a size"),
        ({"memory": "100MB"}, "too little for this: the smallest that works is"),
        ({"memory_for": Workload(count=2)}, "pass memory='auto', too"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(models: list[Path], options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Cascade.from_pretrained(*models, **options)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a card")
def test_a_budget_for_a_card_that_is_not_here_is_told(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    DiffusionPipeline.from_pretrained(folders["two"], memory=Budget(vram="8GB"))
    assert "no accelerator here, so a budget of VRAM has no effect" in caplog.text


def test_where_memory_is_short_no_weights_are_laid_out_anew(models: list[Path], expected: np.ndarray) -> None:
    cascade = Cascade.from_pretrained(*models, memory=Budget(vram=0, ram="8GB"))
    assert cascade.memory is not None
    stage = cascade.stages["stage_2"]
    assert stage.switches == Switches.best_for("cpu")
    plan = cascade.memory.plan
    assert plan["stage_2.unet"].copied_bytes > 0
    choices = tuple(replace(c, copies=c.part != "stage_2.unet") for c in plan.choices)
    cascade.memory.plan = replace(plan, choices=choices)
    assert stage.switches == Switches.best_for("cpu").without_copies()
    assert cascade.stages["stage_1"].switches == Switches.best_for("cpu")
    assert np.abs(painted(cascade) - expected).max() <= 1
    stage.switches = Switches.on()
    assert stage.switches == Switches.on()


# ------------------------------------------------------------------------------------------------------------ unloaded


def test_what_is_unloaded_is_gone_and_comes_back(models: list[Path], expected: np.ndarray) -> None:
    cascade = Cascade.from_pretrained(*models)
    weights = [weakref.ref(p) for stage in cascade.stages.values() for p in stage.unet.parameters()]
    cascade.unload()
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert {p.device.type for p in cascade.stages["stage_1"].text_encoder.parameters()} == {"meta"}
    assert np.array_equal(painted(cascade), expected)


def test_what_came_from_no_checkpoint_stays(ours: dict[str, Any]) -> None:
    pipe = ours["three"]
    given = nn.Linear(2, 2)
    pipe.text_encoder = given
    pipe.unload()
    assert not given.weight.is_meta


def test_an_unloaded_pipeline_can_be_saved_and_moved(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["two"])
    before = pipe.unet.conv_in.weight.clone()
    pipe.unload()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(DiffusionPipeline.from_pretrained(tmp_path).unet.conv_in.weight, before)
    pipe.unload()
    assert torch.equal(pipe.to(torch.bfloat16).unet.conv_in.weight, before.bfloat16())


# --------------------------------------------------------------------------------------------------------- second tries


class Short:
    """A network's `paint` that runs out of memory so many times, at its second call and after."""

    def __init__(self, unet: Any, times: int) -> None:
        self.paint, self.times, self.calls = unet.paint, times, 0
        self.rows: list[int] = []

    def __call__(self, sample: torch.Tensor, *arguments: Any, **told: Any) -> torch.Tensor:
        self.calls += 1
        self.rows.append(len(sample))
        if self.calls > 1 and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.paint(sample, *arguments, **told)


def test_where_memory_runs_out_it_is_tried_once_more_with_less(
    ours: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ours["one"]
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    whole = pipe(PROMPT, generator=torch.Generator().manual_seed(1), **call).images
    short = Short(pipe.unet, times=1)
    monkeypatch.setattr(pipe.unet, "paint", short, raising=False)
    again = pipe(PROMPT, generator=torch.Generator().manual_seed(1), **call).images
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=0)
    assert short.rows == [2, 2, 1, 1, 1, 1, 1, 1]
    assert "Out of memory (CUDA out of memory)" in caplog.text
    assert "memory='6GB'" in caplog.text


def test_it_is_tried_no_more_than_once_more(ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours["one"].unet, "paint", Short(ours["one"].unet, times=2), raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        ours["one"](PROMPT, num_inference_steps=3)


def test_a_cascade_repeats_the_stage_with_a_smaller_plan(
    models: list[Path], expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    cascade = Cascade.from_pretrained(*models, memory=Budget(vram=0, ram="4GB"))
    assert cascade.memory is not None
    before = cascade.memory.budget.ram_bytes
    unet = cascade.stages["stage_2"].unet
    unet.paint = Short(unet, times=1)
    with caplog.at_level(logging.WARNING):
        assert np.abs(painted(cascade) - expected).max() <= 1
    assert cascade.memory.budget.ram_bytes < before
    assert "tried once more" in caplog.text


def test_a_batch_in_pieces_is_the_same_batch(ours: dict[str, Any]) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "num_images_per_prompt": 2}
    for name, image in (("one", {}), ("two", {"image": torch.zeros(1, 3, 32, 32)})):
        pipe = ours[name]
        if name == "two":
            call |= {"prompt_embeds": torch.zeros(1, 16, 32), "negative_prompt_embeds": torch.zeros(1, 16, 32)}
        told = {**call, **image} if name == "two" else {**call, "prompt": PROMPT}
        whole = pipe(**told, generator=torch.Generator().manual_seed(1)).images
        pipe.max_rows = 3
        pieces = pipe(**told, generator=torch.Generator().manual_seed(1)).images
        torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ measured


PREDICT = """
import sys
from pathlib import Path
from floyd import Cascade
from floyd.pipelines.sizing import Workload
from floyd.runtime.budget import Budget

size = int(sys.argv[1])
cascade = Cascade.built_in(memory=Budget(vram=0), memory_for=Workload(size=size))
cascade("a red circle", size=size, steps=2)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(cascade.memory.plan.ram_peak, int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 256, 1024])
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's peak")
def test_the_predicted_peak_of_main_memory_is_the_measured_one(size: int) -> None:
    """With as many threads as there are cores, of which each takes room of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PREDICT, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    predicted, measured = map(int, done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_network_with_lora_is_not_read_from_the_disk_again(models: list[Path]) -> None:
    """What lies there is without."""
    cascade = Cascade.from_pretrained(*models, memory=Budget(vram=0, ram="4GB"))
    stage = cascade.stages["stage_1"]
    layers = made_up(IFPipeline.from_pretrained(models[0]).unet)
    plain = painted(cascade)
    stage.load_lora_weights(lora_files.peft(layers))
    changed = painted(cascade)
    assert np.abs(changed - plain).max() > 3
    cascade.unload()
    np.testing.assert_array_equal(painted(cascade), changed)
