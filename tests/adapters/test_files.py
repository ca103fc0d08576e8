from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import lora_files
from tests.adapters.conftest import answer, reading
from tests.adapters.lora_files import made_up, merged
from tests.hub_stub import Hub, serving
from torch import Tensor

from floyd import IFPipeline
from floyd.adapters import files
from floyd.adapters.factors import Factors
from floyd.errors import CheckpointError
from floyd.store import weights

STATE = {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(4, 2)}


def write(path: Path, state: dict[str, Tensor] = STATE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.write_file(state, path, **options)
    return path


def opened(given: Any, **options: Any) -> str:
    """The file that is read."""
    file = files.opened(given, **options)
    assert {key: tensor.tolist() for key, tensor in file.state.items()} == {k: t.tolist() for k, t in STATE.items()}
    return file.name


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_file_a_folder_and_a_state_dict_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "pytorch_lora_weights.safetensors")
    assert opened(path) == opened(tmp_path) == opened(str(tmp_path)) == str(path)
    assert opened(STATE) == "the state dict"


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        (("any.safetensors",), {}, "any.safetensors"),
        (("any.bin",), {}, "any.bin"),
        (("any.bin", "other.safetensors"), {}, "other.safetensors"),
        (("any.safetensors", files.SAFE_NAME), {}, files.SAFE_NAME),
        (("adapter_model.safetensors", "x.safetensors"), {}, "adapter_model.safetensors"),
        ((files.PICKLED_NAME, files.SAFE_NAME), {}, files.SAFE_NAME),
        ((files.PICKLED_NAME, files.SAFE_NAME), {"use_safetensors": False}, files.PICKLED_NAME),
        (("a.safetensors", "b.safetensors"), {"weight_name": "b.safetensors"}, "b.safetensors"),
        (("in/a.safetensors", "b.safetensors"), {"subfolder": "in"}, "in/a.safetensors"),
        (("in/a.safetensors", "b.safetensors"), {"weight_name": "in/a.safetensors"}, "in/a.safetensors"),
    ],
)
def test_which_file_of_a_folder_is_meant(tmp_path: Path, names: Any, options: Any, chosen: str) -> None:
    for name in names:
        write(tmp_path / name)
    assert opened(tmp_path, **options) == str(tmp_path / chosen)


@pytest.mark.parametrize(
    ("names", "options", "kind", "complaint"),
    [
        (("a.safetensors", "b.safetensors"), {}, ValueError, "several files that may be meant: a.safetensors, b"),
        (("a.txt",), {}, CheckpointError, "has no LoRA file: expected pytorch_lora_weights.safetensors"),
        (("a.bin",), {"use_safetensors": True}, CheckpointError, "has no LoRA file"),
        (("a.bin",), {"weight_name": "b.bin"}, CheckpointError, "has no file 'b.bin'"),
        (("a.bin",), {"weight_name": "../a.bin"}, ValueError, "weight_name must be a name inside"),
        (("a.bin",), {"subfolder": "/etc"}, ValueError, "subfolder must be a name inside"),
        (("a.bin",), {"subfolder": "in"}, CheckpointError, "/in has no LoRA file"),
    ],
)
def test_what_cannot_be_meant_is_said(
    tmp_path: Path, names: Any, options: Any, kind: type[Exception], complaint: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(kind, match=complaint):
        files.opened(tmp_path, **options)


def test_a_file_takes_no_further_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="weight_name and subfolder are for folders"):
        files.opened(path, weight_name="a.safetensors")
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        files.opened(tmp_path / "no such file.safetensors")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def test_a_repository_of_the_hub_gives_the_one_file(hub: Hub, tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors")
    hub.repositories["org/lora"] = {"sub/any.safetensors": path.read_bytes(), "README.md": b"read me"}
    name = opened("org/lora", subfolder="sub")
    assert name.endswith("sub/any.safetensors")
    assert hub.fetched == ["sub/any.safetensors"]
    assert opened("org/lora", subfolder="sub", local_files_only=True) == name
    assert hub.fetched == ["sub/any.safetensors"]


def test_what_peft_and_the_incumbent_tell_beside_is_heeded(tmp_path: Path) -> None:
    told = {"unet.lora_alpha": 4, "unet.r": 2, "text_encoder.lora_alpha": 1, "lora_alpha": 3}
    path = write(tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    file = files.opened(path)
    assert (file.alpha("unet", "x", 2), file.alpha("text_encoder", "x", 2)) == (4.0, 1.0)
    write(tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "peft_type": "LORA"}))
    assert files.opened(tmp_path / "peft").alpha("unet", "x", 2) == 8.0
    assert files.opened(tmp_path / "peft" / "adapter_model.safetensors").alpha("unet", "x", 2) == 8.0


