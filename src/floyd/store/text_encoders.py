"""T5 from wherever it lies: a folder, a repository, a single file; whole, in fewer bits, or left on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from floyd.errors import CheckpointError
from floyd.store import hub, layout, lazy, weights
from floyd.store.files import read_json
from floyd.store.filling import KEY, Quantization, fill, quantization_for
from floyd.store.gguf import GGUFState
from floyd.store.layered import LayeredT5Encoder
from floyd.store.layout import INDEX_NAME
from floyd.store.naming import SAFE
from floyd.store.pretrained import as_dtype, parameters_on_meta
from floyd.store.t5 import T5State, config_keys
from floyd.store.t5_tokenizer import T5Tokenizer

_GGUF = ".gguf"


def load_text_encoder(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    resident: Literal["all", "layer"] = "all",
    device: torch.device | str = "cpu",
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Any:
    """A T5 encoder for `from_pretrained(text_encoder=...)`.

    From a pipeline's folder or hub id, a T5's (google's, with its decoder, too), or one file: `.safetensors` in any
    floating precision, float8 with scales or without, or `.gguf`. `dtype` is the precision, float32 unless told;
    `quantization` keeps the weights in fewer bits from the moment they are read. `resident="layer"` leaves them on
    disk, and reads one block at a time whenever a text is read: needs little memory, and seconds for each text.
    """
    if resident not in ("all", "layer"):
        raise ValueError(f"resident must be 'all' or 'layer', got {resident!r}.")
    precision, path = as_dtype(dtype), Path(path_or_id).expanduser()
    if not path.is_file():
        if path.suffix in {_GGUF, f".{SAFE}"}:
            raise CheckpointError(f"{path} does not exist.")
        source = hub.Source(path_or_id, revision, token, cache_dir, local_files_only)
        path = _folder(source, subfolder, variant)
    files, state, told = _opened(path, variant)
    kept = quantization_for(told, quantization, path)
    config = _config(told, state)
    if resident == "all":
        encoder = _described(config)
        fill(encoder, state, dtype=precision, place=str(path), quantization=kept)
        encoder.eval()
        return encoder if torch.device(device).type == "cpu" else encoder.to(device)
    if kept is not None and not kept.is_stored:
        raise ValueError(
            "resident='layer' reads the weights for every text, and would quantize them every time: save the encoder "
            "quantized, and load that, or leave quantization out."
        )
    return _layered(config, state, files, precision, path, kept, device)


def load_tokenizer(path_or_id: str | os.PathLike[str], *, subfolder: str | None = None, **hub_options: Any) -> Any:
    """T5's tokenizer: from its folder, a pipeline's, a hub id, or a `spiece.model`."""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return T5Tokenizer.from_pretrained(path.parent)
    source = hub.Source(path_or_id, **hub_options)
    return T5Tokenizer.from_pretrained(_folder(source, subfolder, None, name="tokenizer", with_weights=False))


def _described(config: Mapping[str, Any]) -> Any:
    """The encoder that its configuration describes, without weights."""
    kind: Any = layout.resolve("transformers", "T5EncoderModel")
    with parameters_on_meta():
        return kind.from_config(config)


def _folder(
    source: hub.Source,
    subfolder: str | None,
    variant: str | None,
    *,
    name: str = "text_encoder",
    with_weights: bool = True,
) -> Path:
    """Of a pipeline, the part of this name."""
    local = source.folder()
    if local is not None and subfolder is None and (local / INDEX_NAME).is_file():
        subfolder = name
    return hub.component(source, subfolder, variant=variant, with_weights=with_weights)


def _opened(path: Path, variant: str | None) -> tuple[list[Path], T5State, Mapping[str, Any]]:
    """The files, what they hold, and what a configuration beside them says."""
    if path.is_dir():
        used = weights.available(path, variant=variant, use_safetensors=None)
        files = weights.files(path, variant=used, use_safetensors=None)
        config = path / "config.json"
        return files, T5State(lazy.opened(path, variant=used)), read_json(config) if config.is_file() else {}
    state: Mapping[str, Tensor]
    if path.suffix == _GGUF:
        state = GGUFState(path)
    elif path.suffix == f".{SAFE}":
        state = lazy.of_files([path])
    else:
        state = weights.read_file(path)
    return [path], T5State(state), {}


def _config(told: Mapping[str, Any], state: T5State) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != KEY} or config_keys(state)


def _layered(
    config: Mapping[str, Any],
    state: T5State,
    files: list[Path],
    dtype: torch.dtype,
    path: Path,
    kept: Quantization | None,
    device: torch.device | str,
) -> LayeredT5Encoder:
    whole = sha256(json.dumps([config, str(dtype)], sort_keys=True).encode())
    for file in files:
        whole.update(_stamp(file))
    told: dict[str, Any] = {"dtype": dtype, "place": str(path), "quantization": kept, "device": device}
    return LayeredT5Encoder(_described(config), state, fingerprint=f"files:{whole.hexdigest()[:32]}", **told)


def _stamp(path: Path) -> bytes:
    """What changes when a file does, without reading all of it."""
    state = path.stat()
    with path.open("rb") as file:
        head = file.read(2**16)
    return f"{path.resolve().name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode() + sha256(head).digest()
