"""Files go both ways: the incumbent and peft read what floyd writes, and floyd what they write."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.adapters import lora_files
from tests.adapters.conftest import answer, reading
from tests.adapters.lora_files import made_up, merged
from torch import Tensor

from floyd import IFPipeline
from floyd.adapters import files
from floyd.store import weights

SETTINGS = {"r": 4, "lora_alpha": 4, "target_modules": list(lora_files.ATTENTION), "init_lora_weights": False}


@pytest.fixture
def theirs(networks: dict[str, Any]) -> Any:
    """The incumbent's pipeline over the same weights."""
    import diffusers

    unet = tiny.unet(tiny.STAGE_ONE)
    unet.load_state_dict(networks["one"].state_dict())
    scheduler = tiny.scheduler()
    return diffusers.IFPipeline(None, None, unet, scheduler, None, None, None, requires_safety_checker=False)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def loaded(theirs: Any, source: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations
        theirs.load_lora_weights(source)


@pytest.mark.parametrize("name", lora_files.FORMATS)
@pytest.mark.parametrize("ranks", [(4,), (2, 3, 5)])
def test_the_incumbent_reads_what_floyd_writes(
    pipe: IFPipeline, theirs: Any, name: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    layers = made_up(pipe.unet, ranks=ranks, alpha=1.0 if name == "kohya" else None)
    wanted = answer(merged(pipe.unet, (layers, 1.0)))
    pipe.load_lora_weights(lora_files.FORMATS[name](layers))
    pipe.save_lora_weights(tmp_path, **pipe.lora_layers())
    loaded(theirs, tmp_path)
    close(answer(theirs.unet), wanted)


def test_the_incumbent_heeds_the_metadata_that_floyd_writes(pipe: IFPipeline, theirs: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    layers = made_up(pipe.unet, ranks=(4,))
    bare = {key.removeprefix("unet."): tensor for key, tensor in lora_files.peft(layers).items()}
    config = LoraConfig(**{**SETTINGS, "lora_alpha": 2}).to_dict()
    pipe.save_lora_weights(tmp_path, bare, unet_lora_adapter_metadata=config)
    loaded(theirs, tmp_path)
    close(answer(theirs.unet), answer(merged(pipe.unet, (layers, 0.5))))


def test_peft_reads_what_floyd_writes(pipe: IFPipeline, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = made_up(pipe.unet, ranks=(4,), alpha=1.0)
    wanted = answer(merged(pipe.unet, (layers, 1.0)))
    pipe.load_lora_weights(lora_files.kohya(layers))
    pipe.save_lora_weights(tmp_path, **pipe.lora_layers())
    pipe.unload_lora_weights()
    state = weights.read_file(tmp_path / files.SAFE_NAME)
    inject_adapter_in_model(LoraConfig(**SETTINGS), pipe.unet, "mine")
    bare = {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    report = set_peft_model_state_dict(pipe.unet, bare, "mine")
    assert report.unexpected_keys == []
    close(answer(pipe.unet), wanted)


def _trained(network: Any) -> dict[str, Tensor]:
    """What a training script has in its hands at the end."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(**SETTINGS), network, "default")
    network.peft_config = {"default": LoraConfig(**SETTINGS)}
    return dict(get_peft_model_state_dict(network))


def test_floyd_reads_all_of_what_the_incumbents_scripts_write_today(
    pipe: IFPipeline, theirs: Any, tmp_path: Path
) -> None:
    """Which the incumbent itself reads a third of."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers

    state = convert_state_dict_to_diffusers(_trained(theirs.unet))
    wanted = answer(theirs.unet)
    diffusers.IFPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    endings = {key.rsplit(".", 2)[1] for key in weights.read_file(tmp_path / files.SAFE_NAME)}
    assert endings == {"down", "up", "lora_A", "lora_B"}
    pipe.load_lora_weights(tmp_path)
    close(answer(pipe.unet), wanted)

    from peft.tuners.lora import LoraLayer

    fresh = tiny.unet(tiny.STAGE_ONE)
    theirs.unet = fresh
    loaded(theirs, tmp_path)
    wrapped = [layer for layer in fresh.modules() if isinstance(layer, LoraLayer)]
    assert (len(wrapped), len(attached_to(pipe.unet))) == (8, 24)


def attached_to(network: Any) -> list[str]:
    return [name for name, layer in network.named_modules() if hasattr(layer, "base_layer")]


@pytest.mark.parametrize("wrapped", [False, True])
def test_floyd_reads_what_peft_saves(networks: dict[str, Any], pipe: IFPipeline, tmp_path: Path, wrapped: bool) -> None:
    """A folder with `adapter_config.json`, whose alpha is not in the tensors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    before = reading(pipe.text_encoder)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q", "wo"], init_lora_weights=False, use_rslora=wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations
        model = get_peft_model(networks["t5"], config)
        model.save_pretrained(tmp_path)
    wanted = reading(model)
    pipe.text_encoder = tiny.t5()
    pipe.load_lora_weights(tmp_path)
    assert (wanted - before).abs().max() > 1e-3
    close(reading(pipe.text_encoder), wanted)
