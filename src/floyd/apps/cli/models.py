"""Which cascade a command works with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer

from floyd.apps.names import expanded
from floyd.store.imports import without_collecting

if TYPE_CHECKING:
    import torch

    from floyd.pipelines.cascade import Cascade

BUILT_IN = "built-in"

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A folder of stages, or (given once for each stage) up to three folders or hub ids of pipelines; "
        "if-m, if-l, if-xl are DeepFloyd's. The built-in checkpoint if not given.",
        show_default=False,
    ),
]
Variant = Annotated[
    str | None, typer.Option(help="Which files of the weights, as in fp16.", show_default="the plain ones")
]
Dtype = Annotated[
    str | None, typer.Option(help="Precision of the weights: float32, float16 or bfloat16.", show_default="float32")
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Keep the weights of text encoders and UNets in fewer bits: int8, fp8 or int4.", show_default="no"
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="auto|torch|winograd|openvino",
        help="What runs the networks on a CPU. winograd needs a C++ compiler, once; auto takes it where it runs, and "
        "torch elsewhere and with --vram and --ram.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps, cuda:1; auto takes the best there is.")]
Vram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="How much of the card's memory to use, as in 8GB: precision and place of each network are chosen so that "
        "it fits. auto is what is free.",
        show_default="no plan",
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE|auto", help="How much main memory to use, likewise.", show_default="what is free"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="How many CPU threads to use.", show_default="all cores")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing unless something is wrong.")]


@without_collecting()
def load(
    models: Sequence[str] | None,
    *,
    dtype: str | None,
    device: str,
    threads: int | None,
    variant: str | None = None,
    quality: str | None = None,
    quantization: str | None = None,
    engine: str = "torch",
    vram: str | None = None,
    ram: str | None = None,
    size: int | tuple[int, int] | None = None,
    count: int = 1,
) -> Cascade:
    """The stages that pictures of the `size` need. With `vram` or `ram` they are placed by a plan for `count` of them.

    Takes seconds: torch and transformers are imported here.
    """
    from floyd.engines.registry import AUTO, engine_names
    from floyd.pipelines.cascade import Cascade
    from floyd.pipelines.qualities import checked
    from floyd.pipelines.sizing import Workload
    from floyd.runtime.budget import Budget

    if quality is not None:
        checked(quality)
    if engine not in (known := [AUTO, "torch", *engine_names()]):
        raise ValueError(f"--engine must be one of {', '.join(known)}, got {engine!r}.")
    options: dict[str, Any] = {"torch_dtype": dtype, "quantization": quantization, "up_to": size}
    if vram is not None or ram is not None:
        if device != "auto":
            raise ValueError(
                f"--vram and --ram place the networks by a plan; --device {device} says it, too: leave one out."
            )
        options |= {"memory": Budget(vram=vram, ram=ram), "memory_for": Workload(size=size, count=count)}
    prepare(threads)
    if "memory" not in options:
        options["device_map"] = device_named(device)
    if not models:
        if variant is not None:
            raise ValueError(f"The built-in checkpoint has no variants, so --variant {variant} needs a --model.")
        cascade = Cascade.built_in(**options)
    else:
        cascade = Cascade.from_pretrained(*expanded(models), variant=variant, **options)
    if quality is not None:
        cascade = cascade.with_quality(checked(quality))
    if "memory" not in options or engine != AUTO:
        cascade.use_engine(None if engine == "torch" else engine)
    return cascade


def engines_of(cascade: Cascade) -> str | None:
    """The engines of its stages, if any has one."""
    names = [stage.engine or "torch" for stage in cascade.stages.values()]
    return None if set(names) == {"torch"} else names[0] if len(set(names)) == 1 else ",".join(names)


def prepare(threads: int | None) -> None:
    """What holds for the whole process."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of transformers' loading and saving, which would stand amid our own
    if threads is not None:
        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """The device, if this machine has it."""
    from floyd.pipelines.base import device_of_map

    device = device_of_map(name)
    assert device is not None
    return device


def expanded_or_built_in(models: Iterable[str]) -> list[str]:
    """Folders and ids, with floyd's own folder for its name."""
    return [str(files("floyd") / "mini") if name == BUILT_IN else name for name in expanded(list(models))]


def name_of(models: Sequence[str] | None) -> str:
    return ", ".join(expanded(models)) if models else BUILT_IN


def hash_of(models: Sequence[str] | None) -> str:
    """Of all files of a folder, or the commit of a hub id."""
    from floyd.store.fingerprint import fingerprint

    return ", ".join(fingerprint(model) for model in expanded(models or [str(files("floyd") / "mini")]))
