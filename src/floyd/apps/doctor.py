"""What this machine has for floyd, and whether a picture comes out of it. Each look stands for itself: one may fail."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from floyd.apps.names import CASCADES
from floyd.runtime.budget import ram
from floyd.runtime.machine import computes_in
from floyd.store.files import told_size

State = Literal["ok", "note", "wrong"]

PROMPT = "a large red circle above a small blue square on a white background"
STEPS = 4
IF_FP16_BYTES = 25_000_000_000  # if-xl: T5 11.5, UNets 8.6 + 2.5, safety checker 0.6, upscaler 1.7 GB
DRAWING_BYTES = 1_200_000_000  # what the built-in cascade takes for 1024 px
_ANEW = "Install floyd anew, with all that it needs."
_REPORT = "If that does not say what to do, report it with what `floyd doctor --json` prints."
WORDS = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    says: str
    advice: str = ""
    lines: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "says": self.says, "advice": self.advice, **self.facts}


def examine(device: str = "auto", *, online: bool = False) -> Iterator[Finding]:
    """Everything, the picture last. The hub is asked only if so said."""
    looks: dict[str, Callable[[], Finding]] = {
        "floyd": floyd,
        "python": python,
        "torch": torch_itself,
        "packages": packages,
        "extras": extras,
        "devices": devices,
        "engine": engine,
        "memory": memory,
        "disk": disk,
        "cache": cache,
        "token": token,
        "settings": settings,
        **({"hub": hub} if online else {}),
        "picture": lambda: picture(device),
    }
    for name, look in looks.items():
        try:
            yield look()
        except Exception as error:  # whatever it is, the others are to be looked at
            told = " ".join(str(error).split()) or "no message"
            advice = _ANEW if isinstance(error, ImportError) else _REPORT
            yield Finding(name, "wrong", f"{type(error).__name__}: {told}", advice)


def can_draw(findings: list[Finding]) -> bool:
    return any(finding.name == "picture" and finding.state != "wrong" for finding in findings)


def verdict(findings: list[Finding]) -> str:
    """One line."""
    drawn = next((finding for finding in findings if finding.name == "picture"), None)
    if drawn is None or drawn.state == "wrong":
        reason = drawn.says if drawn else "it was not tried"
        return f"floyd cannot draw here: {reason}"
    rest = [finding.name for finding in findings if finding.state != "ok"]
    return f"floyd can draw here: {drawn.says}." + (f" Notes on {', '.join(rest)}." if rest else "")


def floyd() -> Finding:
    from floyd import __version__

    place = Path(__file__).parents[1]
    return Finding("floyd", "ok", f"{__version__} in {place}", facts={"version": __version__, "folder": str(place)})


def python() -> Finding:
    facts = {"version": platform.python_version(), "platform": platform.platform(), "executable": sys.executable}
    says = f"{facts['version']} on {facts['platform']}"
    return Finding("python", "ok", says, facts=facts)


def torch_itself() -> Finding:
    try:
        import torch
    except Exception as error:  # a library that it needs may be missing or broken, which says itself in many ways
        told = f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        return Finding("torch", "wrong", told, "Install it as https://pytorch.org/get-started says for this machine.")
    halves = [dtype for dtype in (torch.bfloat16, torch.float16) if computes_in(dtype, torch.device("cpu"))]
    computes = [str(dtype).removeprefix("torch.") for dtype in (torch.float32, *halves)]
    facts = {
        "version": torch.__version__,
        "built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU or the platform's own",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_computes_in": computes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    says = (
        f"{facts['version']}, CPU with {facts['cpu']} that computes in {', '.join(computes)}, "
        f"{facts['threads']} threads on {facts['cores']} cores"
    )
    return Finding("torch", "ok", says, facts=facts)


def packages() -> Finding:
    """Those without which floyd does not run."""
    found = _installed(None)
    facts = {"versions": {name: now for name, (now, _) in found.items()}}
    says = ", ".join(f"{name} {now or 'missing'}" for name, (now, _) in found.items())
    if wrong := [wanted for _, wanted in found.values() if wanted]:
        quoted = " ".join(f'"{wanted}"' for wanted in wrong)
        return Finding("packages", "wrong", says, f"pip install {quoted}", facts=facts)
    return Finding("packages", "ok", says, facts=facts)


def extras() -> Finding:
    """Those that floyd can do without, by the name that installs them."""
    names = sorted({extra for requirement in _requirements() for extra in _extras_of(requirement)})
    missing = {extra: [name for name, (_, wanted) in _installed(extra).items() if wanted] for extra in names}
    says = ", ".join(f"{extra}: {_without(gone) or 'installed'}" for extra, gone in missing.items())
    facts = {"extras": {extra: not gone for extra, gone in missing.items()}}
    return Finding("extras", "ok", says or "none known", facts=facts)


def _without(names: Sequence[str]) -> str:
    return f"without {', '.join(names)}" if names else ""


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in requires("floyd-if") or []]
    except PackageNotFoundError as error:
        raise ImportError("floyd runs from its sources, so what it needs is not written down") from error


def _extras_of(requirement: Any) -> list[str]:
    marker = str(requirement.marker or "")
    return [part.strip("\"' ") for part in marker.split("extra ==")[1:]]


def _installed(extra: str | None) -> dict[str, tuple[str | None, str]]:
    """By package: its version here, and what to install if that will not do."""
    found = {}
    for requirement in _requirements():
        names = _extras_of(requirement)
        if (extra in names) if extra else not names:
            try:
                now = version(requirement.name)
            except PackageNotFoundError:
                now = None
            does = now is not None and requirement.specifier.contains(now, prereleases=True)
            found[requirement.name] = (now, "" if does else f"{requirement.name}{requirement.specifier}")
    return found


def devices() -> Finding:
    """Where it can compute beside the CPU."""
    import torch

    found = [*_cuda(torch), *_mps(torch), *_xpu(torch)]
    facts = {"devices": found}
    lines = tuple(f"{one['device']}: {one['name']}, {_memory_of(one)}" for one in found)
    if found:
        return Finding("devices", "ok", ", ".join(one["device"] for one in found), lines=lines, facts=facts)
    if shutil.which("nvidia-smi"):
        advice = "Install a torch that is built for CUDA: https://pytorch.org/get-started"
        return Finding("devices", "note", "cpu alone, though a driver of NVIDIA's is here", advice, facts=facts)
    return Finding("devices", "ok", "cpu alone", facts=facts)


def _cuda(torch: Any) -> Iterator[dict[str, Any]]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        yield {
            "device": f"cuda:{index}",
            "name": f"{name} ({'.'.join(map(str, capability))})",
            "total_bytes": total,
            "free_bytes": free,
        }


def _mps(torch: Any) -> Iterator[dict[str, Any]]:
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        yield {
            "device": "mps",
            "name": platform.processor() or "Apple",
            "total_bytes": total,
            "free_bytes": total - torch.mps.driver_allocated_memory(),
        }


def _xpu(torch: Any) -> Iterator[dict[str, Any]]:
    for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        properties = torch.xpu.get_device_properties(index)
        yield {
            "device": f"xpu:{index}",
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "free_bytes": None,
        }


def _memory_of(one: dict[str, Any]) -> str:
    free = "" if one["free_bytes"] is None else f", {told_size(one['free_bytes'])} free"
    return f"{told_size(one['total_bytes'])}{free}"


def engine() -> Finding:
    from floyd.engines.native import found_compiler
    from floyd.errors import EngineError

    try:
        words = found_compiler()
    except EngineError as error:
        says = "torch runs the networks on the CPU: without a C++ compiler at half the speed"
        return Finding("engine", "note", says, str(error), facts={"compiler": None})
    says = f"winograd runs the networks on the CPU, compiled by {' '.join(words)}"
    return Finding("engine", "ok", says, facts={"compiler": words})


def memory() -> Finding:
    total, available = ram()
    facts = {"total_bytes": total, "available_bytes": available}
    if total is None:
        return Finding("memory", "ok", "this system does not tell", facts=facts)
    says = told_size(total) + ("" if available is None else f", {told_size(available)} of it free")
    if available is not None and available < DRAWING_BYTES:
        advice = f"A picture of 1024 px takes {told_size(DRAWING_BYTES)}: close something, or draw smaller ones."
        return Finding("memory", "note", says, advice, facts=facts)
    return Finding("memory", "ok", says, facts=facts)


def disk() -> Finding:
    from floyd.store.cache import cache_root
    from floyd.store.download import free_bytes

    root = cache_root()
    free = free_bytes(root)
    facts = {"folder": str(root), "free_bytes": free}
    says = f"{told_size(free)} free in {root}"
    if free < IF_FP16_BYTES:
        advice = (
            f"The weights of if-xl in fp16 take {told_size(IF_FP16_BYTES)}: make room, or set HF_HOME to a folder on "
            "another disk. The built-in cascade needs none."
        )
        return Finding("disk", "note", says, advice, facts=facts)
    return Finding("disk", "ok", says, facts=facts)


def cache() -> Finding:
    """The pipelines of floyd's kind that were downloaded."""
    from floyd.store.cache import cache_root, cached_pipelines, used_bytes

    root = cache_root()
    known = {"StableDiffusionUpscalePipeline"}
    found = [one for one in cached_pipelines(root) if one.class_name.startswith("IF") or one.class_name in known]
    lines, unfinished = [], 0
    for one in found:
        unfinished += one.unfinished_bytes
        told = [f"{variant} {_without(gone) or 'whole'}" for variant, gone in one.lacking.items()]
        lines.append(f"{one.id}: {'; '.join(told)} ({told_size(one.num_bytes)})")
    models = [{"id": one.id, "commit": one.commit, "bytes": one.num_bytes, "lacking": one.lacking} for one in found]
    facts = {"folder": str(root), "bytes": used_bytes(root), "unfinished_bytes": unfinished, "models": models}
    says = f"{told_size(facts['bytes'])} in {root}, {len(found) or 'no'} models of IF"  # type: ignore[arg-type]
    if unfinished:
        advice = f"{told_size(unfinished)} are of unfinished downloads: the same `floyd download` goes on with them."
        return Finding("cache", "note", says, advice, tuple(lines), facts)
    return Finding("cache", "ok", says, lines=tuple(lines), facts=facts)


