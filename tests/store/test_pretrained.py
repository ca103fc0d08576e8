from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.store.conftest import Hub, Toy, ToyConfig, files_in, fill_cache, same
from torch import Tensor

from floyd.errors import CheckpointError, DownloadError
from floyd.store import weights
from floyd.store.pretrained import Configured, as_dtype, parameters_on_meta

FILE = "diffusion_pytorch_model.safetensors"


class Plan(Configured):
    config_class = ToyConfig
    config_name = "scheduler_config.json"


# ---------------------------------------------------------------------------------------------------- configurations


def test_a_component_without_weights_goes_to_disk_and_back(tmp_path: Path) -> None:
    Plan.from_config({"width": 6, "clip_sample_range": 1.0, "_diffusers_version": "0.15.0.dev0"}).save_pretrained(
        tmp_path
    )
    content = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert content["_class_name"] == "Plan"
    assert content["_diffusers_version"] == "0.15.0.dev0"
    assert content["clip_sample_range"] == 1.0
    assert content["depths"] == [1, 2]
    assert "_floyd_version" in content
    again = Plan.from_pretrained(tmp_path, depths=(7,))
    assert again.config.width == 6
    assert again.config.depths == (7,)
    assert Plan.load_config(tmp_path) == content


@pytest.mark.parametrize("cls", [Plan, Toy])
def test_a_misspelt_override_is_an_error(tmp_path: Path, cls: type[Configured]) -> None:
    with pytest.raises(TypeError, match="does not take widht; it takes width, depths"):
        cls.from_pretrained(tmp_path, widht=3)


def test_the_class_name_in_a_file_is_not_held_against_it(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "OlderNameOfToy"}))
    assert same(Toy.from_pretrained(tmp_path), toy)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json does not exist"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no folder 'scheduler'"):
        Plan.from_pretrained(tmp_path, subfolder="scheduler")
    (tmp_path / "model_index.json").write_text('{"_class_name": "IFPipeline", "unet": ["diffusers", "UNet"]}')
    with pytest.raises(CheckpointError, match="holds a whole pipeline; name one component with subfolder=: unet"):
        Toy.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": 70}])
def test_a_network_goes_to_disk_and_back(tmp_path: Path, toy: Toy, options: dict[str, Any]) -> None:
    toy.save_pretrained(tmp_path / "toy", **options)
    again = Toy.from_pretrained(tmp_path, subfolder="toy", variant=options.get("variant"))
    assert same(again, toy)
    assert again.config.width == 5
    assert not again.training
    assert again.layer.weight.requires_grad


def test_the_dtype_is_float32_unless_one_is_given(tmp_path: Path, toy: Toy) -> None:
    toy.half().save_pretrained(tmp_path)
    assert weights.read(tmp_path)["scale"].dtype == torch.float16
    for given, dtype in [(None, torch.float32), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)]:
        assert Toy.from_pretrained(tmp_path, torch_dtype=given).dtype == dtype
        assert Toy.from_pretrained(tmp_path, dtype=given).dtype == dtype
    with pytest.raises(ValueError, match="say the same thing; got 'fp16' and 'fp32'"):
        Toy.from_pretrained(tmp_path, torch_dtype="fp16", dtype="fp32")


@pytest.mark.parametrize("bad", ["int8", "auto", torch.int8, 16, "fp8"])
def test_a_dtype_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="torch_dtype must be a floating"):
        as_dtype(bad)


def test_names_of_dtypes() -> None:
    assert as_dtype("torch.float16") == as_dtype("half") == torch.float16
    assert as_dtype(None) == torch.float32


