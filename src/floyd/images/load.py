"""A picture from wherever it lies: a file, the web, or the caller's hand."""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from floyd.images.modes import to_rgb, upright

TIMEOUT_S = 30
MAX_BYTES = 100 * 2**20


def load_image(
    image: str | Path | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """An upright RGB picture from a path, an http(s) address or a PIL picture.

    `convert_method`, if given, is called instead of the conversion to RGB.
    """
    if isinstance(image, Image.Image):
        picture = image
    elif isinstance(image, str | Path):
        source = _fetched(image) if _is_url(image) else _existing(image)
        picture = _opened(source, str(image))
    else:
        raise TypeError(f"image must be a path, an http(s) address or a PIL picture, got {type(image).__name__}.")
    picture = upright(picture)
    return to_rgb(picture) if convert_method is None else convert_method(picture)


def picture_in(content: bytes, name: str) -> Image.Image:
    """The upright RGB picture in a file's content; `name` is for complaints."""
    return to_rgb(upright(_opened(BytesIO(content), name)))


def _is_url(image: str | Path) -> bool:
    return isinstance(image, str) and urlsplit(image).scheme.lower() in ("http", "https")


def _existing(image: str | Path) -> Path:
    path = Path(image)
    if not path.is_file():
        raise ValueError(f"There is no file {str(image)!r}: pass an existing path, or an http:// or https:// address.")
    return path


def _fetched(url: str | Path) -> BytesIO:
    try:
        with urlopen(Request(str(url), headers={"User-Agent": "floyd"}), timeout=TIMEOUT_S) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, HTTPException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise OSError(f"Could not fetch {url} ({reason}): check it, or download it and pass the path.") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{url} is larger than {MAX_BYTES // 2**20} MiB: download and shrink it, then pass the path.")
    return BytesIO(content)


def _opened(source: Path | BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError) as error:  # the latter for a broken PNG
        raise ValueError(f"{name} is not a picture that Pillow can read: {error}.") from error