def token() -> Finding:
    """Whether there is one. It is not looked at, and nobody is asked about it."""
    from floyd.store.cache import has_token

    if has_token():
        return Finding("token", "ok", "present", facts={"present": True})
    advice = f"DeepFloyd's models need one: accept the licence of {CASCADES['if-xl'][0]}, then run `hf auth login`."
    return Finding("token", "note", "none", advice, facts={"present": False})


def settings() -> Finding:
    """What the environment tells the hub's client and torch. An address may hold a password: names alone."""
    present = [name for name in WORDS if os.environ.get(name)]
    facts = {"set": present}
    says = f"{', '.join(present)} set" if present else "none of the environment's"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Finding(
            "settings", "note", says, "HF_HUB_OFFLINE forbids downloads: unset it to allow them.", facts=facts
        )
    return Finding("settings", "ok", says, facts=facts)


def hub() -> Finding:
    """Whether it answers, and which of the models it opens to this token."""
    from floyd.errors import DownloadError
    from floyd.store.download import check_access
    from floyd.store.source import Source

    models = list(dict.fromkeys(model for cascade in CASCADES.values() for model in cascade))
    closed: dict[str, str] = {}
    for model in models:
        try:
            check_access(Source(model))
        except DownloadError as error:
            closed[model] = str(error)
    facts = {"open": [model for model in models if model not in closed], "closed": closed}
    says = f"opens {len(models) - len(closed)} of {len(models)} models of IF"
    if closed:
        reason = next(iter(closed.values()))
        return Finding("hub", "note", says, reason, tuple(f"closed: {model}" for model in closed), facts)
    return Finding("hub", "ok", says, facts=facts)


