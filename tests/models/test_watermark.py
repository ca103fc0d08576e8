from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from floyd.models.watermark import IFWatermarker


def test_a_new_one_is_blank() -> None:
    picture = IFWatermarker().picture
    assert picture.dtype == np.uint8
    assert picture.shape == (62, 62, 4)
    assert not picture.any()


def test_the_incumbents_folder_is_read(tmp_path: Path) -> None:
    theirs = pytest.importorskip("diffusers.pipelines.deepfloyd_if").IFWatermarker()
    theirs.watermark_image.copy_(torch.randint(256, (62, 62, 4)))
    theirs.save_pretrained(tmp_path)
    ours = IFWatermarker.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours.picture, theirs.watermark_image.numpy())


def test_bytes_on_disk_are_read_in_any_precision(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    image_HW4 = torch.randint(256, (62, 62, 4), dtype=torch.uint8)
    IFWatermarker().save_pretrained(tmp_path)
    save_file({"watermark_image": image_HW4}, tmp_path / "diffusion_pytorch_model.safetensors")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours = IFWatermarker.from_pretrained(tmp_path, torch_dtype=dtype)
        assert torch.equal(torch.from_numpy(ours.picture), image_HW4)
        assert torch.equal(torch.from_numpy(ours.to(dtype).picture), image_HW4)


def test_the_incumbent_reads_what_is_saved(tmp_path: Path) -> None:
    module = pytest.importorskip("diffusers.pipelines.deepfloyd_if")
    ours = IFWatermarker()
    ours.watermark_image.copy_(torch.randint(256, (62, 62, 4)))
    ours.save_pretrained(tmp_path)
    theirs = module.IFWatermarker.from_pretrained(tmp_path)
    np.testing.assert_array_equal(theirs.watermark_image.numpy(), ours.picture)