def test_a_buffer_of_bytes_becomes_what_the_module_declares(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    state = {**toy.state_dict(), "mark": torch.tensor([[255, 0], [1, 254]], dtype=torch.uint8)}
    weights.write(state, tmp_path)
    for dtype in (torch.float32, torch.float16):
        mark = Toy.from_pretrained(tmp_path, torch_dtype=dtype).mark
        assert mark.dtype == torch.float32
        assert mark.tolist() == [[255, 0], [1, 254]]


def test_integer_weights_are_refused_as_quantized(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    weights.write({**toy.state_dict(), "layer.weight": torch.ones(3, 5, dtype=torch.int8)}, tmp_path, variant="8bit")
    with pytest.raises(CheckpointError, match=r"is quantized: layer\.weight is stored as torch\.int8"):
        Toy.from_pretrained(tmp_path, variant="8bit")


def test_buffers_that_are_not_stored_are_computed_and_nothing_is_left_on_meta(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    assert "ramp" not in weights.read(tmp_path)
    again = Toy.from_pretrained(tmp_path)
    assert again.ramp.tolist() == [0, 1, 2, 3]
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])


def test_an_older_file_may_hold_what_is_now_computed(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    weights.write({**toy.state_dict(), "ramp": torch.zeros(4)}, tmp_path)
    assert Toy.from_pretrained(tmp_path).ramp.tolist() == [0, 1, 2, 3]


def test_weights_that_do_not_fit_are_named_a_few_of_each(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    state = {**toy.state_dict(), **{f"extra.{i}": torch.ones(1) for i in range(5)}, "scale": torch.ones(9)}
    del state["layer.bias"]
    weights.write(state, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Toy.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "does not fit Toy; missing: layer.bias;" in message
    assert "unexpected: extra.0, extra.1, extra.2 and 2 more;" in message
    assert "wrong shape: scale is (9,), expected (5,)" in message


def test_weights_of_a_missing_variant_list_what_there_is(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="no weights of the variant 'bf16', only fp16"):
        Toy.from_pretrained(tmp_path, variant="bf16")


class OldToy(Toy):
    @classmethod
    def rename_keys(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("dense.", "layer."): tensor for key, tensor in state_dict.items()}


def test_old_keys_are_renamed_by_the_class(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    weights.write({key.replace("layer.", "dense."): tensor for key, tensor in toy.state_dict().items()}, tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: layer\.bias, layer\.weight; unexpected: dense"):
        Toy.from_pretrained(tmp_path)
    assert same(OldToy.from_pretrained(tmp_path), toy)


def test_loading_draws_no_random_numbers(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    Toy.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_built_meanwhile_in_another_thread_are_whole() -> None:
    built: list[Toy] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(Toy()))
        thread.start()
        thread.join()
        assert Toy().device.type == "meta"
    assert built[0].device.type == "cpu"
    assert Toy().device.type == "cpu"


def test_a_loaded_network_may_be_saved_over_its_own_files(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    loaded = Toy.from_pretrained(tmp_path)  # its weights are a map of the file
    with torch.no_grad():
        loaded.scale.mul_(2)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(Toy.from_pretrained(tmp_path).scale, 2 * toy.scale)
    assert torch.equal(loaded.layer.weight, toy.layer.weight)


def test_training_a_loaded_network_does_not_touch_the_file(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path)
    loaded = Toy.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.scale.zero_()
    assert same(Toy.from_pretrained(tmp_path), toy)


# ----------------------------------------------------------------------------------------------------------- the hub


def test_a_network_is_loaded_from_the_cache_without_a_network(tmp_path: Path, toy: Toy) -> None:
    toy.save_pretrained(tmp_path / "repo" / "unet", variant="fp16")
    fill_cache(tmp_path / "cache", "org/name", files_in(tmp_path / "repo"))
    again = Toy.from_pretrained(
        "org/name", subfolder="unet", variant="fp16", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert same(again, toy)
    with pytest.raises(DownloadError, match="no complete weights there, and floyd is offline"):
        Toy.from_pretrained("org/name", subfolder="unet", cache_dir=tmp_path / "cache")


def test_a_network_is_fetched_from_the_hub(tmp_path: Path, toy: Toy, hub: Hub) -> None:
    toy.save_pretrained(tmp_path / "repo" / "unet")
    toy.save_pretrained(tmp_path / "repo" / "unet", variant="fp16")
    hub.repositories["org/name"] = files_in(tmp_path / "repo")
    assert same(Toy.from_pretrained("org/name", subfolder="unet"), toy)
    assert sorted(hub.fetched) == ["unet/config.json", f"unet/{FILE}"]
    hub.fetched.clear()
    assert Toy.load_config("org/name", subfolder="unet", force_download=True)["width"] == 5
    assert hub.fetched == ["unet/config.json"]


# ------------------------------------------------------------------------------------------------------ the incumbent


def _tiny_unet(cls: Any) -> Any:
    torch.manual_seed(0)
    return cls(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )


@pytest.mark.parametrize("options", [{}, {"variant": "fp16", "max_shard_size": "200KB"}])
def test_the_incumbent_reads_what_is_saved_and_the_reverse(tmp_path: Path, options: dict[str, Any]) -> None:
    incumbent = pytest.importorskip("diffusers").UNet2DConditionModel
    from floyd.models.unet import UNet2DConditionModel

    variant = options.get("variant")
    theirs = _tiny_unet(incumbent)
    theirs.save_pretrained(tmp_path / "theirs", **options)
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "theirs", variant=variant)
    assert same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours", **options)
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}
    again = incumbent.from_pretrained(tmp_path / "ours", variant=variant)
    assert same(again, theirs)
    assert _kept(again.config) == _kept(theirs.config)


def _kept(config: Mapping[str, Any]) -> Any:
    ignored = {"_name_or_path", "_floyd_version", "_use_default_values"}
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in ignored}))


def test_the_incumbent_reads_a_network_made_here(tmp_path: Path) -> None:
    incumbent = pytest.importorskip("diffusers").UNet2DConditionModel
    from floyd.models.unet import UNet2DConditionModel

    ours = _tiny_unet(UNet2DConditionModel)
    ours.save_pretrained(tmp_path)
    assert same(incumbent.from_pretrained(tmp_path), ours)
