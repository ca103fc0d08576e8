from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.hub_stub import Fault, Hub, digest

from floyd.errors import DownloadError
from floyd.store.transfer import Blob, Patience, StoppedError, Watch, carry, locked, part_of, patiently

CONTENT = bytes(range(256)) * 40
NAME = "unet/model.safetensors"
ONCE = Patience(retries=0)
STUBBORN = Patience(retries=2, first_s=1.0, most_s=8.0)


class Clock(threading.Event):
    """An event that notes how long it was waited for, and takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return self.is_set()


class Case:
    """A file on the hub, and what is told about its way here."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        from huggingface_hub import hf_hub_url

        hub.repositories["org/name"] = {NAME: CONTENT}
        self.hub, self.folder = hub, folder
        self.blob = Blob(f"org/name/{NAME}", hf_hub_url("org/name", NAME), digest(NAME, CONTENT), len(CONTENT))
        self.clock, self.notes, self.bytes = Clock(), list[str](), list[int]()
        self.watch = Watch(self.bytes.append, self.notes.append, self.clock)

    @property
    def part(self) -> Path:
        return part_of(self.blob.digest, self.folder)

    def carry(self, patience: Patience = STUBBORN, **headers: str) -> bytes:
        return carry(self.blob, self.folder, headers=headers, patience=patience, watch=self.watch).read_bytes()

    def fails(self, *faults: Fault) -> None:
        self.hub.faults[NAME] = list(faults)


@pytest.fixture
def case(hub: Hub, tmp_path: Path) -> Case:
    (tmp_path / "blobs").mkdir()
    return Case(hub, tmp_path / "blobs")


def test_a_file_arrives_under_its_hash_and_every_byte_is_told(case: Case) -> None:
    assert case.carry() == CONTENT
    assert [path.name for path in case.folder.iterdir()] == [case.blob.digest]
    assert sum(case.bytes) == len(CONTENT)


@pytest.mark.parametrize("promise", [True, False])
def test_a_torn_answer_is_gone_on_with_where_it_broke_off(case: Case, promise: bool) -> None:
    case.fails(Fault(cut_at=4000, promise=promise), Fault(cut_at=9000))
    assert case.carry() == CONTENT
    assert case.hub.ranges == ["bytes=4000-", "bytes=9000-"]
    assert sum(case.bytes) == len(CONTENT)
    assert case.notes[0] == "the connection broke off; trying again in 1 s (1 of 2)"


def test_what_came_is_kept_and_the_next_call_goes_on(case: Case) -> None:
    case.fails(Fault(cut_at=4000))
    with pytest.raises(Exception, match=r"peer closed|incomplete"):
        case.carry(ONCE)
    assert case.part.read_bytes() == CONTENT[:4000]
    case.bytes.clear()
    assert case.carry(ONCE) == CONTENT
    assert case.hub.ranges == ["bytes=4000-"]
    assert sum(case.bytes) == len(CONTENT) - 4000


def test_each_new_byte_renews_the_patience(case: Case) -> None:
    case.fails(*(Fault(cut_at=cut) for cut in range(1000, 9000, 1000)))
    assert case.carry(Patience(retries=1, first_s=1.0)) == CONTENT
    assert case.clock.waits == [1.0] * 8


def test_waits_grow_and_end(case: Case) -> None:
    case.fails(*[Fault(503)] * 9)
    with pytest.raises(Exception, match="503"):
        case.carry(Patience(retries=5, first_s=1.0, most_s=8.0))
    assert case.clock.waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert case.notes[-1] == "the hub answered HTTP 503; trying again in 8 s (5 of 5)"


@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=7'}])
def test_a_hub_that_asks_for_time_gets_it(case: Case, headers: dict[str, str]) -> None:
    case.fails(Fault(429, headers), Fault(429, headers))
    assert case.carry() == CONTENT
    assert case.clock.waits == [7.0, 7.0]


def test_a_hub_that_asks_for_too_much_time_ends_it(case: Case) -> None:
    case.fails(Fault(429, {"Retry-After": "3600"}))
    with pytest.raises(Exception, match="429"):
        case.carry()
    assert case.clock.waits == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416])
