from __future__ import annotations

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.hub_stub import Hub

from floyd.apps import doctor
from floyd.apps.doctor import Finding, can_draw, devices, examine, ram, verdict
from floyd.errors import CheckpointError
from floyd.pipelines.cascade import Cascade
from floyd.runtime.machine import computes_in

LOOKS = (
    "floyd", "python", "torch", "packages", "extras", "devices", "engine", "memory", "disk", "cache", "token",
    "settings", "picture",
)  # fmt: skip


@pytest.fixture
def brush(monkeypatch: pytest.MonkeyPatch, cascade: Cascade) -> list[Any]:
    """The built-in model is a tiny one with random weights; where it was to draw."""
    asked: list[Any] = []

    def built_in(**options: Any) -> Cascade:
        asked.append(options["device_map"])
        return cascade

    monkeypatch.setattr(Cascade, "built_in", built_in)
    return asked


def named(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.name == name]
    return found


def test_everything_is_looked_at_and_the_picture_comes_last(brush: list[Any]) -> None:
    findings = list(examine())
    assert tuple(finding.name for finding in findings) == LOOKS
    assert not [finding for finding in findings if finding.state == "wrong"]
    assert can_draw(findings)
    assert verdict(findings).startswith("floyd can draw here: 48 px in 4 steps took ")
    assert brush == ["cpu"]
    assert json.loads(json.dumps([finding.to_json() for finding in findings]))


def test_the_facts_are_the_machines(brush: list[Any]) -> None:
    import torch

    findings = list(examine("cpu"))
    assert named(findings, "torch").facts["version"] == torch.__version__
    assert named(findings, "torch").facts["threads"] == torch.get_num_threads()
    halves = [half for half in ("bfloat16", "float16") if computes_in(getattr(torch, half), torch.device("cpu"))]
    assert named(findings, "torch").facts["cpu_computes_in"] == ["float32", *halves]
    versions = named(findings, "packages").facts["versions"]
    assert versions["torch"] == torch.__version__
    assert "diffusers" not in versions
    assert named(findings, "extras").facts["extras"]["test"] is True
    assert named(findings, "picture").facts["draw_s"] > 0


# --- what may be wrong


def test_without_torch_the_rest_is_looked_at_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def import_all_but(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", import_all_but)
    findings = list(examine())
    assert tuple(finding.name for finding in findings) == LOOKS
    wrong = {finding.name: finding for finding in findings if finding.state == "wrong"}
    assert set(wrong) == {"torch", "devices", "picture"}
    assert "cannot be imported (ModuleNotFoundError: No module named 'torch')" in wrong["torch"].says
    assert "https://pytorch.org/get-started" in wrong["torch"].advice
    assert wrong["picture"].advice
    assert not can_draw(findings)
    assert verdict(findings).startswith("floyd cannot draw here: ModuleNotFoundError: No module named")


def test_a_missing_package_and_an_old_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.10", "nosuchpackage>=1,<2", "numpy>=999", 'alsonone; extra == "fast"', 'torch; extra == "fast"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    found = doctor.packages()
    assert found.state == "wrong"
    assert "nosuchpackage missing" in found.says
    assert found.advice == 'pip install "nosuchpackage<2,>=1" "numpy>=999"'
    assert doctor.extras().says == "fast: without alsonone"
    assert doctor.extras().facts == {"extras": {"fast": False}}


def test_without_a_compiler_the_cpu_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = doctor.engine()
    assert found.state == "note"
    assert "half the speed" in found.says
    assert "no-such-compiler" in found.advice
    monkeypatch.setenv("CXX", f"{sys.executable} -S")
    assert doctor.engine().facts == {"compiler": [sys.executable, "-S"]}


def test_a_look_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch, brush: list[Any]) -> None:
    def broken() -> Path:
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr("floyd.store.cache.cache_root", broken)
    findings = list(examine())
    for name in ("disk", "cache"):
        assert named(findings, name).state == "wrong"
        assert "Permission denied" in named(findings, name).says
        assert "floyd doctor --json" in named(findings, name).advice
    assert can_draw(findings)
    assert ". Notes on disk, cache, " in verdict(findings)


