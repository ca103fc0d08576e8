"""T5's encoder beside that of transformers: the same weights, the same states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config
from transformers import T5EncoderModel as Theirs

from floyd.errors import CheckpointError, ConfigError
from floyd.models.t5 import FEED_FORWARDS, T5EncoderModel, bucket
from floyd.store import weights

TOKENS = 77


def pair(seed: int = 0, **keywords: Any) -> tuple[Theirs, T5EncoderModel]:
    """Every parameter random; heads that are together wider than the network."""
    keys: dict[str, Any] = {
        "vocab_size": 60, "d_model": 40, "d_kv": 12, "d_ff": 72, "num_layers": 3, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 50, "layer_norm_epsilon": 1e-5,
        **keywords,
    }  # fmt: skip
    theirs = Theirs(T5Config(**keys)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    ours = T5EncoderModel.from_config(theirs.config.to_dict()).eval()
    state = {key: tensor for key, tensor in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    ours.load_state_dict(state)
    return theirs, ours


def asked(seed: int = 1, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and masks of texts of different length."""
    ids = torch.randint(60, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([TOKENS, 9, 1][:batch])
    return ids, (torch.arange(TOKENS) < lengths[:, None]).long()


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("kind", FEED_FORWARDS)
@torch.no_grad()
def test_its_states_are_those_of_transformers_to_the_last_bit(kind: str, is_masked: bool) -> None:
    theirs, ours = pair(feed_forward_proj=kind)
    ids, mask = asked()
    options = {"attention_mask": mask} if is_masked else {}
    states = ours(ids, **options)
    assert torch.equal(states.last_hidden_state, theirs(ids, **options).last_hidden_state)
    assert torch.equal(states[0], states.last_hidden_state)
    (plain,) = ours(ids, return_dict=False, **options)
    assert torch.equal(plain, states[0])


@torch.no_grad()
def test_embeddings_may_be_passed_in_place_of_ids() -> None:
    theirs, ours = pair()
    ids, mask = asked()
    embeds = ours.get_input_embeddings()(ids)
    assert torch.equal(ours(inputs_embeds=embeds, attention_mask=mask)[0], ours(ids, mask)[0])
    assert torch.equal(
        ours(inputs_embeds=embeds + 1, attention_mask=mask)[0],
        theirs(inputs_embeds=embeds + 1, attention_mask=mask)[0],
    )
    for nothing_or_both in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            ours(**nothing_or_both)


@torch.no_grad()
def test_what_is_masked_is_not_read() -> None:
    _, ours = pair()
    ids, mask = asked()
    others = torch.where(mask.bool(), ids, (ids + 7) % 60)
    assert torch.equal(ours(others, mask)[0][mask.bool()], ours(ids, mask)[0][mask.bool()])
    assert not torch.equal(ours(others)[0], ours(ids)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    _, ours = pair()
    exact = ours(*asked())[0]
    ours.save_pretrained(tmp_path)
    half, their_half = (kind.from_pretrained(tmp_path, dtype=dtype) for kind in (T5EncoderModel, Theirs))
    assert {name: p.dtype for name, p in half.named_parameters()} == {
        name: p.dtype for name, p in their_half.named_parameters()
    }
    states, their_states = half(*asked())[0], their_half(*asked())[0]
    assert states.dtype == their_states.dtype == dtype
    assert (states - exact).norm() <= 1.05 * (their_states - exact).norm() + 1e-3


@torch.no_grad()
def test_numbers_too_large_for_float16_do_not_become_none() -> None:
    _, ours = pair()
    ours.half()
    ours.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(5e4)
    assert not ours.encoder.block[0].layer[1](torch.randn(1, 5, 40).half()).isfinite().all(), "nothing overflows here"
    assert not ours(*asked())[0].isnan().any()


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (32, 64)])
def test_each_distance_is_in_the_bucket_of_transformers(buckets: int, furthest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(offsets, num_buckets=buckets, max_distance=furthest)
    assert torch.equal(bucket(offsets, num_buckets=buckets, max_distance=furthest), expected)


def test_gradients_are_those_of_transformers() -> None:
    theirs, ours = pair()
    ids, mask = asked()
    embeds = ours.shared(ids).detach()
    found = []
    for model in (theirs, ours):
        x = embeds.clone().requires_grad_()
        model(inputs_embeds=x, attention_mask=mask)[0].square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])
    names = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name != "shared.weight":
            torch.testing.assert_close(parameter.grad, names[name])


def test_dropout_is_where_transformers_has_it() -> None:
    theirs, ours = pair(dropout_rate=0.3)
    theirs.train(), ours.train()
    states = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        states.append(model(*asked())[0])
    torch.testing.assert_close(states[1], states[0])
    assert not torch.equal(ours.eval()(*asked())[0], states[1])


@torch.no_grad()
def test_transformers_reads_what_it_saves_and_it_what_transformers_saves(tmp_path: Path) -> None:
    theirs, ours = pair()
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    again, report = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(*asked())[0], ours(*asked())[0])
    told = {key: getattr(again.config, key) for key in ("architectures", "model_type", "dtype", "d_kv")}
    assert told == {"architectures": ["T5EncoderModel"], "model_type": "t5", "dtype": torch.float32, "d_kv": 12}
    theirs.save_pretrained(tmp_path / "theirs")
    mine = T5EncoderModel.from_pretrained(tmp_path / "theirs")
    assert torch.equal(mine(*asked())[0], theirs(*asked())[0])
    assert not mine.training


@torch.no_grad()
def test_rows_for_new_tokens_leave_the_others_as_they_are() -> None:
    _, ours = pair()
    ids, mask = asked()
    before = ours(ids, mask)[0]
    assert ours.resize_token_embeddings(63, mean_resizing=False) is ours.shared
    assert torch.equal(ours(ids, mask)[0], before)
    assert ours.config.vocab_size == ours.shared.num_embeddings == len(ours.shared.weight) == 63
    assert not ours.shared.weight[60:].any()
    assert ours.resize_token_embeddings(64).weight[63].any()
    with pytest.raises(ValueError, match="at least the 64 that there are, got 9"):
        ours.resize_token_embeddings(9)


def test_what_it_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"feed_forward_proj must be one of relu, .*, got 'gated-snake'"):
        T5EncoderModel(feed_forward_proj="gated-snake")
    _, ours = pair()
    ours.save_pretrained(tmp_path)
    state = dict(ours.state_dict())
    packed = {**state, "encoder.block.0.layer.0.SelfAttention.q.SCB": torch.ones(48)}
    weights.write(packed, tmp_path, base="model")
    with pytest.raises(CheckpointError, match=r"is quantized \(.*q\.SCB\): load the plain"):
        T5EncoderModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_it_compiles_as_one_graph() -> None:
    _, ours = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*asked())[0], ours(*asked())[0])
