from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from floyd.models.safety import IFSafetyChecker, SafetyScores

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 12,
}
TEXT = {**TOWER, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}


@pytest.fixture
def checker() -> IFSafetyChecker:
    torch.manual_seed(0)
    return _randomized(IFSafetyChecker(vision_config=TOWER).eval())


@pytest.fixture
def incumbent() -> Any:
    """The incumbent's checker, which transformers 5 can save and load only after `post_init`."""
    module = pytest.importorskip("diffusers.pipelines.deepfloyd_if")
    from transformers import CLIPConfig

    class Checker(module.IFSafetyChecker):
        def __init__(self, config: CLIPConfig) -> None:
            super().__init__(config)
            self.post_init()

    torch.manual_seed(0)
    return _randomized(Checker(CLIPConfig(vision_config=TOWER, text_config=TEXT)).eval())


def _randomized(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def test_judgements_and_pictures_equal_the_incumbent(incumbent: Any) -> None:
    ours = IFSafetyChecker.from_config(incumbent.config.to_dict()).eval()
    ours.load_state_dict(incumbent.state_dict())
    clip_input_BCHW, images_BHWC = 3 * torch.randn(6, 3, 16, 16), np.random.default_rng(0).random((6, 4, 4, 3))
    nsfw_B, watermark_B = ours.scores(clip_input_BCHW)
    limits = {"p_threshold": nsfw_B.median().item(), "w_threshold": watermark_B.median().item()}
    got = ours(clip_input_BCHW, images_BHWC, **limits)
    expected = incumbent(clip_input_BCHW, images_BHWC.copy(), **limits)
    np.testing.assert_array_equal(got[0], expected[0])
    assert got[1:] == expected[1:]
    assert 0 < sum(got[1]) < 6
    assert 0 < sum(got[2]) < 6


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_of_the_incumbent_is_read(incumbent: Any, tmp_path: Path, variant: str | None) -> None:
    (incumbent.half() if variant else incumbent).save_pretrained(tmp_path, variant=variant)
    ours = IFSafetyChecker.from_pretrained(tmp_path, variant=variant)
    assert ours.dtype == torch.float32
    for key, weight in incumbent.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight.float()), key
    clip_input_BCHW = torch.randn(2, 3, 16, 16)
    expected = incumbent.float().vision_model(clip_input_BCHW)[0]
    torch.testing.assert_close(ours.scores(clip_input_BCHW).nsfw_B, incumbent.p_head(expected).flatten())


def test_the_incumbent_reads_what_is_saved(incumbent: Any, tmp_path: Path) -> None:
    foreign = {**incumbent.config.to_dict(), "somebody_elses": 1}
    ours = _randomized(IFSafetyChecker.from_config(foreign))
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["somebody_elses"] == 1
    theirs = type(incumbent).from_pretrained(tmp_path)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, ours.state_dict()[key]) for key, weight in theirs.state_dict().items())


def test_patch_numbers_in_an_old_file_are_passed_over(checker: IFSafetyChecker, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checker.save_pretrained(tmp_path)
    numbers = {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    save_file({**checker.state_dict(), **numbers}, tmp_path / "model.safetensors")
    loaded = IFSafetyChecker.from_pretrained(tmp_path)
    clip_input_BCHW = torch.randn(1, 3, 16, 16)
    scores_B = [it.scores(clip_input_BCHW).nsfw_B for it in (loaded, checker)]
    torch.testing.assert_close(*scores_B, atol=1e-6, rtol=0)  # kernels round by where in memory the weights lie


def test_a_files_precision_does_not_decide_the_models() -> None:
    checker = IFSafetyChecker(vision_config={**TOWER, "dtype": "float16"})
    assert {parameter.dtype for parameter in checker.parameters()} == {torch.float32}


def test_a_logit_must_exceed_one_half() -> None:
    scores = SafetyScores(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([-1.0, 9.0, 0.0]))
    assert scores.flags() == ([False, False, True], [False, True, False])
    assert scores.flags(p_threshold=0.0, w_threshold=10.0) == ([True, True, True], [False, False, False])


def test_a_score_that_is_no_number_counts_as_above() -> None:
    numbers = torch.tensor([float("nan"), float("inf"), float("-inf"), -9.0])
    assert SafetyScores(numbers, numbers).flags() == ([True, True, True, False],) * 2


@pytest.mark.parametrize("kind", ["array", "tensor", "list"])
def test_flagged_pictures_turn_black_and_the_given_ones_stay(checker: IFSafetyChecker, kind: str) -> None:
    array_BHWC = np.full((2, 4, 4, 3), 0.5)
    images: Any = {"array": array_BHWC, "tensor": torch.from_numpy(array_BHWC), "list": list(array_BHWC)}[kind]
    clip_input_BCHW = torch.randn(2, 3, 16, 16)
    low, high = checker.scores(clip_input_BCHW).nsfw_B.sort().values.tolist()
    got, nsfw, watermarked = checker(clip_input_BCHW, images, p_threshold=(low + high) / 2, w_threshold=1e9)
    assert type(got) is type(images)
    assert sorted(nsfw) == [False, True]
    assert watermarked == [False, False]
    assert [float(image.max()) for image in got] == [0.0 if flag else 0.5 for flag in nsfw]
    assert all(float(image.min()) == 0.5 for image in images)


def test_a_number_of_pictures_that_differs_is_refused(checker: IFSafetyChecker) -> None:
    with pytest.raises(ValueError, match="Got 1 images but clip_input of 2"):
        checker(torch.randn(2, 3, 16, 16), np.zeros((1, 4, 4, 3)))
