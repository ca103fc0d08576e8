from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from floyd.errors import CheckpointError
from floyd.store.snapshots import read_snapshot
from floyd.training import loop
from floyd.training.loop import LoopConfig, Losses, Phase, Progress, Trainer

PHASES = (
    Phase(num_steps=4, batch_size=3, size=2, rate=1e-2, last_rate=1e-2),
    Phase(num_steps=6, batch_size=5, size=4, rate=1e-2, last_rate=4e-3),
)
CONFIG = LoopConfig(phases=PHASES, warmup_steps=2, ema_decay=0.9, seed=3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
    x = torch.randn(phase.batch_size, 4, generator=generator)
    return {"copy": (model(x) - x).square().mean(), "small": 0.1 * model(x).abs().mean()}


def trainer(folder: Path, config: LoopConfig = CONFIG) -> Trainer:
    return Trainer(network(), loss_of, config, folder)


def everything(one: Trainer) -> dict[str, torch.Tensor]:
    """All numbers that the rest of the run depends on."""
    moments = {
        f"{type(optimizer).__name__}.{i}.{key}": value
        for optimizer in one.optimizers
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    shadow = {f"ema.{name}": value for name, value in one.ema.shadow.items()}
    return {**one.model.state_dict(), **shadow, **moments, "step": torch.tensor([one.step, one.ema.num_updates])}


def assert_equal(one: Trainer, other: Trainer) -> None:
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# ------------------------------------------------------------------------------------------------------------- config


def test_the_rate_is_linear_within_a_phase_after_the_warm_up() -> None:
    rates = [CONFIG.phase_at(step)[1] for step in range(10)]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 9e-3, 8e-3, 7e-3, 6e-3, 5e-3])


def test_a_step_belongs_to_its_phase() -> None:
    assert [CONFIG.phase_at(step)[0].size for step in (0, 3, 4, 9)] == [2, 2, 4, 4]
    assert CONFIG.num_steps == 10


def test_a_step_past_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step 10 is past the end of the run \(10 steps\)"):
        CONFIG.phase_at(10)


def test_a_run_without_phases_and_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="phases must not be empty"):
        LoopConfig(phases=())
    with pytest.raises(ValueError, match="precision must be one of auto, bf16, fp32, got 'fp16'"):
        LoopConfig(phases=PHASES, precision="fp16")
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw8bit, muon, got 'sgd'"):
        LoopConfig(phases=PHASES, optimizer="sgd")


# ------------------------------------------------------------------------------------------------------------ training


def test_the_losses_go_down(tmp_path: Path) -> None:
    phase = Phase(num_steps=60, batch_size=32, size=0, rate=3e-2, last_rate=3e-2)
    config = replace(CONFIG, phases=(phase,), precision="fp32")
    losses = [sum(progress.losses.values()) for progress in trainer(tmp_path, config).run()]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_every_step_is_told(tmp_path: Path) -> None:
    told = list(trainer(tmp_path).run())
    assert [progress.step for progress in told] == list(range(10))
    assert {progress.num_steps for progress in told} == {10}
    assert told[0].losses.keys() == {"copy", "small"}
    assert told[-1].seconds_left == 0


def test_the_time_left_is_the_mean_time_of_a_step_times_the_steps_to_come() -> None:
    assert Progress(step=3, num_steps=10, losses={}, seconds=8.0).seconds_left == pytest.approx(12.0)


@pytest.mark.parametrize(("precision", "optimizer"), [("bf16", "adamw"), ("fp32", "adamw"), ("bf16", "muon")])
@pytest.mark.parametrize("stops", [[1], [3, 4, 9]])
def test_a_run_that_was_left_and_resumed_equals_one_that_was_not(
    tmp_path: Path, stops: list[int], precision: str, optimizer: str
) -> None:
    config = replace(CONFIG, precision=precision, optimizer=optimizer)
    whole = trainer(tmp_path / "whole", config)
    list(whole.run())
    for stop in stops:
        steps = trainer(tmp_path / "parts", config).run()
        for progress in steps:
            if progress.step == stop:
                break
        steps.close()
    resumed = trainer(tmp_path / "parts", config)
    assert resumed.step == stops[-1] + 1
    list(resumed.run())
    assert_equal(whole, resumed)


def test_a_run_that_died_goes_on_from_its_last_snapshot(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    list(whole.run())
    seen: list[int] = []

    def dying_loss(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        seen.append(step)
        if step == 6:
            raise MemoryError("killed")
        return loss_of(model, phase, step, generator)

    always = replace(CONFIG, snapshot_every_s=-1.0)
    with pytest.raises(MemoryError, match="killed"):
        list(Trainer(network(), dying_loss, always, tmp_path / "parts").run())
    assert seen[-1] == 6
    resumed = trainer(tmp_path / "parts")
    assert resumed.step == 6
    list(resumed.run())
    assert_equal(whole, resumed)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 4, 3, padding=1))


