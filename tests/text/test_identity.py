"""An encoder is told from another by what it computes with, and by nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from floyd.text import identity as module
from floyd.text.identity import identity


def test_a_copy_is_the_same_and_any_change_is_another(t5: T5EncoderModel) -> None:
    first = identity(t5)
    assert first is not None
    assert identity(copy.deepcopy(t5)) == first

    def another(change: Any) -> None:
        other = copy.deepcopy(t5)
        change(other)
        assert identity(other) != first

    another(lambda m: m.shared.weight.data[3, 4].add_(0.01))
    another(lambda m: m.encoder.final_layer_norm.weight.data.mul_(-1))
    another(lambda m: m.to(torch.bfloat16))
    another(lambda m: setattr(m.encoder.final_layer_norm, "variance_epsilon", 1e-5))
    another(lambda m: m.encoder.block[0].add_module("more", nn.Linear(2, 2)))
    another(lambda m: setattr(m.encoder.block[1].layer[0].SelfAttention, "q", nn.Linear(32, 32, bias=False)))


def test_where_it_came_from_and_whether_it_trains_does_not_matter(t5: T5EncoderModel) -> None:
    other = copy.deepcopy(t5).train()
    other.name_or_path = "/elsewhere"
    assert identity(other) == identity(t5)


def test_a_change_in_place_is_seen_and_nothing_is_read_twice(
    t5: T5EncoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    summed = module._sum
    monkeypatch.setattr(module, "_sum", lambda tensor: read.append(1) or summed(tensor))
    model = copy.deepcopy(t5)
    first = identity(model)
    count = len(read)
    assert count > 0
    assert identity(model) == first
    assert len(read) == count
    with torch.no_grad():
        model.encoder.block[0].layer[1].layer_norm.weight[0] += 1
    assert identity(model) != first
    assert len(read) == 2 * count


def test_swapped_weights_are_another_encoder() -> None:
    one, other = nn.Linear(9, 9), nn.Linear(9, 9)
    other.weight.data, other.bias.data = one.weight.data[torch.arange(9).flip(0)], one.bias.data
    assert identity(one) != identity(other)


def test_what_cannot_be_read_has_none() -> None:
    assert identity(None) is None
    assert identity(nn.Linear(2, 2, device="meta")) is None
    assert identity(nn.Identity()) is None

    class Told:
        fingerprint = "files:abc"

    assert identity(Told()) == "files:abc"
