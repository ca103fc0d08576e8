from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from floyd.images.load import load_image


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The temporary folder, served on this machine alone."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_path_an_address_and_a_picture_give_the_same(tmp_path: Path, site: str) -> None:
    given = Image.linear_gradient("L").convert("RGBA")
    given.save(tmp_path / "a.png")
    expected = given.convert("RGB").tobytes()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), f"{site}/a.png", given):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == expected


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    photograph = Image.new("RGB", (8, 4))
    photograph.getexif()[0x0112] = 6
    photograph.save(tmp_path / "a.jpg", exif=photograph.getexif())
    assert load_image(tmp_path / "a.jpg").size == (4, 8)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_another_conversion_replaces_the_usual_one() -> None:
    assert load_image(Image.new("RGBA", (2, 2)), lambda picture: picture.getchannel("A")).mode == "L"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"There is no file 'nowhere/cat\.png'"):
        load_image("nowhere/cat.png")


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png is not a picture"):
        load_image(tmp_path / "a.png")


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 9).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a picture that Pillow can read"):
        load_image(tmp_path / "a.png")


def test_an_address_that_does_not_answer_says_why(site: str) -> None:
    with pytest.raises(OSError, match=rf"Could not fetch {site}/none\.png .*404"):
        load_image(f"{site}/none.png")


def test_another_kind_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="got bytes"):
        load_image(b"...")  # type: ignore[arg-type]
