from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from tests.hub_stub import Hub

from floyd.errors import DownloadError
from floyd.store.advice import wait_asked_for
from floyd.store.download import plan
from floyd.store.hub import Source
from floyd.store.transfer import Patience

ID = "DeepFloyd/IF-I-XL-v1.0"


def told(model: str = ID, **options: Any) -> str:
    """What a user reads."""
    with pytest.raises(DownloadError) as caught:
        plan(Source(model, **options), patience=Patience(retries=0))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


@pytest.fixture
def gated(hub: Hub) -> Hub:
    """As the real one does: everybody may see the list of files, and not everybody the files."""
    hub.repositories[ID] = {"model_index.json": b"{}"}
    hub.only_files_fail = True
    return hub


def test_who_is_not_logged_in_is_told_how_and_where_the_licence_is(gated: Hub) -> None:
    gated.failure = (401, "GatedRepo")
    text = told()
    assert text.startswith(f"{ID} is gated: log in to http://127.0.0.1:")
    assert f"/{ID} and accept the licence there" in text
    assert all(way in text for way in ("hf auth login", "HF_TOKEN", "token=", "/settings/tokens"))


def test_who_has_a_token_is_told_what_it_lacks(gated: Hub) -> None:
    gated.failure = (403, "GatedRepo")
    gated.failure_headers = {"X-Error-Message": "Access to model is restricted."}
    text = told(token="hf_secret")
    assert "is gated, and your token does not open it" in text
    assert f"/{ID} with the token's account and accept the licence" in text
    assert "fine-grained token" in text
    assert text.endswith("The hub says: Access to model is restricted.")
    assert "hf_secret" not in text


def test_a_token_that_is_no_good_is_told_apart(hub: Hub) -> None:
    hub.failure = (401, "")
    hub.failure_headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    text = told(token="hf_expired")
    assert "does not accept the token (HTTP 401). It is mistyped, expired or revoked" in text
    assert "hf_expired" not in text
    assert "is not open to you (HTTP 401): pass a valid token" in told()


def test_a_token_from_the_environment_counts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failure = (401, "")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept the token" in told()
    assert "Bearer hf_expired" in hub.tokens


def test_a_token_that_is_asked_for_and_absent_is_told(hub: Hub) -> None:
    assert "no token is stored: run `hf auth login`" in told(token=True)


@pytest.mark.parametrize("status", [401, 404])
def test_what_is_not_there_is_told_with_a_guess(hub: Hub, status: int) -> None:
    hub.failure = (status, "RepoNotFound")
    text = told("deepfloyd/IF-I-XL-1.0")
    assert text.startswith("deepfloyd/IF-I-XL-1.0 was not found, or is private: check the name at http")
    assert text.endswith(f"Did you mean {ID}?")
    assert "Did you mean" not in told("somebody/else")


def test_a_revision_that_is_not_there_is_told(hub: Hub) -> None:
    hub.repositories[ID] = {}
    assert "has no revision 'v9': see http" in told(revision="v9")


@pytest.mark.parametrize(
    ("headers", "when"),
    [({}, "in some minutes"), ({"Retry-After": "42"}, "in 42 s"), ({"RateLimit": '"api";r=0;t=55'}, "in 55 s")],
)
def test_a_limit_is_told_with_its_end(hub: Hub, headers: dict[str, str], when: str) -> None:
    hub.failure, hub.failure_headers = (429, ""), headers
    text = told()
    assert f"was asked for too often (HTTP 429): try again {when}; files that came are kept." in text
    assert "Who is logged in may ask more often" in text
    assert "logged in" not in told(token="hf_some")


def test_a_broken_hub_is_told(hub: Hub) -> None:
    hub.failure = (500, "")
    assert "the hub answered HTTP 500: try again later" in told()


def test_no_network_is_told_with_what_bends_the_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert told().endswith("check the network, or give a local folder.")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:1")
    text = told()
    assert text.endswith("Set on this machine: HF_ENDPOINT.")
    assert "password" not in text


def test_a_hub_that_says_nothing_is_not_waited_for_for_ever(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from huggingface_hub import constants

    from floyd.store import hub as store_hub

    monkeypatch.setattr(store_hub, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "Timeout" in told()


@pytest.mark.parametrize("value", ["", "soon", "-1"])
def test_a_wait_that_cannot_be_read_is_none(value: str) -> None:
    assert wait_asked_for(_answered({"retry-after": value})) is None
    assert wait_asked_for(ValueError()) is None


def test_a_wait_may_be_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    wait = wait_asked_for(_answered({"retry-after": later}))
    assert wait is not None
    assert 85 < wait <= 90


def _answered(headers: dict[str, str]) -> Exception:
    error = ValueError("an answer")
    error.response = type("Response", (), {"headers": headers})()  # type: ignore[attr-defined]
    return error