def picture(device: str) -> Finding:
    """A tiny one by the built-in model, on the best device; where that fails, on the CPU."""
    from floyd.pipelines.base import device_of_map

    place = str(device_of_map(device))
    try:
        return drawn(place)
    except Exception as error:  # a driver's fault shows itself in many ways
        if place == "cpu":
            raise
        told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        on_cpu = drawn("cpu")
        advice = f"{place} does not draw ({told}). Update its driver and torch, or pass --device cpu."
        return Finding("picture", "note", on_cpu.says, advice, facts={**on_cpu.facts, "failed_on": place})


def drawn(device: str) -> Finding:
    """How long it takes; an error if nothing is seen on it."""
    import numpy as np
    from transformers.utils.logging import disable_progress_bar

    from floyd.pipelines.cascade import Cascade

    disable_progress_bar()
    begun = perf_counter()
    cascade = Cascade.built_in(device_map=device)
    loaded = perf_counter()
    size = min(cascade.sizes.values())
    image = cascade(PROMPT, size=size, seed=0, steps=STEPS).images[0]
    done = perf_counter()
    if np.asarray(image).std() < 1:
        raise RuntimeError(f"the picture that {device} drew is blank")
    facts = {"device": device, "size": size, "steps": STEPS, "load_s": loaded - begun, "draw_s": done - loaded}
    says = f"{size} px in {STEPS} steps took {done - loaded:.1f} s on {device}, loading {loaded - begun:.1f} s"
    return Finding("picture", "ok", says, facts=facts)
