"""The same seed is the same picture: today and tomorrow, alone and in company, on one thread or two."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pipelines.seven import PROMPTS, SEEDS, SEVEN, built, told
from torch import Generator, Tensor

import floyd
from floyd.pipelines.cascade import Cascade

SCHEDULERS = [name for name in floyd.__all__ if name.endswith("Scheduler")]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads` until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def quiet(ours: dict[str, Any], **components: Any) -> dict[str, Any]:
    """Without the safety checker, which is tested elsewhere and takes its time."""
    none = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    for pipe in ours.values():
        for name, part in {**none, **components}.items():
            setattr(pipe, name, part)
    return ours


def pixels(pipe: Any, **arguments: Any) -> Tensor:
    images: Tensor = pipe(**arguments).images
    return images


# ---------------------------------------------------------------------------------------------------- again and again


@pytest.mark.parametrize("name", SEVEN)
def test_a_call_repeated_is_the_same_to_the_last_bit(ours: dict[str, Any], name: str) -> None:
    pipe = built(name, quiet(ours))
    assert torch.equal(pixels(pipe, **told(name, 0)), pixels(pipe, **told(name, 0)))


def test_another_process_and_the_command_paint_the_same_pixels(ours: dict[str, Any], tmp_path: Path) -> None:
    """All three stages; the other process orders its sets and dicts by another hash."""
    Cascade(*quiet(ours).values()).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", "from floyd.apps.cli import main; main()", "generate", PROMPTS[1]]
    options = ["--model=model", "--steps=2", "--seed=3", "--threads=1", "--device=cpu", "--quiet"]
    subprocess.run(
        [*command, *options, "--output=picture.png", "--stages-dir=stages"],
        check=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )
    cascade = Cascade.from_pretrained(tmp_path / "model")
    cascade.use_engine("auto")  # as the command does
    result = cascade(PROMPTS[1], steps=2, seed=3)
    written = sorted((tmp_path / "stages").iterdir(), key=lambda path: path.stat().st_size)
    assert len(written) == 2
    for file, painted in zip([*written, tmp_path / "picture.png"], result.stages.values(), strict=True):
        with Image.open(file) as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(painted[0]))


# --------------------------------------------------------------------------------------------------------- in company


@pytest.mark.parametrize("exact", [False, True], ids=["nearly", "to the last bit"])
@pytest.mark.parametrize("name", SEVEN)
def test_an_image_depends_on_its_own_seed_alone(
    ours: dict[str, Any], threads: Callable[[int], None], name: str, exact: bool
) -> None:
    pipe = built(name, quiet(ours))
    threads(1)
    alone = pixels(pipe, **told(name, 1), batch_invariant=exact)
    threads(2)
    company = pixels(pipe, **told(name, 2, 1), batch_invariant=exact)[1:]
    if exact:
        assert torch.equal(alone, company)
    else:
        torch.testing.assert_close(alone, company, atol=1e-4, rtol=0)


def test_several_images_of_one_prompt_are_those_of_several_prompts(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", quiet(ours))
    listed, repeated = told("IFPipeline", 0, 0, 0), told("IFPipeline", 0) | {"num_images_per_prompt": 3}
    for exact, tolerance in ((False, 1e-4), (True, 0.0)):
        images = []
        for arguments in (listed, repeated):
            arguments["generator"] = [Generator().manual_seed(seed) for seed in SEEDS]
            images.append(pixels(pipe, **arguments, batch_invariant=exact))
        torch.testing.assert_close(*images, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_batch_invariant(
    ours: dict[str, Any], threads: Callable[[int], None], scheduler: str
) -> None:
    """Those that remember must not mix up whose past is whose."""
    cls = getattr(floyd, scheduler)
    pipe = built("IFPipeline", quiet(ours), scheduler=cls.from_config(ours["one"].scheduler.config))
    options = {"batch_invariant": True, "eta": 0.5 if scheduler == "DDIMScheduler" else 0.0}
    alone = [pixels(pipe, **told("IFPipeline", i), **options) for i in (0, 2)]
    threads(2)
    assert torch.equal(pixels(pipe, **told("IFPipeline", 0, 2), **options), torch.cat(alone))


@pytest.mark.parametrize("name", ["IFInpaintingPipeline", "IFInpaintingSuperResolutionPipeline"])
def test_batch_invariance_draws_what_any_call_draws_from_one_generator(ours: dict[str, Any], name: str) -> None:
    pipe = built(name, quiet(ours))
    images, ends = [], []
    for exact in (False, True):
        arguments = told(name, 0, 1) | {"generator": Generator().manual_seed(1), "num_inference_steps": 2}
        images.append(pixels(pipe, **arguments, batch_invariant=exact, resamples=2, feather=2))
        ends.append(arguments["generator"].get_state())
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["IFPipeline", "StableDiffusionUpscalePipeline"])
def test_networks_see_one_image_at_a_time_on_one_thread(
    ours: dict[str, Any], threads: Callable[[int], None], name: str
) -> None:
    pipe = built(name, ours)
    entrances = {"text": pipe.text_encoder.get_input_embeddings(), "unet": pipe.unet.conv_in}
    if name == "IFPipeline":
        entrances["checker"] = next(m for m in pipe.safety_checker.modules() if isinstance(m, torch.nn.Conv2d))
    else:
        entrances["vae"] = pipe.vae.decoder.conv_in
    seen: list[tuple[str, int, int]] = []

    def look(what: str, module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append((what, len(args[0]), torch.get_num_threads()))

    hooks = [door.register_forward_pre_hook(partial(look, what)) for what, door in entrances.items()]
    threads(2)
    try:
        pixels(pipe, **told(name, 0, 1), batch_invariant=True)
        assert set(seen) == {(what, 1, 1) for what in entrances}
        assert torch.get_num_threads() == 2
        seen.clear()
        pixels(pipe, **told(name, 0, 1))
        assert set(seen) == {(what, 4 if what == "unet" else 2, 2) for what in entrances}
    finally:
        for hook in hooks:
            hook.remove()


def test_callbacks_see_the_whole_batch_and_may_change_it(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", quiet(ours))
    shapes: list[torch.Size] = []

    def brighten(pipe: Any, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(tensors["x"].shape)
        text = tensors["prompt_embeds"].flip(0) if i == 0 else tensors["prompt_embeds"]
        return {"x": tensors["x"] + 0.01, "prompt_embeds": text}

    names = ["x", "prompt_embeds"]
    changing = {"callback_on_step_end": brighten, "callback_on_step_end_tensor_inputs": names}
    plain, exact = (pixels(pipe, **told("IFPipeline", 0, 1), **changing, batch_invariant=on) for on in (False, True))
    assert set(shapes) == {plain.shape}
    torch.testing.assert_close(plain, exact, atol=1e-4, rtol=0)


def test_a_cascade_takes_batch_invariance(ours: dict[str, Any], threads: Callable[[int], None]) -> None:
    cascade = Cascade(*quiet(ours).values())
    options: dict[str, Any] = {"steps": 2, "batch_invariant": True}
    alone = cascade(PROMPTS[0], seed=6, **options)
    threads(2)
    company = cascade(PROMPTS[0], seed=5, count=2, **options)
    for size, pictures in alone.stages.items():
        np.testing.assert_array_equal(np.asarray(pictures[0]), np.asarray(company.stages[size][1]))
    with pytest.raises(TypeError, match="batch_invariant must be True or False"):
        cascade(PROMPTS[0], batch_invariant=1)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- at one time


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Each in a thread of its own, begun together."""
    start = Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        start.wait(30)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def test_calls_at_the_same_time_do_not_disturb_each_other(ours: dict[str, Any]) -> None:
    """Shared components, other tasks, one whose sampler is swapped under way, one with another that takes a single
    thread for itself."""
    parts = quiet(ours)["one"].components
    solver = floyd.UniPCMultistepScheduler.from_config(parts["scheduler"].config)
    names = ["IFPipeline", "IFPipeline", "IFInpaintingPipeline", "StableDiffusionUpscalePipeline"]

    def work(i: int, swaps: bool = True) -> Tensor:
        pipe = built(names[i], ours, **({"scheduler": solver} if i == 1 else {}))

        def swap(place: int, t: int, x: Tensor) -> None:
            if swaps and i == 0:
                pipe.scheduler = solver

        return pixels(pipe, **told(names[i], 0, 1), batch_invariant=i == 1, callback=swap)

    expected = [work(i, swaps=False) for i in range(4)]
    for image, alone in zip(at_once(*[lambda i=i: work(i % 4) for i in range(8)]), expected * 2, strict=True):
        assert torch.equal(image, alone)


