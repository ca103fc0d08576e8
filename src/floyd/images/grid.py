"""Several pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from floyd.images.modes import to_rgb


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Row by row, in cells as large as the largest picture; `resize` first makes each a square of that side."""
    if not images or len(images) != rows * cols:
        raise ValueError(f"A grid of {rows} rows and {cols} columns needs {rows * cols} images, got {len(images)}.")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    cell_width, cell_height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (cols * cell_width, rows * cell_height))
    for index, image in enumerate(images):
        row, col = divmod(index, cols)
        sheet.paste(to_rgb(image), (col * cell_width, row * cell_height))
    return sheet