@pytest.mark.parametrize("error", [CheckpointError("the weights are torn"), RuntimeError("out of\nmemory")])
def test_what_cannot_draw_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(Cascade, "built_in", fail)
    findings = [*examine("cpu")]
    assert not can_draw(findings)
    assert verdict(findings) == f"floyd cannot draw here: {type(error).__name__}: {' '.join(str(error).split())}"


def test_a_blank_picture_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    def black(prompt: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(images=[Image.new("RGB", (64, 64))])

    class Blank:
        sizes: dict[str, int] = {"stage_1": 64}  # noqa: RUF012
        __call__ = staticmethod(black)

    monkeypatch.setattr(Cascade, "built_in", lambda **options: Blank())
    with pytest.raises(RuntimeError, match="the picture that cpu drew is blank"):
        doctor.picture("cpu")


def test_where_the_device_fails_the_cpu_draws(
    monkeypatch: pytest.MonkeyPatch, brush: list[Any], cascade: Cascade
) -> None:
    def built_in(**options: Any) -> Cascade:
        if options["device_map"] != "cpu":
            raise RuntimeError("the driver is too old\nand so on")
        return cascade

    monkeypatch.setattr(Cascade, "built_in", built_in)
    monkeypatch.setattr("floyd.pipelines.base.device_of_map", lambda name: "cuda:0")
    found = doctor.picture("auto")
    assert (found.state, found.facts["device"], found.facts["failed_on"]) == ("note", "cpu", "cuda:0")
    assert "cuda:0 does not draw (RuntimeError: the driver is too old). Update its driver" in found.advice
    assert can_draw([found])


def test_an_unknown_device_is_told(brush: list[Any]) -> None:
    findings = list(examine("toaster"))
    assert named(findings, "picture").state == "wrong"
    assert "toaster" in named(findings, "picture").says


# --- devices and memory


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What torch says of its devices."""
    import torch

    def set_up(*, cuda: int = 0, mps: bool = False, xpu: int = 0) -> None:
        for name, count in (("cuda", cuda), ("xpu", xpu)):
            monkeypatch.setattr(getattr(torch, name), "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(getattr(torch, name), "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10_000_000_000, 16_000_000_000))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 20_000_000_000)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1_000_000_000)
        properties = SimpleNamespace(name="Arc", total_memory=8_000_000_000)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties)

    return set_up


def test_devices_are_told_with_their_memory(machine: Callable[..., None]) -> None:
    machine(cuda=2, mps=True, xpu=1)
    found = devices()
    assert found.says == "cuda:0, cuda:1, mps, xpu:0"
    assert found.lines[0] == "cuda:0: Tesla T4 (7.5), 16 GB, 10 GB free"
    assert found.lines[2].endswith("20 GB, 19 GB free")
    assert found.lines[3] == "xpu:0: Arc, 8 GB"
    assert found.facts["devices"][0]["total_bytes"] == 16_000_000_000


def test_a_card_that_torch_was_not_built_for_is_noted(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert (devices().state, devices().says) == ("ok", "cpu alone")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert devices().state == "note"
    assert "built for CUDA" in devices().advice


def test_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n")
    assert ram(tmp_path) == (1_024_000, 614_400)
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    assert ram(tmp_path) == (1_024_000, 614_400)
    (cgroup / "memory.max").write_text("500000\n")
    (cgroup / "memory.current").write_text("400000\n")
    assert ram(tmp_path) == (500_000, 100_000)


def test_a_system_that_tells_less_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = ram(tmp_path)
    assert total is not None
    assert free is None
    monkeypatch.delattr("os.sysconf")
    assert ram(tmp_path) == (None, None)
    monkeypatch.setattr(doctor, "ram", lambda: (None, None))
    assert doctor.memory().says == "this system does not tell"


def test_too_little_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ram", lambda: (4_000_000_000, 900_000_000))
    assert doctor.memory().state == "note"
    assert doctor.memory().says == "4 GB, 900 MB of it free"
    monkeypatch.setattr(doctor, "ram", lambda: (4_000_000_000, 3_000_000_000))
    assert doctor.memory().state == "ok"


# --- the cache, the token, the hub


def test_the_cache_tells_what_is_whole(hub: Hub) -> None:
    from tests.apps.test_download import STAGE_ONE, STAGE_THREE, STAGE_TWO, repository

    from floyd.apps.download import plans
    from floyd.store.download import fetch

    hub.repositories["DeepFloyd/IF-I-XL-v1.0"] = STAGE_ONE
    hub.repositories["DeepFloyd/IF-II-L-v1.0"] = STAGE_TWO
    hub.repositories["stabilityai/stable-diffusion-x4-upscaler"] = STAGE_THREE
    hub.repositories["org/other"] = repository("StableDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"])
    assert "no models of IF" in doctor.cache().says
    made = plans(["if-xl", "org/other"], variant="fp16")
    for plan in made:
        fetch(plan)
    found = doctor.cache()
    assert "3 models of IF" in found.says
    assert [line.rpartition(" (")[0] for line in found.lines] == [
        "DeepFloyd/IF-I-XL-v1.0: fp16 whole",
        "DeepFloyd/IF-II-L-v1.0: fp16 without text_encoder, safety_checker",
        "stabilityai/stable-diffusion-x4-upscaler: fp16 whole",
    ]
    assert found.facts["bytes"] == sum(plan.total for plan in made)
    (made[0].blobs / "abc.incomplete").write_bytes(bytes(2000))
    assert doctor.cache().advice.startswith("2 kB are of unfinished downloads")


def test_a_small_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("floyd.store.download.free_bytes", lambda folder: 5_000_000_000)
    assert doctor.disk().says.startswith("5 GB free in ")
    assert "if-xl in fp16 take 25 GB" in doctor.disk().advice
    monkeypatch.setattr("floyd.store.download.free_bytes", lambda folder: 50_000_000_000)
    assert doctor.disk().state == "ok"


def test_the_token_is_told_of_and_not_told(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    assert doctor.token().state == "note"
    assert "accept the licence of DeepFloyd/IF-I-XL-v1.0, then run `hf auth login`" in doctor.token().advice
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert doctor.token().says == "present"
    assert "hf_secret" not in json.dumps(doctor.token().to_json())


def test_settings_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.WORDS:
        monkeypatch.delenv(name, raising=False)
    assert doctor.settings().says == "none of the environment's"
    monkeypatch.setenv("HF_ENDPOINT", "https://user:password@example.org")
    assert doctor.settings().says == "HF_ENDPOINT set"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.settings().advice == "HF_HUB_OFFLINE forbids downloads: unset it to allow them."


def test_the_hub_is_asked_which_models_it_opens(hub: Hub) -> None:
    hub.repositories["stabilityai/stable-diffusion-x4-upscaler"] = {"model_index.json": b"{}"}
    found = doctor.hub()
    assert found.says == "opens 1 of 6 models of IF"
    assert found.state == "note"
    assert "closed: DeepFloyd/IF-I-M-v1.0" in found.lines
    assert "DeepFloyd/IF-I-M-v1.0 was not found" in found.advice
    hub.failure = (403, "GatedRepo")
    assert "accept the licence there" in doctor.hub().advice
    hub.failure = None
    for model in found.facts["closed"]:
        hub.repositories[model] = {"model_index.json": b"{}"}
    assert (doctor.hub().state, doctor.hub().says) == ("ok", "opens 6 of 6 models of IF")


def test_the_hub_is_asked_only_if_so_said(brush: list[Any], hub: Hub) -> None:
    assert [finding.name for finding in examine() if finding.name == "hub"] == []
    assert hub.tokens == []
    assert [finding.name for finding in examine(online=True) if finding.name == "hub"] == ["hub"]
