from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from floyd.apps.tuning import config as module
from floyd.apps.tuning.config import METHODS, WISHES, TuneConfig
from floyd.errors import ConfigError

NEEDED: dict[str, Any] = {"data": "pictures", "out": "run"}


def of(**told: Any) -> TuneConfig:
    return TuneConfig.of(**{**NEEDED, **told})


def test_flags_are_stronger_than_the_file_and_the_file_than_the_methods_wishes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('method = "full"\ndata = "a"\nout = "b"\nbatch = 7\nsnr-gamma = 3\ntargets = ["to_q"]\n')
    config = TuneConfig.read(path, {"batch": 9, "model": ["x", "y"]})
    assert (config.batch, config.data, config.snr_gamma, config.targets) == (9, "a", 3.0, ("to_q",))
    assert (config.rate, config.ema) == (WISHES["full"]["rate"], WISHES["full"]["ema"])
    assert config.model == ("x", "y")
    assert TuneConfig.read(path, {"rate": 1.0}).rate == 1.0


def test_an_unknown_key_is_named_with_what_was_perhaps_meant(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('data = "a"\nout = "b"\nbatch_sise = 7\n')
    with pytest.raises(ConfigError, match=r"config\.toml: 'batch_sise' is no setting of training"):
        TuneConfig.read(path, {})
    with pytest.raises(ConfigError, match="'validate' is no setting of training; did you mean 'validate_every'"):
        of(validate=3)
    with pytest.raises(ConfigError, match="'zzz' is no setting of training; there are model, method"):
        of(zzz=1)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("rate = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml cannot be read as TOML"):
        TuneConfig.read(tmp_path / "bad.toml", {})
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read"):
        TuneConfig.read(tmp_path / "absent.toml", {})


def test_what_must_be_told_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="data and out must be told"):
        TuneConfig.of()
    with pytest.raises(ConfigError, match=r"^out must be told"):
        TuneConfig.of(data="x")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"method": "lorra"}, "method must be one of lora, .*, got 'lorra'; did you mean 'lora'"),
        ({"stage": 3}, "stage must be 1 or 2"),
        ({"rank": "4"}, "rank must be int, got '4'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"flip": 1}, "flip must be bool"),
        ({"steps": True}, "steps must be int"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"rate": float("nan")}, "rate must be above 0"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\]"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"targets": ["to_q", 3]}, "targets must be words"),
        ({"snr_floor": 9.0}, "snr_floor must not be above snr_gamma"),
        ({"method": "dreambooth"}, "tell class_prompt"),
        ({"method": "dreambooth", "class_prompt": "a", "class_data": "b"}, "say the same thing"),
        ({"method": "dreambooth", "class_prompt": "a", "batch": 1}, "batch of at least 2"),
        ({"class_prompt": "a dog"}, "are for dreambooth, and the method is lora"),
        ({"prior": "network"}, "prior is for dreambooth, and the method is lora"),
        (
            {"method": "dreambooth", "class_prompt": "a", "prior": "network", "train_all": True},
            "asks the network without its LoRA",
        ),
        ({"method": "textual-inversion"}, "needs tokens"),
        ({"method": "textual-inversion", "tokens": "x", "stage": 2}, "with stage I"),
        ({"tokens": "x"}, "are for textual-inversion"),
        (
            {"method": "textual-inversion", "tokens": "x", "words": "y", "start_word": "z"},
            "both say what the tokens begin with",
        ),
        ({"class_dropout": 0.1}, "class_dropout is for dreambooth, and the method is lora"),
        ({"method": "dreambooth", "class_prompt": "a", "class_dropout": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"validate_every": 5}, "needs a validation_prompt"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of(**told)


@pytest.mark.parametrize("method", METHODS)
def test_the_wishes_of_every_method_are_settings(method: str) -> None:
    more = {"dreambooth": {"class_prompt": "x"}, "textual-inversion": {"tokens": "x"}}.get(method, {})
    config = of(method=method, **more)
    assert {name: getattr(config, name) for name in WISHES[method]} == dict(WISHES[method])


def test_terms_hold_all_that_the_weights_depend_on() -> None:
    told = of().terms()
    assert {"seed", "rate", "batch", "optimizer", "precision", "dtype", "targets"} <= told.keys()
    assert not {"out", "device", "accumulate", "tensorboard"} & told.keys()


def test_the_words_are_those_of_training() -> None:
    from floyd.training import loop, lora

    assert (module.OPTIMIZERS, module.PRECISIONS) == (loop.OPTIMIZERS, loop.PRECISIONS)
    assert module.TARGETS == lora.TARGETS
    defaults = {name: p.default for name, p in inspect.signature(lora.attach).parameters.items()}
    assert of().targets == defaults["targets"]


def test_every_setting_says_what_it_is_for() -> None:
    assert [each.name for each in fields(TuneConfig) if not each.metadata.get("help")] == []


def test_reading_a_configuration_takes_no_torch() -> None:
    code = "import sys, floyd.apps.tuning.config, floyd.apps.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
