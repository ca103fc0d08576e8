from __future__ import annotations

import contextlib
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from floyd.errors import CheckpointError
from floyd.store import weights

STATE = {f"layer.{i}.weight": torch.full((4, 4), float(i)) for i in range(5)}  # 64 bytes each


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", 130])
def test_what_is_written_is_read(tmp_path: Path, is_safe: bool, variant: str | None, size: int | str) -> None:
    weights.write(STATE, tmp_path, base="model", safe_serialization=is_safe, variant=variant, max_shard_size=size)
    assert equal(weights.read(tmp_path, variant=variant), STATE)


def test_shards_are_named_listed_and_limited(tmp_path: Path) -> None:
    weights.write(STATE, tmp_path, variant="fp16", max_shard_size=130)
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    shards = [f"diffusion_pytorch_model.fp16-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(tmp_path) == sorted([*shards, index])
    content = json.loads((tmp_path / index).read_text())
    assert content["metadata"] == {"total_size": 5 * 64}
    assert content["weight_map"]["layer.4.weight"] == shards[2]
    assert [len(weights.read_file(tmp_path / shard)) for shard in shards] == [2, 2, 1]


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    weights.write({"a": torch.ones(2), "b": torch.ones(999), "c": torch.ones(2)}, tmp_path, max_shard_size=100)
    assert len(names(tmp_path)) == 4
    assert weights.read(tmp_path)["b"].numel() == 999


@pytest.mark.parametrize(("size", "num_bytes"), [("10GB", 10**10), ("1.5KiB", 1536), (7, 7), ("200 mb", 2 * 10**8)])
def test_sizes_are_read_as_people_write_them(size: int | str, num_bytes: int) -> None:
    assert weights._num_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["", "10 apples", 0, -1, "GB"])
