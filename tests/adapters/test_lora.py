"""What the methods of `floyd.pipelines.lora` do to pictures, on all seven pipelines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any

import pytest
import torch
from tests.adapters import lora_files
from tests.adapters.conftest import answer, reading, stage_one
from tests.adapters.lora_files import T5_LAYERS, made_up, merged
from torch import Tensor, nn

from floyd import (
    Cascade,
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from floyd.adapters import attached
from floyd.errors import CheckpointError
from floyd.text.cache import TextCache

Paint = Callable[..., Tensor]


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def differ(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", lora_files.FORMATS)
def test_every_format_amounts_to_the_merged_weights(pipe: IFPipeline, name: str) -> None:
    layers = made_up(pipe.unet, ranks=(1, 2, 5))
    before, wanted = answer(pipe.unet), answer(merged(pipe.unet, (layers, 1.0)))
    pipe.load_lora_weights(lora_files.FORMATS[name](layers))
    differ(wanted, before)
    close(answer(pipe.unet), wanted)


def test_alpha_of_a_kohya_file_counts(pipe: IFPipeline) -> None:
    layers = made_up(pipe.unet, ranks=(2, 4), alpha=1.0)
    wanted = answer(merged(pipe.unet, (layers, 1.0)))
    pipe.load_lora_weights(lora_files.kohya(layers))
    close(answer(pipe.unet), wanted)


def test_any_layer_may_have_lora_and_convolutions_too(pipe: IFPipeline) -> None:
    endings = "conv_in conv1 conv_shortcut time_emb_proj linear_1 encoder_hid_proj k_proj conv_out".split()
    layers = made_up(pipe.unet, endings, ranks=(2, 3))
    assert {len(layer.down.shape) for layer in layers.values()} == {2, 4}
    wanted = answer(merged(pipe.unet, (layers, 1.0)))
    for write in (lora_files.peft, lora_files.kohya):
        pipe.load_lora_weights(write(layers), "both")
        close(answer(pipe.unet), wanted)
        pipe.delete_adapters("both")


@pytest.mark.parametrize("write", [lora_files.peft, lora_files.mid_2023, lora_files.kohya])
def test_t5_has_lora_of_every_format_that_there_is_for_it(pipe: IFPipeline, write: Any, paint: Paint) -> None:
    layers = made_up(pipe.text_encoder, T5_LAYERS, ranks=(2, 3))
    before, wanted = reading(pipe.text_encoder), reading(merged(pipe.text_encoder, (layers, 1.0)))
    pipe.load_lora_weights(write(layers, "text_encoder"))
    differ(wanted, before)
    close(reading(pipe.text_encoder), wanted)
    assert pipe.get_list_adapters() == {"text_encoder": ["default_0"]}


def test_one_file_may_hold_both(pipe: IFPipeline) -> None:
    unet, t5 = made_up(pipe.unet), made_up(pipe.text_encoder, ("q", "v"))
    wanted = answer(merged(pipe.unet, (unet, 1.0))), reading(merged(pipe.text_encoder, (t5, 1.0)))
    pipe.load_lora_weights(lora_files.mixed(unet) | lora_files.kohya(t5, "text_encoder"), "mine")
    close(answer(pipe.unet), wanted[0])
    close(reading(pipe.text_encoder), wanted[1])
    assert pipe.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}


def test_the_picture_is_that_of_the_merged_weights(pipe: IFPipeline, paint: Paint) -> None:
    layers = made_up(pipe.unet)
    before, wanted = paint(pipe), paint(stage_one(merged(pipe.unet, (layers, 1.0))))
    pipe.load_lora_weights(lora_files.mixed(layers))
    differ(wanted, before)
    close(paint(pipe), wanted)


def _calls(kind: type) -> dict[str, Any]:
    picture, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    return {
        IFPipeline: {},
        IFImg2ImgPipeline: {"image": picture},
        IFInpaintingPipeline: {"image": picture, "mask_image": mask},
        IFSuperResolutionPipeline: {"image": picture},
        IFImg2ImgSuperResolutionPipeline: {"image": picture, "original_image": torch.zeros(1, 3, 48, 48)},
        IFInpaintingSuperResolutionPipeline: {
            "image": picture, "original_image": torch.zeros(1, 3, 48, 48), "mask_image": torch.ones(1, 1, 48, 48),
        },
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        IFPipeline,
        IFImg2ImgPipeline,
        IFInpaintingPipeline,
        IFSuperResolutionPipeline,
        IFImg2ImgSuperResolutionPipeline,
        IFInpaintingSuperResolutionPipeline,
    ],
)
def test_all_six_pipelines_of_if_load_it_and_weigh_it_by_the_call(
    kind: Any, pipe: Any, second: Any, paint: Paint
) -> None:
    own = kind.from_pipe(second if "SuperResolution" in kind.__name__ else pipe)
    layers, call = made_up(own.unet), _calls(kind)
    before, half = paint(own, **call), own.unet
    own.unet = merged(half, (layers, 0.5))
    wanted = paint(own, **call)
    own.unet = half
    own.load_lora_weights(lora_files.mixed(layers))
    differ(paint(own, **call), before)
    close(paint(own, **call, cross_attention_kwargs={"scale": 0.5}), wanted)
    close(paint(own, **call, cross_attention_kwargs={"scale": 0}), before, atol=0)
    own.unload_lora_weights()
    close(paint(own, **call), before, atol=0)


def test_stage_three_has_lora_on_its_unet_and_on_clip(third: Any) -> None:
    def paint(**options: Any) -> Tensor:
        picture, seed = torch.zeros(1, 3, 8, 8), torch.Generator().manual_seed(0)
        return third("a cat", picture, 2, generator=seed, output_type="pt", **options).images

    unet = made_up(third.unet, ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"))
    clip = made_up(third.text_encoder, ("q_proj", "out_proj", "fc1"))
    before, networks = paint(), (third.unet, third.text_encoder)
    third.unet, third.text_encoder = merged(networks[0], (unet, 0.5)), merged(networks[1], (clip, 0.5))
    wanted = paint()
    third.unet, third.text_encoder = networks
    older = {f"text_model.{name}": lora for name, lora in clip.items()}  # where CLIP's layers were until lately
    third.load_lora_weights(lora_files.mid_2023(unet) | lora_files.mid_2023(older, "text_encoder"))
    differ(paint(), before)
    close(paint(cross_attention_kwargs={"scale": 0.5}), wanted)
    third.set_adapters("default_0", 0.5)
    close(paint(), wanted)
    third.unload_lora_weights()
    close(paint(), before, atol=0)


def test_half_precision_networks_get_lora_of_theirs(pipe: IFPipeline) -> None:
    pipe.to(torch.bfloat16)
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    factors = [p for name, p in pipe.unet.named_parameters() if "lora_" in name]
    assert {p.dtype for p in factors} == {torch.bfloat16}
    pipe.to(torch.float32)
    assert {p.dtype for p in factors} == {torch.float32}


# ------------------------------------------------------------------------------------------------ nothing, or all of it


def test_a_failing_load_leaves_everything_as_it_was(pipe: IFPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet, seed=1)), "first")
    before, layers = answer(pipe.unet), dict(pipe.unet.named_modules())
    good = lora_files.peft(made_up(pipe.unet)) | lora_files.peft(made_up(pipe.text_encoder, ("q",)), "text_encoder")
    with pytest.raises(CheckpointError, match="nothing of it was: nothing here uses banana"):
        pipe.load_lora_weights(good | {"banana": torch.ones(1)})
    assert dict(pipe.unet.named_modules()) == layers

    fill, count = attached._fill, []

    def failing(*args: Any) -> None:
        count.append(1)
        if len(count) > 25:  # in the second network
            raise MemoryError
        fill(*args)

    monkeypatch.setattr(attached, "_fill", failing)
    with pytest.raises(MemoryError):
        pipe.load_lora_weights(good)
    assert pipe.get_list_adapters() == {"unet": ["first"]}
    assert pipe.get_active_adapters() == ["first"]
    assert not any(hasattr(layer, "base_layer") for layer in pipe.text_encoder.modules())
    assert torch.equal(answer(pipe.unet), before)


def test_a_key_that_nothing_uses_is_named(pipe: IFPipeline) -> None:
    state = lora_files.mixed(made_up(pipe.unet))
    state["unet.mid_block.attentions.7.to_q.lora.down.weight"] = torch.ones(2, 64)
    with pytest.raises(CheckpointError, match=r"nothing here uses unet\.mid_block\.attentions\.7\.to_q\.lora\.down"):
        pipe.load_lora_weights(state)
    assert pipe.get_list_adapters() == {}


def test_networks_are_left_as_trainable_and_chance_as_it_was(pipe: IFPipeline) -> None:
    pipe.unet.conv_in.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    seed = torch.get_rng_state()
    layers = dict(pipe.unet.named_modules())
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    pipe.disable_lora()
    pipe.enable_lora()
    assert not any(p.requires_grad for name, p in pipe.unet.named_parameters() if "lora_" in name)
    pipe.unload_lora_weights()
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(layer is layers[name] for name, layer in pipe.unet.named_modules())
    assert not hasattr(pipe.unet, "peft_config")


def test_what_is_for_a_missing_network_is_left_out_with_a_word(
    pipe: IFPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    t5 = lora_files.kohya(made_up(pipe.text_encoder, ("q",)), "text_encoder")
    own = stage_one(pipe.unet)
    own.load_lora_weights(lora_files.peft(made_up(pipe.unet)) | t5)
    assert "also holds LoRA for the text_encoder" in caplog.text
    assert own.get_list_adapters() == {"unet": ["default_0"]}
    for call in (own.disable_lora, own.enable_lora, own.fuse_lora, own.unfuse_lora, own.unload_lora_weights):
        call()
    with pytest.raises(CheckpointError, match="built without its text_encoder"):
        own.load_lora_weights(t5)
    with pytest.raises(CheckpointError, match="holds no LoRA for unet or text_encoder here"):
        own.load_lora_weights({})


def test_without_peft_the_error_says_what_to_install(pipe: IFPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'floyd-if\[lora\]'"):
        pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))


# ----------------------------------------------------------------------------------------------------------- several


def test_several_act_together_each_by_its_weight(pipe: IFPipeline) -> None:
    one, two = made_up(pipe.unet, seed=1), made_up(pipe.unet, ("to_q", "add_v_proj", "conv1"), ranks=(3,), seed=2)
    plain = deepcopy(pipe.unet)
    pipe.load_lora_weights(lora_files.peft(one), "one")
    pipe.load_lora_weights(lora_files.kohya(two), adapter_name="two")
    assert pipe.get_active_adapters() == ["two"]
    close(answer(pipe.unet), answer(merged(plain, (two, 1.0))))
    pipe.set_adapters(["one", "two"], [0.75, -0.5])
    assert pipe.get_active_adapters() == ["one", "two"]
    close(answer(pipe.unet), answer(merged(plain, (one, 0.75), (two, -0.5))))
    pipe.set_adapters(["two", "one"])
    close(answer(pipe.unet), answer(merged(plain, (one, 1.0), (two, 1.0))))
    pipe.set_adapters("one", 2)
    close(answer(pipe.unet), answer(merged(plain, (one, 2.0))))
    pipe.set_adapters(["one", "two"], 0.5)
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {"unet": ["two"]}
    close(answer(pipe.unet), answer(merged(plain, (two, 0.5))))
    pipe.delete_adapters(["two"])
    assert torch.equal(answer(pipe.unet), answer(plain))


def test_a_weight_may_differ_by_component(pipe: IFPipeline) -> None:
    unet, t5 = made_up(pipe.unet), made_up(pipe.text_encoder, ("q", "wo"))
    wanted = answer(merged(pipe.unet, (unet, 0.25))), reading(merged(pipe.text_encoder, (t5, 2.0)))
    pipe.load_lora_weights(lora_files.peft(unet) | lora_files.peft(t5, "text_encoder"), "a")
    pipe.set_adapters("a", {"unet": 0.25, "text_encoder": 2.0})
    close(answer(pipe.unet), wanted[0])
    close(reading(pipe.text_encoder), wanted[1])


def test_disabled_lora_is_none_until_it_is_enabled(pipe: IFPipeline, caplog: pytest.LogCaptureFixture) -> None:
    before = answer(pipe.unet)
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)), "a")
    after = answer(pipe.unet)
    pipe.disable_lora()
    assert torch.equal(answer(pipe.unet), before)
    with pytest.raises(ValueError, match="enable_lora"):
        pipe.fuse_lora()
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet, seed=4)), "b")
    assert "acts once you call enable_lora()" in caplog.text
    assert torch.equal(answer(pipe.unet), before)
    pipe.set_adapters("a")
    pipe.enable_lora()
    assert torch.equal(answer(pipe.unet), after)


def test_names_that_are_not_there_or_there_already_are_refused(pipe: IFPipeline) -> None:
    state = lora_files.peft(made_up(pipe.unet))
    pipe.load_lora_weights(state, "a")
    for call in (pipe.set_adapters, pipe.delete_adapters, pipe.lora_layers):
        with pytest.raises(ValueError, match="no LoRA b here; there is a"):
            call("b")
    with pytest.raises(ValueError, match="no LoRA b here; there is a"):
        pipe.fuse_lora(adapter_names=["b"])
    with pytest.raises(ValueError, match="There is a LoRA 'a' already"):
        pipe.load_lora_weights(state, "a")
    for bad in ("", "a.b", "keys", 3):
        with pytest.raises(ValueError, match="adapter_name must be"):
            pipe.load_lora_weights(state, bad)  # type: ignore[arg-type]
    pipe.load_lora_weights(state)
    assert pipe.get_list_adapters() == {"unet": ["a", "default_1"]}


@pytest.mark.parametrize(
    ("names", "weights", "complaint"),
    [
        (["a"], [1.0, 2.0], "one for each of a; got 2"),
        (["a", "a"], None, "names a LoRA twice"),
        ("a", float("nan"), "must be a finite number"),
        ("a", "much", "must be a finite number"),
        ("a", {"vae": 1.0}, "by component, unet, text_encoder; got vae"),
    ],
)
def test_weights_that_make_no_sense_are_refused(pipe: IFPipeline, names: Any, weights: Any, complaint: str) -> None:
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)), "a")
    before = answer(pipe.unet)
    with pytest.raises(ValueError, match=complaint):
        pipe.set_adapters(names, weights)
    assert torch.equal(answer(pipe.unet), before)


# ------------------------------------------------------------------------------------------------------------ per call


def test_the_scale_of_a_call_multiplies_the_weights_and_ends_with_it(pipe: IFPipeline, paint: Paint) -> None:
    layers = made_up(pipe.unet)
    pipe.load_lora_weights(lora_files.peft(layers), "a")
    pipe.set_adapters("a", 0.5)
    half = paint(pipe)
    pipe.set_adapters("a", 2.0)
    double = paint(pipe)
    differ(half, double)
    close(paint(pipe, cross_attention_kwargs={"scale": 0.25}), half)
    assert torch.equal(paint(pipe), double)


def test_the_scale_of_a_call_counts_for_the_text_too(pipe: IFPipeline, paint: Paint) -> None:
    layers = made_up(pipe.text_encoder, T5_LAYERS)
    plain = stage_one(pipe.unet, merged(pipe.text_encoder, (layers, 0.5)), pipe.tokenizer)
    text = {"prompt": "a red circle", "prompt_embeds": None, "negative_prompt_embeds": None}
    wanted = paint(plain, **text)
    pipe.load_lora_weights(lora_files.peft(layers, "text_encoder"))
    differ(paint(pipe, **text), wanted)
    close(paint(pipe, **text, cross_attention_kwargs={"scale": 0.5}), wanted, atol=5e-5)


def test_two_threads_paint_with_scales_of_their_own(pipe: IFPipeline, paint: Paint) -> None:
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    scales = (0.0, 0.5, 1.0)
    wanted = {scale: paint(pipe, steps=4, cross_attention_kwargs={"scale": scale}) for scale in scales}
    found: dict[float, Tensor] = {}

    def work(scale: float) -> None:
        found[scale] = paint(pipe, steps=4, cross_attention_kwargs={"scale": scale})

    threads = [Thread(target=work, args=(scale,)) for scale in scales]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[scale], wanted[scale]) for scale in scales)


def test_lora_that_peft_itself_put_on_heeds_the_call(pipe: IFPipeline, paint: Paint) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    before = paint(pipe)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"], init_lora_weights=False), pipe.unet, "mine")
    differ(paint(pipe), before)
    assert torch.equal(paint(pipe, cross_attention_kwargs={"scale": 0}), before)
    assert pipe.get_list_adapters() == {"unet": ["mine"]}


def test_a_cascade_weighs_lora_by_the_stage(pipe: IFPipeline, second: Any) -> None:
    cascade = Cascade(pipe, second)
    one, two = made_up(pipe.unet), made_up(second.unet)
    t5 = made_up(pipe.text_encoder, ("q", "wo"))

    def paint(size: int, **options: Any) -> dict[str, Any]:
        stages = cascade("a red circle", size=size, steps=2, options=options).stages
        return {name: pictures[0].tobytes() for name, pictures in stages.items()}

    plain = paint(48)
    pipe.load_lora_weights(lora_files.peft(one) | lora_files.peft(t5, "text_encoder"))
    second.load_lora_weights(lora_files.peft(two))
    off: dict[str, Any] = {"cross_attention_kwargs": {"scale": 0}}
    assert paint(48)["stage_1"] != plain["stage_1"]
    assert paint(48, stage_1=off, stage_2=off) == plain
    half = paint(48, stage_1=off)
    assert (half["stage_1"], half["stage_2"] != plain["stage_2"]) == (plain["stage_1"], True)
    with pytest.raises(ValueError, match=r"lose the LoRA of the text encoder \(default_0\)"):
        cascade("a red circle", size=32, free_text_encoder=True)


# --------------------------------------------------------------------------------------------------------------- other


def test_a_saved_pipeline_is_the_one_without_lora(pipe: IFPipeline, tmp_path: Any) -> None:
    plain = answer(pipe.unet), reading(pipe.text_encoder)
    unet, t5 = made_up(pipe.unet), made_up(pipe.text_encoder, T5_LAYERS)
    pipe.load_lora_weights(lora_files.peft(unet) | lora_files.peft(t5, "text_encoder"))
    for safe in (True, False):
        pipe.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        again = IFPipeline.from_pretrained(tmp_path / str(safe), tokenizer=None, requires_safety_checker=False)
        close(answer(again.unet), plain[0])  # kernels round by where in memory the weights lie
        close(reading(again.text_encoder), plain[1])
    fused = answer(pipe.unet)
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    again = IFPipeline.from_pretrained(tmp_path / "fused", tokenizer=None, requires_safety_checker=False)
    close(answer(again.unet), fused)


def test_pipelines_that_share_a_network_share_its_lora(pipe: IFPipeline) -> None:
    other = IFImg2ImgPipeline.from_pipe(pipe)
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)), "a")
    assert other.get_active_adapters() == ["a"]
    other.unload_lora_weights()
    assert pipe.get_list_adapters() == {}


def test_a_copy_of_a_network_has_a_lora_of_its_own(pipe: IFPipeline, paint: Paint) -> None:
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)), "a")
    other = stage_one(deepcopy(pipe.unet))
    wanted = paint(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.set_adapters("a", 3.0)
    assert torch.equal(paint(other, cross_attention_kwargs={"scale": 0.5}), wanted)


def test_a_scale_that_nothing_heeds_is_said_to_be_wasted(
    pipe: IFPipeline, paint: Paint, caplog: pytest.LogCaptureFixture
) -> None:
    paint(pipe, cross_attention_kwargs={"scale": 0.5})
    assert caplog.text.count("no effect") == 1
    caplog.clear()
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    paint(pipe, cross_attention_kwargs={"scale": 0.5})
    assert "no effect" not in caplog.text
    pipe.fuse_lora()
    paint(pipe, cross_attention_kwargs={"scale": 0.5})
    assert "no effect" in caplog.text


def test_training_mode_is_the_layers_own(pipe: IFPipeline) -> None:
    assert isinstance(pipe.unet, nn.Module)
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    assert not any(module.training for module in pipe.unet.modules())


def test_a_text_cache_does_not_hide_lora_on_the_text_encoder(pipe: IFPipeline) -> None:
    def said() -> Tensor:
        text: Tensor = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)[0]
        return text

    pipe.text_cache = TextCache()
    plain = said()
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.text_encoder, T5_LAYERS), "text_encoder"))
    adapted = said()
    differ(adapted, plain)
    pipe.set_adapters("default_0", 0.5)
    differ(said(), adapted)
    pipe.disable_lora()
    assert torch.equal(said(), plain)
    pipe.unload_lora_weights()
    assert torch.equal(said(), plain)
