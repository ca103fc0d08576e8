from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from floyd.apps import cli
from floyd.store.imports import without_collecting


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def generation_of(it: object) -> int | None:
    return next((i for i in range(3) if any(other is it for other in gc.get_objects(i))), None)


def test_garbage_is_not_searched_for_within_and_is_after() -> None:
    with without_collecting():
        assert not gc.isenabled()
        with without_collecting():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_within_does_not_end_the_search_for_good() -> None:
    with pytest.raises(KeyError), without_collecting():
        raise KeyError
    assert gc.isenabled()


def test_a_search_that_was_off_stays_off() -> None:
    gc.disable()
    with without_collecting():
        pass
    assert not gc.isenabled()


def test_what_was_made_within_counts_as_old() -> None:
    with without_collecting():
        made: list[Any] = [[]]
    assert generation_of(made) == 2
    assert gc.get_freeze_count() == 0


def test_garbage_that_was_made_within_is_found_by_a_full_search() -> None:
    with without_collecting():

        class Cycle:
            def __init__(self) -> None:
                self.own = self

        Cycle()
    assert any(type(it) is Cycle for it in gc.get_objects())
    gc.collect()
    assert not any(type(it) is Cycle for it in gc.get_objects())


def test_what_others_have_set_aside_stays_so() -> None:
    theirs: list[Any] = [[]]
    gc.freeze()
    frozen = gc.get_freeze_count()
    with without_collecting():
        pass
    assert gc.get_freeze_count() == frozen
    assert generation_of(theirs) is None


def test_the_first_step_of_the_built_in_stage_imports_no_more_than_it_needs() -> None:
    """transformers, and what torch brings to compile, take longer to import than all the rest."""
    script = """if True:
        import sys
        from importlib.resources import files
        from floyd import IFPipeline
        pipe = IFPipeline.from_pretrained(str(files("floyd") / "mini" / "stage_1"))
        pipe("a red circle", num_inference_steps=1, output_type="pt")
        heavy = ("transformers", "torch._dynamo", "torch.distributed.tensor", "sympy", "huggingface_hub", "peft")
        print([name for name in heavy if name in sys.modules])
        """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_ends_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end: list[Any] = []
    monkeypatch.setattr(cli.atexit, "register", at_the_end.append)
    monkeypatch.setattr("sys.argv", ["floyd", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert at_the_end == [gc.freeze]
