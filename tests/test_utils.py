from __future__ import annotations

import subprocess
import sys

import pytest

import floyd.utils
from floyd.images.convert import numpy_to_pil, pt_to_pil
from floyd.images.grid import make_image_grid
from floyd.images.load import load_image


def test_scripts_find_the_helpers_under_their_names() -> None:
    expected = [load_image, make_image_grid, numpy_to_pil, pt_to_pil]
    assert [getattr(floyd.utils, name) for name in floyd.utils.__all__] == expected
    assert dir(floyd.utils) == floyd.utils.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="load_video"):
        floyd.utils.load_video  # noqa: B018


def test_loading_a_picture_does_not_load_torch() -> None:
    code = "import sys; from floyd.utils import load_image, make_image_grid; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
