from __future__ import annotations

from threading import Thread

import pytest

from floyd.adapters.calls import CallScaled, call_scale


def test_a_strength_is_multiplied_within_the_block_alone() -> None:
    strengths = CallScaled(one=0.5)
    with call_scale(3.0):
        assert strengths["one"] == 1.5
        with call_scale(0.0):
            assert strengths["one"] == 0.0
        assert strengths["one"] == 1.5
    assert strengths["one"] == 0.5


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(RuntimeError), call_scale(3.0):
        raise RuntimeError
    assert CallScaled(one=0.5)["one"] == 0.5


def test_another_thread_sees_nothing_of_it() -> None:
    strengths, seen = CallScaled(one=0.5), []
    with call_scale(3.0):
        thread = Thread(target=lambda: seen.append(strengths["one"]))
        thread.start()
        thread.join()
    assert seen == [0.5]
