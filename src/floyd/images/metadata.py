"""PNG files that remember how they were made."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MAX_KEYWORD = 79  # characters: the PNG specification (3rd edition), section 11.3.3.2


def save_png(picture: Image.Image, path: str | Path, info: Mapping[str, str] | None = None) -> None:
    """Write all or nothing: another process never sees half a file, and a failure leaves the old one as it was."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"Pictures are written as .png, got {path.name!r}.")
    chunks = _chunks(info or {})
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with unfinished.open("xb") as file:
            picture.save(file, format="PNG", pnginfo=chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_info(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file."""
    with Image.open(path, formats=["PNG"]) as picture:
        picture.load()  # chunks may follow the pixels
        return {str(key): str(text) for key, text in getattr(picture, "text", {}).items()}


def _chunks(info: Mapping[str, str]) -> PngInfo:
    chunks = PngInfo()
    for key, text in info.items():
        if not isinstance(text, str):
            raise TypeError(f"info[{key!r}] must be a str, got {type(text).__name__}: convert it, with json.dumps say.")
        if not 1 <= len(key) <= MAX_KEYWORD or not key.isascii() or not key.isprintable():
            raise ValueError(f"A key of info has 1 to {MAX_KEYWORD} printable ASCII characters, got {key!r}.")
        if "\0" in text:
            raise ValueError(f"info[{key!r}] holds a NUL character, which PNG does not allow.")
        chunks.add_text(key, text)  # as Latin-1 where that suffices, which every reader knows; else as UTF-8
    return chunks