def test_a_sampler_that_is_swapped_during_a_call_is_for_the_next_one(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", quiet(ours))
    expected = pixels(pipe, **told("IFPipeline", 0))
    old, new = pipe.scheduler, floyd.HeunDiscreteScheduler.from_config(pipe.scheduler.config)

    def swap(i: int, t: int, x: Tensor) -> None:
        pipe.scheduler = new

    assert torch.equal(pixels(pipe, **told("IFPipeline", 0), callback=swap), expected)
    assert pipe.scheduler is new
    assert not torch.equal(pixels(pipe, **told("IFPipeline", 0)), expected)
    pipe.scheduler = old
    assert torch.equal(pixels(pipe, **told("IFPipeline", 0)), expected)


def test_progress_bars_of_calls_at_the_same_time_count_their_own_steps(ours: dict[str, Any]) -> None:
    streams = [io.StringIO(), io.StringIO()]
    pipes = [built("IFPipeline", quiet(ours)) for _ in streams]
    for pipe, stream in zip(pipes, streams, strict=True):
        pipe.set_progress_bar_config(file=stream)
    options = [{"num_inference_steps": 4}, {"num_inference_steps": 7}]
    at_once(*[lambda p=p, o=o: pixels(p, **told("IFPipeline", 0) | o) for p, o in zip(pipes, options, strict=True)])
    for stream, total in zip(streams, ("4/4", "7/7"), strict=True):
        shown = re.findall(r"\d+/\d+", stream.getvalue())
        assert shown[-1] == total
        assert {one.split("/")[1] for one in shown} == {total[-1]}
