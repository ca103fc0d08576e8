"""A hub cache that holds every checkpoint of the docs under its own id: tiny networks in the layout of the real ones,
and all that is awkward about it:

    fp16 files beside the full ones; T5's feed-forward output in float32 even there
    T5 in shards, the variant before the shard's number in some repositories and after it in others
    a quantized T5 ("8bit") among the variants
    pickled twins of all weights, and one watermark that is pickled alone
    a tokenizer that is `spiece.model` and nothing else
    the watermark's picture in bytes; its class under two names
    keys that only later or other versions know, and keys that are missing
    tied and computed tensors that are stored all the same; the old names of the autoencoder's attention
    the original's own weights at the root, which are nobody's business here
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests import tiny
from tests.adapters import lora_files
from tests.hub_configs import (
    COSINE,
    LATENT_NOISING,
    LATENT_SAMPLING,
    SAMPLING,
    TEXT_WIDTH,
    UNET_ONE,
    UNET_THREE,
    UNET_TWO,
    VAE,
    VERSION,
)
from torch import Tensor

from floyd.models.safety import IFSafetyChecker
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import LEGACY_ATTENTION_NAMES, AutoencoderKL

STAGE_ONE = ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-I-L-v1.0", "DeepFloyd/IF-I-M-v1.0")
STAGE_TWO = ("DeepFloyd/IF-II-L-v1.0", "DeepFloyd/IF-II-M-v1.0")
STAGE_THREE = ("stabilityai/stable-diffusion-x4-upscaler",)
IDS = (*STAGE_ONE, *STAGE_TWO, *STAGE_THREE)
LORA = "your-name/if-lora"  # for any stage I

PT = {"format": "pt"}  # what safetensors files say of themselves
COMMIT = "c03d510e9b75bce9f9db5bb85148c1402ad7e694"

_WORDS = (
    "a photo of kangaroo wearing an orange hoodie and blue sunglasses standing in front the eiffel tower holding sign "
    "that says very deep learning fantasy landscape style minecraft red square green circle on white background"
).split()


def build(cache: Path, scratch: Path) -> Path:
    """The cache, as the hub's client leaves it behind."""
    text = scratch / "text"
    _t5(text)
    for number, repo_id in enumerate((*STAGE_ONE, *STAGE_TWO)):
        folder = scratch / repo_id
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(text / name, folder / name)
        if number % 2:
            _in_the_older_order(folder / "text_encoder")
        _deepfloyd(folder, number)
    _upscaler(scratch / STAGE_THREE[0])
    _lora(scratch / LORA)
    for repo_id in (*IDS, LORA):
        _take_in(cache, repo_id, scratch / repo_id)
    return cache


def _take_in(cache: Path, repo_id: str, folder: Path) -> None:
    """Blobs by their content, links to them under the commit, and the branch's name."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = root / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blob)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)


def _lora(folder: Path) -> None:
    """What the incumbent's training script writes: two formats in one file."""
    layers = lora_files.made_up(UNet2DConditionModel(**_known(UNET_ONE)), ranks=(4,))
    folder.mkdir(parents=True)
    save_file(lora_files.mixed(layers), folder / "pytorch_lora_weights.safetensors", PT)
    (folder / "README.md").write_text("---\nbase_model: DeepFloyd/IF-I-XL-v1.0\n---\n")


# --------------------------------------------------------------------------------------------------------- stages I, II


