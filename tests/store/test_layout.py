from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.store.conftest import Toy

from floyd.errors import CheckpointError
from floyd.store import layout
from floyd.store.layout import CLASSES, ComponentType, read_index, resolve, type_of, write_index

STAGE_TWO = {
    "_class_name": "IFSuperResolutionPipeline",
    "_diffusers_version": "0.17.0.dev0",
    "_ignore_files": ["pytorch_model.bin"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "requires_safety_checker": True,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "watermarker": ["deepfloyd_if", "IFWatermark"],
}


def written(folder: Path, content: Any) -> Path:
    (folder / "model_index.json").write_text(json.dumps(content))
    return folder


def test_an_index_is_sorted_by_what_it_means(tmp_path: Path) -> None:
    index = read_index(written(tmp_path, STAGE_TWO))
    assert index.class_name == "IFSuperResolutionPipeline"
    assert index.components["safety_checker"] is None
    assert index.components["unet"] == ("diffusers", "UNet2DConditionModel")
    assert len(index.components) == 6
    assert index.values == {"requires_safety_checker": True}
    assert index.foreign == {"_diffusers_version": "0.17.0.dev0", "_ignore_files": ["pytorch_model.bin"]}


def test_plain_values_may_be_numbers_and_lists(tmp_path: Path) -> None:
    values = {"max_noise_level": 350, "sizes": [64, 256], "nothing": None, "names": ["a", "b", "c"]}
    assert read_index(written(tmp_path, {"_class_name": "X", **values})).values == values


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "`_class_name` is None"),
        ({"_class_name": ["a"]}, "`_class_name` is"),
        ({"_class_name": "X", "../../etc": ["diffusers", "AutoencoderKL"]}, "cannot be a folder"),
        ({"_class_name": "X", "unet": ["diffusers", None]}, r"must be \[library, class\] or \[null, null\]"),
    ],
)
def test_a_malformed_index_is_explained(tmp_path: Path, content: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_index(written(tmp_path, content))


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.class_name != "T5TokenizerFast"], ids=str)
def test_every_class_of_the_table_exists(kind: ComponentType) -> None:
    cls = resolve(*kind)
    module = cls.__module__.partition(".")[0]
    assert module == ("transformers" if kind.class_name.startswith("CLIP") else "floyd")
    assert hasattr(cls, "from_pretrained")
    assert layout.has_weights(kind) == issubclass(cls, torch.nn.Module)


def test_the_image_processor_is_the_one_that_needs_no_torchvision() -> None:
    for name in ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorPil"):
        assert resolve("transformers", name).__name__ == "CLIPImageProcessorPil"


@pytest.mark.parametrize(
    ("library", "name"),
    [("diffusers", "PNDMScheduler"), ("stable_diffusion", "StableDiffusionSafetyChecker"), ("os", "system")],
)
def test_an_unknown_class_is_named_and_nothing_is_imported(library: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no stand-in for {name} of '{library}'.*or None to do without"):
        resolve(library, name)


def test_what_the_installed_library_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ComponentType("transformers", "Gone")
    monkeypatch.setitem(CLASSES, kind, layout._Class(("transformers:Gone",)))
    with pytest.raises(CheckpointError, match="The installed transformers has no Gone"):
        resolve(*kind)


def test_live_components_are_described_and_read_again(tmp_path: Path) -> None:
    from floyd import DDPMScheduler
    from floyd.models.watermark import IFWatermarker

    components = {
        "scheduler": DDPMScheduler(),
        "watermarker": IFWatermarker(),
        "feature_extractor": resolve("transformers", "CLIPImageProcessor")(),
        "unet": None,
    }
    foreign = {"_ignore_files": ["pytorch_model.bin"], "_diffusers_version": "0.15.0.dev0"}
    write_index(tmp_path, "IFPipeline", components, values={"requires_safety_checker": False}, foreign=foreign)
    index = read_index(tmp_path)
    assert index.class_name == "IFPipeline"
    assert index.components == {
        "scheduler": ("diffusers", "DDPMScheduler"),
        "watermarker": ("deepfloyd_if", "IFWatermarker"),
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
        "unet": None,
    }
    assert index.values == {"requires_safety_checker": False}
    assert index.foreign == {**foreign, "_floyd_version": layout.floyd_version()}


def test_a_version_of_the_incumbent_is_always_written(tmp_path: Path) -> None:
    write_index(tmp_path, "IFPipeline", {})
    assert read_index(tmp_path).foreign["_diffusers_version"]


def test_subclasses_and_compiled_networks_are_known_by_what_they_are() -> None:
    from floyd.models.watermark import IFWatermarker

    class Mine(IFWatermarker):
        pass

    assert type_of(Mine()).class_name == "IFWatermarker"
    compiled = torch.compile(IFWatermarker(), backend="eager")
    assert type_of(compiled).class_name == "IFWatermarker"


@pytest.mark.parametrize("stranger", [Toy(), object(), torch.nn.Linear(1, 1)], ids=lambda it: type(it).__name__)
def test_a_stranger_cannot_be_described(stranger: object) -> None:
    with pytest.raises(ValueError, match=f"A {type(stranger).__name__} cannot be saved"):
        type_of(stranger)


def test_the_room_imports_no_transformers_and_no_hub_by_itself() -> None:
    script = (
        "import sys, floyd.store.components, floyd.store.hub, floyd.store.layout\n"
        "print([name for name in ('transformers', 'huggingface_hub', 'PIL', 'floyd.models') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