def test_other_sizes_are_refused(size: int | str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be"):
        weights.write(STATE, tmp_path, max_shard_size=size)
    assert names(tmp_path) == []


def test_the_header_says_pt_and_carries_metadata(tmp_path: Path) -> None:
    weights.write_file(STATE, tmp_path / "lora.safetensors", metadata={"rank": "4"})
    assert weights.read_metadata(tmp_path / "lora.safetensors") == {"format": "pt", "rank": "4"}
    weights.write(STATE, tmp_path)
    assert weights.read_metadata(tmp_path / "diffusion_pytorch_model.safetensors") == {"format": "pt"}


def test_what_an_adapter_wraps_is_written_under_its_own_name() -> None:
    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.lora_A = layer, nn.Linear(2, 1)

    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    before = plain.state_dict()
    assert not weights.has_adapters(plain)
    plain.set_submodule("1.0", Wrapped(plain[1][0]))
    assert weights.has_adapters(plain)
    state = weights.without_adapters(plain)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    weights.write(STATE, tmp_path, variant="fp16")
    weights.write(STATE, tmp_path, max_shard_size=64)
    weights.write({"a": torch.ones(1)}, tmp_path)
    assert names(tmp_path) == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    assert weights.read(tmp_path).keys() == {"a"}
    weights.write(STATE, tmp_path, max_shard_size=130)
    assert equal(weights.read(tmp_path), STATE)


def test_a_write_that_fails_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write(STATE, tmp_path)

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.write({"a": torch.ones(1)}, tmp_path)
    assert names(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    assert equal(weights.read(tmp_path), STATE)


def test_weights_on_the_meta_device_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not there: a on the meta device"):
        weights.write({"a": torch.ones(1, device="meta")}, tmp_path)


@pytest.mark.parametrize(
    "index", ["model.safetensors.fp16.index.json", "model.safetensors.index.fp16.json", None], ids=["old", "new", "no"]
)
def test_the_older_order_of_names_is_read_with_and_without_an_index(tmp_path: Path, index: str | None) -> None:
    keys = list(STATE)
    parts = {
        "model-00001-of-00002.fp16.safetensors": keys[:2],
        "model-00002-of-00002.fp16.safetensors": keys[2:],
    }
    for name, own in parts.items():
        weights.write_file({key: STATE[key] for key in own}, tmp_path / name)
    if index:
        weight_map = {key: name for name, own in parts.items() for key in own}
        (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    assert equal(weights.read(tmp_path, variant="fp16"), STATE)


def test_pickles_are_the_fall_back_and_can_be_forced_or_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert weights.read(tmp_path).keys() == {"a"}
    with pytest.raises(CheckpointError, match=r"as \.bin, not as \.safetensors: leave use_safetensors=True out"):
        weights.read(tmp_path, use_safetensors=True)
    weights.write({"b": torch.zeros(1)}, tmp_path, base="model")
    assert weights.read(tmp_path).keys() == {"b"}
    assert weights.read(tmp_path, use_safetensors=False).keys() == {"a"}


@pytest.mark.parametrize("is_legacy", [False, True])
def test_pickles_of_either_age_are_read(tmp_path: Path, is_legacy: bool) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not is_legacy)
    assert equal(weights.read(tmp_path), STATE)


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(Canary.path), "w")

    path: Path


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    Canary.path = tmp_path / "the code ran"
    file = tmp_path / "pytorch_model.bin"
    if how == "torch":
        torch.save({"a": torch.zeros(1), "b": Canary()}, file)
    else:
        file.write_bytes(pickle.dumps({"b": Canary()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin was refused.*Use a \.safetensors file"):
        weights.read(tmp_path)
    assert not Canary.path.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "weights": STATE}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold a dict of tensors"):
        weights.read(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"\xff" * 64])
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        weights.read(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_damage_anywhere_is_noticed_or_harmless_but_never_another_error(tmp_path: Path, name: str) -> None:
    file, chance = tmp_path / name, random.Random(1)
    if name == "legacy.bin":
        torch.save(STATE, file, _use_new_zipfile_serialization=False)
    else:
        weights.write_file(STATE, file)
    whole, noticed = file.read_bytes(), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] = chance.randrange(256)
        file.write_bytes(damaged[: chance.choice([None, chance.randrange(len(whole))])])
        with contextlib.suppress(CheckpointError):  # anything else fails the test
            weights.read_file(file)
            noticed -= 1
        noticed += 1
    assert noticed > 40


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    weights.write(STATE, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        weights.read(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n")
    with pytest.raises(CheckpointError, match="run `git lfs pull`"):
        weights.read(tmp_path)


def test_an_index_must_stay_in_its_folder_and_tell_the_truth(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    weights.write_file(STATE, tmp_path / "secret.safetensors")
    index = tmp_path / "inside" / "model.safetensors.index.json"
    weights.write_file(STATE, tmp_path / "inside" / "model-00001-of-00001.safetensors")
    for weight_map, complaint in [
        ({"a": "../secret.safetensors"}, "points outside its folder"),
        ({"a": "model-00002-of-00002.safetensors"}, "lacks model-00002-of-00002.safetensors"),
        (["a"], "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=complaint):
            weights.read(tmp_path / "inside")


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    weights.write_file(STATE, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="lacks 2 of the shards"):
        weights.read(tmp_path)


def test_a_key_in_two_shards_is_an_error(tmp_path: Path) -> None:
    for number in (1, 2):
        weights.write_file(STATE, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"repeats layer\.0\.weight, .* and 2 more"):
        weights.read(tmp_path)


def test_absent_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights: expected diffusion_pytorch_model"):
        weights.read(tmp_path)
    weights.write(STATE, tmp_path, variant="fp16")
    with pytest.raises(CheckpointError, match="only as the variants fp16"):
        weights.read(tmp_path)
    with pytest.raises(ValueError, match="no weights of the variant 'bf16', only fp16"):
        weights.read(tmp_path, variant="bf16")
    assert weights.available(tmp_path, variant="bf16", use_safetensors=None) is None
    assert weights.available(tmp_path, variant="fp16", use_safetensors=None) == "fp16"


def test_files_of_other_kinds_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"from \.safetensors or \.bin files, got .*weights\.npz"):
        weights.read_file(tmp_path / "weights.npz")
    with pytest.raises(CheckpointError, match="does not exist"):
        weights.read_file(tmp_path / "absent.safetensors")