def _deepfloyd(folder: Path, number: int) -> None:
    is_second = number >= len(STAGE_ONE)
    keys = dict(UNET_TWO if is_second else UNET_ONE)
    if number % 2:
        keys.pop("encoder_hid_dim_type")  # a later commit brought it; without it, it is what it is here
    unet = tiny.disturbed(UNet2DConditionModel(**_known(keys)), number)
    with torch.no_grad():
        unet.conv_out.weight *= 0.25
    _json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **VERSION, **keys})
    _weights(folder / "unet", "diffusion_pytorch_model", unet.state_dict())

    scheduler = {**COSINE, **SAMPLING, "sample_max_value": 1.0 if is_second else 1.5}
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if is_second:
        _json(folder / "image_noising_scheduler" / "scheduler_config.json", COSINE)
    _safety(folder)
    watermarker = "IFWatermark" if number % 2 else "IFWatermarker"
    _watermark(folder / "watermarker", pickled_alone=number == len(IDS) - 2)

    index: dict[str, Any] = {
        "_class_name": "IFSuperResolutionPipeline" if is_second else "IFPipeline",
        **VERSION,
        "_ignore_files": ["pytorch_model.bin"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": ["deepfloyd_if", watermarker],
    }
    if is_second:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    _json(folder / "model_index.json", index)
    (folder / "README.md").write_text("---\nextra_gated_prompt: the licence\n---\n")
    (folder / "config.yml").write_text("target: IFStageI\nparams:\n  image_size: 64\n")
    (folder / "pytorch_model.bin").write_bytes(b"the original's weights, which nobody here reads")


def _safety(folder: Path) -> None:
    config = {
        "architectures": ["IFSafetyChecker"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {"model_type": "clip_text_model", "torch_dtype": None, "vocab_size": 49408},
        "text_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {
            "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 32, "intermediate_size": 37,
            "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 4, "num_channels": 3,
            "num_hidden_layers": 1, "patch_size": 16, "projection_dim": 16, "torch_dtype": None,
        },
        "vision_config_dict": {
            "hidden_size": 32, "image_size": 32, "intermediate_size": 37, "num_attention_heads": 4,
            "num_hidden_layers": 1, "patch_size": 16, "projection_dim": 16,
        },
    }  # fmt: skip
    checker = tiny.disturbed(IFSafetyChecker.from_config(config), 6)
    with torch.no_grad():
        checker.p_head.bias.fill_(-10)  # nothing that a tiny network paints is unsafe
        checker.w_head.bias.fill_(-10)
    state = checker.state_dict()
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    _json(folder / "safety_checker" / "config.json", config)
    _weights(folder / "safety_checker", "model", state)
    extractor = {
        "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 32},
    }  # fmt: skip
    _json(folder / "feature_extractor" / "preprocessor_config.json", extractor)


def _watermark(folder: Path, *, pickled_alone: bool) -> None:
    picture = torch.tensor([255, 0, 0, 128], dtype=torch.uint8).expand(62, 62, 4).contiguous()
    _json(folder / "config.json", {"_class_name": "IFWatermark", **VERSION})
    torch.save({"watermark_image": picture}, folder / "diffusion_pytorch_model.bin")
    if not pickled_alone:
        save_file({"watermark_image": picture}, folder / "diffusion_pytorch_model.safetensors", PT)


# ------------------------------------------------------------------------------------------------------------------- T5


def _t5(folder: Path) -> None:
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    words = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words.choices(_WORDS, k=8)) for _ in range(300)),
        model_prefix=str(tokenizer / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tokenizer / "spiece.vocab").unlink()
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"additional_special_tokens": extra, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _json(tokenizer / "special_tokens_map.json", special)
    own = {"extra_ids": 100, "model_max_length": 512, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    _json(tokenizer / "tokenizer_config.json", {**special, **own, "special_tokens_map_file": None})

    config = {
        "_name_or_path": "/fsx/t5-v1_1-xxl", "architectures": ["T5EncoderModel"], "d_ff": 40, "d_kv": 8,
        "d_model": TEXT_WIDTH, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
        "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
        "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 2, "num_heads": 4,
        "num_layers": 2, "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 256,
    }  # fmt: skip
    torch.manual_seed(4)
    model = tiny.disturbed(T5EncoderModel(T5Config(**config)), 4)
    state = {key: weight for key, weight in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
    encoder = folder / "text_encoder"
    _json(encoder / "config.json", config)
    _shards(encoder, state)
    _shards(encoder, {key: w if ".wo." in key else w.half() for key, w in state.items()}, "fp16")
    save_file(_quantized(state), encoder / "model.8bit.safetensors", PT)


def _shards(folder: Path, state: Mapping[str, Tensor], variant: str | None = None) -> None:
    """Two of them, in both formats; the pickled ones hold the tied embedding as well."""
    early = f".{variant}" if variant else ""
    for base, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole = dict(state)
        if suffix == "bin":
            whole["encoder.embed_tokens.weight"] = whole["shared.weight"]
        keys = list(whole)
        weight_map = {}
        for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
            name = f"{base}{early}-{number:05d}-of-00002.{suffix}"
            tensors = {key: whole[key] for key in part}
            _save(tensors, folder / name)
            weight_map.update(dict.fromkeys(part, name))
        size = sum(tensor.nbytes for tensor in whole.values())
        _json(
            folder / f"{base}.{suffix}.index{early}.json",
            {"metadata": {"total_size": size}, "weight_map": weight_map},
        )


def _in_the_older_order(folder: Path) -> None:
    """`model.fp16-00001-of-00002.safetensors` becomes `model-00001-of-00002.fp16.safetensors`."""
    for path in list(folder.glob("*.fp16-*")):
        base, rest = path.name.split(".fp16-")
        number, suffix = rest.rsplit(".", 1)
        path.rename(folder / f"{base}-{number}.fp16.{suffix}")
    for path in list(folder.glob("*.index.fp16.json")):
        content = json.loads(path.read_text())
        moved = {}
        for key, name in content["weight_map"].items():
            base, rest = name.split(".fp16-")
            number, suffix = rest.rsplit(".", 1)
            moved[key] = f"{base}-{number}.fp16.{suffix}"
        _json(folder / path.name.replace(".index.fp16.", ".fp16.index."), {**content, "weight_map": moved})
        path.unlink()


def _quantized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As bitsandbytes stores it: bytes and a scale for each row, all but `wo`."""
    stored: dict[str, Tensor] = {}
    for key, weight in state.items():
        if weight.ndim == 2 and ".layer." in key and ".wo." not in key and "relative" not in key:
            scale = weight.abs().amax(dim=1)
            stored[key] = (weight / scale[:, None] * 127).round().to(torch.int8)
            stored[key.replace(".weight", ".SCB")] = scale
        else:
            stored[key] = weight
    return stored


# ------------------------------------------------------------------------------------------------------------ stage III


def _upscaler(folder: Path) -> None:
    unet = tiny.disturbed(UNet2DConditionModel(**_known(UNET_THREE)), 2)
    vae = tiny.disturbed(AutoencoderKL(**_known(VAE)), 2)
    with torch.no_grad():
        unet.conv_out.weight *= 0.25
        vae.decoder.conv_out.weight *= 0.1
    _json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **VERSION, **UNET_THREE})
    _weights(folder / "unet", "diffusion_pytorch_model", unet.state_dict())
    _json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", **VERSION, **VAE})
    _weights(folder / "vae", "diffusion_pytorch_model", _with_old_names(vae.state_dict()))

    text_encoder = tiny.clip_text()
    config = {**text_encoder.config.to_dict(), "torch_dtype": "float32", "transformers_version": "4.25.0.dev0"}
    state = {f"text_model.{key.removeprefix('text_model.')}": w for key, w in text_encoder.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    _json(folder / "text_encoder" / "config.json", config)
    _weights(folder / "text_encoder", "model", state)
    _clip_tokenizer(folder / "tokenizer")

    _json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **LATENT_SAMPLING})
    _json(folder / "low_res_scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler", **LATENT_NOISING})
    index = {
        "_class_name": "StableDiffusionUpscalePipeline",
        "_diffusers_version": "0.10.0.dev0",
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "max_noise_level": 350,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _json(folder / "model_index.json", index)
    (folder / "x4-upscaler-ema.ckpt").write_bytes(b"the original's weights")
    (folder / "x4-upscaler-ema.safetensors").write_bytes(b"the same again")


def _clip_tokenizer(folder: Path) -> None:
    """Two files of vocabulary, and no tokenizer.json."""
    tokenizer = tiny.clip_tokenizer()
    _json(folder / "vocab.json", dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "!",
        "unk_token": "<|endoftext|>",
    }
    special["pad_token"] = "<|endoftext|>"
    _json(folder / "special_tokens_map.json", special)
    own = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    _json(folder / "tokenizer_config.json", {**special, **own, "tokenizer_class": "CLIPTokenizer"})


def _with_old_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, weight in state.items():
        for old, new in LEGACY_ATTENTION_NAMES.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = weight
    return renamed


# ---------------------------------------------------------------------------------------------------------------- files


def _weights(folder: Path, base: str, state: Mapping[str, Tensor]) -> None:
    """Full and half, in both formats."""
    for variant in ("", ".fp16"):
        cast = {key: w.half() if variant and w.is_floating_point() else w for key, w in state.items()}
        _save(cast, folder / f"{base}{variant}.safetensors")
        pickled = "pytorch_model" if base == "model" else base
        _save(cast, folder / f"{pickled}{variant}.bin")


def _save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, PT)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _known(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not key.startswith("_")}
