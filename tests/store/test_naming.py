from __future__ import annotations

import pytest

from floyd.store.naming import choose, index_name, parse, variants, weights_name

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
NEW = [
    "model.fp16-00001-of-00002.safetensors",
    "model.fp16-00002-of-00002.safetensors",
    "model.safetensors.index.fp16.json",
]
LEGACY = [
    "model-00001-of-00002.fp16.safetensors",
    "model-00002-of-00002.fp16.safetensors",
    "model.safetensors.fp16.index.json",
]


@pytest.mark.parametrize(
    ("name", "base", "variant", "suffix", "shard"),
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model", None, "safetensors", (0, 0)),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model", "fp16", "bin", (0, 0)),
        ("model.8bit.safetensors", "model", "8bit", "safetensors", (0, 0)),
        ("model.non_ema.safetensors", "model", "non_ema", "safetensors", (0, 0)),
        ("pytorch_model-00002-of-00003.bin", "pytorch_model", None, "bin", (2, 3)),
        ("model.fp16-00001-of-00002.safetensors", "model", "fp16", "safetensors", (1, 2)),
        ("model-00001-of-00002.fp16.safetensors", "model", "fp16", "safetensors", (1, 2)),
    ],
)
def test_a_name_says_what_it_holds(
    name: str, base: str, variant: str | None, suffix: str, shard: tuple[int, int]
) -> None:
    file = parse(name)
    assert file is not None
    assert (file.base, file.variant, file.suffix, (file.number, file.total)) == (base, variant, suffix, shard)
    assert not file.is_index


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors.index.json", None),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.safetensors.fp16.index.json", "fp16"),
        ("model.fp16.safetensors.index.json", "fp16"),
        ("pytorch_model.bin.index.fp16.json", "fp16"),
    ],
)
def test_an_index_is_known_in_every_order(name: str, variant: str | None) -> None:
    file = parse(name)
    assert file is not None
    assert file.is_index
    assert file.variant == variant


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "optimizer.bin", "model.safetensors.tmp", ".model.safetensors.0a.tmp", "model.onnx",
        "my_model.safetensors", "model.fp16-00001-of-00002.fp16.safetensors", "spiece.model", "../model.safetensors",
        "pytorch_lora_weights.safetensors", "model.fp16.safetensors.index.fp16.json",
    ],
)  # fmt: skip
def test_other_files_are_no_weights(name: str) -> None:
    assert parse(name) is None


@pytest.mark.parametrize("names", [NEW, LEGACY])
def test_both_orders_of_a_variants_name_are_found(names: list[str]) -> None:
    found = choose([*SHARDS, *names, "model.safetensors.bak"], variant="fp16", use_safetensors=None)
    assert found is not None
    assert [*found.files, found.index] == names
    assert choose([*SHARDS, *names], variant=None, use_safetensors=None).files == tuple(SHARDS[:2])  # type: ignore[union-attr]
    assert choose(names, variant=None, use_safetensors=None) is None


def test_safetensors_come_first_unless_pickles_are_asked_for() -> None:
    names = ["model.safetensors", "pytorch_model.bin"]
    for wish, name in {None: names[0], True: names[0], False: names[1]}.items():
        found = choose(names, variant=None, use_safetensors=wish)
        assert found is not None
        assert found.files == (name,)
    assert choose(names[1:], variant=None, use_safetensors=True) is None
    assert choose(names[1:], variant=None, use_safetensors=None).files == ("pytorch_model.bin",)  # type: ignore[union-attr]


def test_a_complete_set_beats_a_torn_one() -> None:
    torn = SHARDS[1:]
    found = choose(torn, variant=None, use_safetensors=None)
    assert found is not None
    assert found.num_missing == 1
    assert choose([*torn, "pytorch_model.bin"], variant=None, use_safetensors=None).files == ("pytorch_model.bin",)  # type: ignore[union-attr]
    assert choose([SHARDS[2]], variant=None, use_safetensors=None).num_missing  # type: ignore[union-attr]


def test_variants_are_listed() -> None:
    assert variants([*SHARDS, *NEW, "model.8bit.safetensors", "config.json"]) == ["8bit", "fp16"]


def test_what_is_written_can_be_parsed() -> None:
    name = weights_name("model", "safetensors", variant="fp16", number=1, total=2)
    assert name == NEW[0]
    assert index_name("model", "safetensors", variant="fp16") == NEW[2]
    with pytest.raises(ValueError, match=r"got '\.\./x'"):
        weights_name("model", "bin", variant="../x")