@pytest.mark.parametrize(("told", "complaint"), [("{", "is not JSON"), ("[]", "must be an object, got list")])
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, told: str, complaint: str) -> None:
    path = write(tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": told})
    with pytest.raises(CheckpointError, match=complaint):
        files.opened(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not a safetensors file"):
        files.opened(tmp_path)


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("safe", [True, False])
def test_what_was_loaded_is_saved_and_loaded_again(pipe: IFPipeline, tmp_path: Path, safe: bool) -> None:
    unet, t5 = made_up(pipe.unet, ranks=(2, 4), alpha=3.0), made_up(pipe.text_encoder, ("q", "wo"))
    wanted = answer(merged(pipe.unet, (unet, 1.0))), reading(merged(pipe.text_encoder, (t5, 1.0)))
    pipe.load_lora_weights(lora_files.kohya(unet) | lora_files.mid_2023(t5, "text_encoder"), "mine")
    pipe.set_adapters("mine", 0.3)  # how it is weighed here is not part of it
    pipe.save_lora_weights(tmp_path, **pipe.lora_layers(), safe_serialization=safe)
    assert [path.name for path in tmp_path.iterdir()] == [files.SAFE_NAME if safe else files.PICKLED_NAME]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(answer(pipe.unet), wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(reading(pipe.text_encoder), wanted[1], atol=1e-5, rtol=0)


def test_metadata_is_written_beside_and_read_again(pipe: IFPipeline, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=8, target_modules={"to_q", "to_k"}).to_dict()
    layers = made_up(pipe.unet)
    bare = {key.removeprefix("unet."): tensor for key, tensor in lora_files.peft(layers).items()}
    pipe.save_lora_weights(tmp_path, bare, unet_lora_adapter_metadata=config)
    state = weights.read_file(tmp_path / files.SAFE_NAME)
    assert all(torch.equal(tensor, bare[key.removeprefix("unet.")]) for key, tensor in state.items())
    wanted = answer(merged(pipe.unet, (layers, 4.0)))
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(answer(pipe.unet), wanted, atol=1e-5, rtol=0)


def test_other_ways_of_saving(tmp_path: Path) -> None:
    bare = {key.removeprefix("unet."): tensor for key, tensor in STATE.items()}
    IFPipeline.save_lora_weights(tmp_path, bare, weight_name="mine.safetensors")
    assert opened(tmp_path / "mine.safetensors")
    kept: dict[str, Any] = {}
    IFPipeline.save_lora_weights(tmp_path, bare, save_function=lambda state, path: kept.update({path: state}))
    assert [state.keys() for state in kept.values()] == [STATE.keys()]
    IFPipeline.save_lora_weights(tmp_path / "no", bare, is_main_process=False)
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    bare = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(ValueError, match="nothing to save"):
        IFPipeline.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="Metadata is written to safetensors files alone"):
        IFPipeline.save_lora_weights(tmp_path, bare, safe_serialization=False, unet_lora_adapter_metadata={"r": 2})
    with pytest.raises(ValueError, match="have an alpha, and so has"):
        files.write(
            {"unet": {"x": Factors(bare["x.lora_A.weight"], bare["x.lora_B.weight"], 1.0)}},
            tmp_path / "a.safetensors",
            {"unet": {"lora_alpha": 3}},
        )
    assert list(tmp_path.iterdir()) == []