def loss_of_maps(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
    x = torch.randn(phase.batch_size, 4, 6, 6, generator=generator)
    return {"copy": (model(x) - x).square().mean()}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_where_weights_lie_otherwise_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Begun without a compiler and gone on with one: fused AdamW would take one weight's moments for another's."""
    config = replace(CONFIG, precision="fp32", optimizer=optimizer)

    def trained(folder: str, until: int) -> Tensor:
        one = Trainer(convolutions(), loss_of_maps, config, tmp_path / folder)
        for _ in one.run(until=until):
            pass
        weight: Tensor = one.model[0].weight.detach()  # type: ignore[index,union-attr]
        assert weight.is_contiguous() == (loop.quicken is never)
        return weight

    def never(model: nn.Module) -> bool:
        return False

    quicken = loop.quicken
    monkeypatch.setattr(loop, "quicken", never)
    expected = trained("whole", 10)
    trained("parts", 5)
    monkeypatch.setattr(loop, "quicken", quicken)
    torch.testing.assert_close(trained("parts", 10), expected, atol=1e-5, rtol=1e-4)


def test_a_run_up_to_a_step_stops_there(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    assert list(one.run(until=0)) == []
    assert [progress.step for progress in one.run(until=3)] == [0, 1, 2]
    assert [progress.step for progress in one.run()] == list(range(3, 10))


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    list(trainer(tmp_path).run())
    again = trainer(tmp_path)
    before = {name: value.clone() for name, value in everything(again).items()}
    assert list(again.run()) == []
    assert all(torch.equal(before[name], value) for name, value in everything(again).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_are_decayed_and_vectors_are_not(tmp_path: Path, optimizer: str) -> None:
    one = trainer(tmp_path, replace(CONFIG, weight_decay=0.3, optimizer=optimizer))
    groups = [group for optimizer in one.optimizers for group in optimizer.param_groups]
    assert {(group["weight_decay"], p.ndim) for group in groups for p in group["params"]} == {(0.3, 2), (0.0, 1)}


def test_muon_takes_what_lies_between_the_ends_and_adamw_all_else(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("conv_in", "hidden", "conv_out")})
    adamw, muon = Trainer(model, loss_of, replace(CONFIG, optimizer="muon"), tmp_path).optimizers
    taken = {id(p): kind for kind, o in (("adamw", adamw), ("muon", muon)) for g in o.param_groups for p in g["params"]}
    assert {name: taken[id(p)] for name, p in model.named_parameters()} == {
        "conv_in.weight": "adamw",
        "conv_in.bias": "adamw",
        "hidden.weight": "muon",
        "hidden.bias": "adamw",
        "conv_out.weight": "adamw",
        "conv_out.bias": "adamw",
    }


def test_a_loss_that_is_no_number_stops_the_run_and_says_when(tmp_path: Path) -> None:
    def loss(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        return {"bad": loss_of(model, phase, step, generator)["copy"] * (float("nan") if step == 2 else 1)}

    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        list(Trainer(network(), loss, CONFIG, tmp_path).run())


def test_a_broken_snapshot_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"half of it")
    with pytest.raises(CheckpointError, match=r"state\.pt is not a readable training snapshot"):
        trainer(tmp_path)


def half_frozen() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


def test_a_snapshot_leaves_out_what_is_frozen(tmp_path: Path) -> None:
    list(Trainer(half_frozen(), loss_of, CONFIG, tmp_path).run(until=2))
    assert set(read_snapshot(tmp_path / "state.pt")["model"]) == {"2.weight", "2.bias"}
    again = Trainer(half_frozen(), loss_of, CONFIG, tmp_path)
    assert again.step == 2
    assert not torch.equal(again.model[2].weight, half_frozen()[2].weight)  # type: ignore[index]


def test_a_snapshot_of_another_network_is_refused(tmp_path: Path) -> None:
    list(trainer(tmp_path).run(until=1))
    with pytest.raises(
        CheckpointError, match=r"state\.pt is of another network: it holds 0\.bias, 0\.weight, or lacks"
    ):
        Trainer(half_frozen(), loss_of, CONFIG, tmp_path)


def test_moments_of_eight_bits_are_bitsandbytes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ImportError, match=r"needs bitsandbytes, which is not installed: pip install 'floyd-if\[8bit\]'"
    ):
        trainer(tmp_path, config)

    class Eight(torch.optim.AdamW):
        """What bitsandbytes would bring."""

    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = Eight  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    one = trainer(tmp_path, config)
    assert [type(optimizer) for optimizer in one.optimizers] == [Eight]
    before = one.model[0].weight.detach().clone()  # type: ignore[index]
    list(one.run(until=1))
    assert not torch.equal(one.model[0].weight, before)  # type: ignore[index]


def test_bitsandbytes_keeps_moments_of_a_byte_through_a_stop(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def wide() -> nn.Module:  # smaller tensors than 4096 numbers keep float32
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 2048), nn.GELU(), nn.Linear(2048, 4))

    config = replace(CONFIG, optimizer="adamw8bit", precision="fp32")
    whole = Trainer(wide(), loss_of, config, tmp_path / "whole")
    list(whole.run())
    list(Trainer(wide(), loss_of, config, tmp_path / "parts").run(until=5))
    resumed = Trainer(wide(), loss_of, config, tmp_path / "parts")
    list(resumed.run())
    dtypes = {state["state1"].dtype for state in resumed.optimizers[0].state.values()}
    assert torch.uint8 in dtypes
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
