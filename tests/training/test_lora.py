from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from floyd.models.unet import UNet2DConditionModel
from floyd.store.weights import read_file
from floyd.training.lora import attach, lora_layers, save, without
from floyd.training.recompute import recompute


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    return tiny.disturbed(UNet2DConditionModel(**tiny.STAGE_ONE))


def inputs() -> tuple[torch.Tensor, int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 32, 32, generator=generator), 500, torch.randn(2, 77, 32, generator=generator)


def test_fresh_lora_changes_nothing_and_is_all_that_is_trained(unet: Any) -> None:
    before = unet(*inputs()).sample
    attach(unet, rank=2, alpha=2.0)
    assert torch.equal(unet(*inputs()).sample, before)
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    kinds = {name.split(".lora_")[0].split("attentions.")[1].split(".", 1)[1] for name in trained}
    assert kinds == {"to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"}


def test_the_network_without_its_lora_is_what_it_was(unet: Any) -> None:
    before = unet(*inputs()).sample
    attach(unet, rank=2, alpha=2.0)
    for _, layer in lora_layers(unet):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    after = unet(*inputs()).sample
    with torch.no_grad(), without(unet) as plain:
        torch.testing.assert_close(plain(*inputs()).sample, before.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(unet(*inputs()).sample, after)
    assert not torch.equal(after, before)
    assert [layer.lora_B["default"].weight.requires_grad for _, layer in lora_layers(unet)].count(False) == 0


def test_a_seed_decides_where_lora_starts_whatever_was_drawn_before(unet: Any) -> None:
    state = torch.random.get_rng_state()
    attach(unet, rank=2, alpha=2.0, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    other = tiny.disturbed(UNet2DConditionModel(**tiny.STAGE_ONE))
    torch.randn(7)
    attach(other, rank=2, alpha=2.0, seed=1)
    left, right = unet.state_dict(), other.state_dict()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_the_file_holds_every_factor_under_pefts_keys(unet: Any, tmp_path: Path) -> None:
    attach(unet, rank=3, alpha=6.0, targets=("to_q", "conv1"))
    state = read_file(save(unet, tmp_path))
    assert state["unet.mid_block.attentions.0.to_q.lora_A.weight"].shape == (3, 64)
    assert state["unet.mid_block.resnets.0.conv1.lora_B.weight"].shape == (64, 3, 1, 1)
    assert len(state) == 2 * sum(hasattr(layer, "lora_A") for layer in unet.modules())


def test_targets_that_are_not_there_and_no_peft_are_said(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="none ends in 'to_z'"):
        attach(unet, rank=2, alpha=2.0, targets=("to_z",))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        attach(unet, rank=0, alpha=2.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs peft.*floyd-if\[lora\]"):
        attach(unet, rank=2, alpha=2.0)


def test_computing_twice_changes_no_gradient_and_saves_memory(unet: Any) -> None:
    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        held = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        unet.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = unet(*inputs()).sample.square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters()}, held

    plain, many = gradients()
    assert recompute(unet) > 4
    again, few = gradients()
    assert [name for name in plain if not torch.allclose(plain[name], again[name], atol=1e-7)] == []
    assert few < many / 2