def test_what_will_not_pass_is_not_tried_again(case: Case, status: int) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    case.fails(Fault(status))
    with pytest.raises(HfHubHTTPError) as caught:
        case.carry()
    assert caught.value.response.status_code == status
    assert case.clock.waits == []


def test_a_hub_without_ranges_starts_over(case: Case) -> None:
    case.hub.knows_ranges = False
    case.part.write_bytes(CONTENT[:4000])
    assert case.carry() == CONTENT
    assert sum(case.bytes) == len(CONTENT) - 4000


def test_a_part_that_is_too_long_starts_over(case: Case) -> None:
    case.part.write_bytes(CONTENT + b"more")
    assert case.carry() == CONTENT
    assert case.hub.ranges == []


def test_a_part_that_is_whole_is_not_fetched_again(case: Case) -> None:
    case.part.write_bytes(CONTENT)
    assert case.carry() == CONTENT
    assert case.hub.fetched == []


@pytest.mark.parametrize("content", [bytes(len(CONTENT)), CONTENT + b"more", CONTENT * 100])
def test_a_damaged_file_is_deleted(case: Case, content: bytes) -> None:
    case.fails(Fault(content=content))
    with pytest.raises(DownloadError, match=f"org/name/{NAME} arrived damaged and was deleted: run the same again"):
        case.carry()
    assert list(case.folder.iterdir()) == []
    assert sum(case.bytes) == 0


def test_a_small_file_is_checked_as_git_does(case: Case) -> None:
    from huggingface_hub import hf_hub_url

    case.hub.repositories["org/name"]["config.json"] = b"{}"
    case.blob = Blob("config.json", hf_hub_url("org/name", "config.json"), digest("config.json", b"{}"), 2)
    assert case.blob.digest == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # echo -n '{}' | git hash-object --stdin
    assert case.carry() == b"{}"


def test_the_token_stays_with_the_hub_when_the_file_lies_elsewhere(case: Case) -> None:
    case.hub.uses_cdn = True
    case.fails(Fault(cut_at=4000))
    assert case.carry(Authorization="Bearer hf_secret") == CONTENT
    assert case.hub.tokens == ["Bearer hf_secret"] * 2
    assert case.hub.cdn_tokens == ["", ""]
    assert case.hub.ranges == ["bytes=4000-"]


def test_it_can_be_stopped_amid_a_file_and_amid_a_wait(case: Case) -> None:
    case.fails(Fault(503))
    case.clock.set()
    with pytest.raises(StoppedError):
        case.carry()  # the wait
    with pytest.raises(StoppedError):
        case.carry()  # the file
    case.clock.clear()
    assert case.carry() == CONTENT


def test_a_full_disk_is_not_tried_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *args, **options: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        case.carry()
    assert case.clock.waits == []


def test_asking_is_patient_with_a_hub_that_answers_and_not_with_none(case: Case) -> None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def ask(url: str = case.blob.url) -> Any:
        answer = get_session().get(url)
        hf_raise_for_status(answer)
        return answer

    case.fails(Fault(500), Fault(429, {"Retry-After": "3"}))
    assert patiently(ask, STUBBORN, case.watch).content == CONTENT
    assert case.clock.waits == [1.0, 3.0]
    case.fails(*[Fault(500)] * 3)
    with pytest.raises(HfHubHTTPError, match="500"):
        patiently(ask, STUBBORN, case.watch)
    case.clock.waits.clear()
    with pytest.raises(Exception, match="refused"):
        patiently(lambda: ask("http://127.0.0.1:1"), STUBBORN, case.watch)
    assert case.clock.waits == []


def test_two_of_us_take_turns(case: Case, tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "a.lock", case.watch):
            order.append("second")

    with locked(tmp_path / "a.lock", case.watch):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.7)
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "another process is fetching" in case.notes[0]


def test_who_waits_for_a_turn_can_be_stopped(case: Case, tmp_path: Path) -> None:
    case.clock.set()
    with (
        locked(tmp_path / "a.lock", case.watch),
        pytest.raises(StoppedError),
        locked(tmp_path / "a.lock", case.watch),
    ):
        pytest.fail("two have the lock")
