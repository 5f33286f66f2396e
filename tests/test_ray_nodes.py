"""Waiting for a cluster that does not come; tests/faults/test_real_schedulers.py has a real one."""

from __future__ import annotations

import socket

import pytest

from jobs import nodes
from pipeline.errors import ResourceError, StoppedError


def nothing() -> None:
    """Nobody asks to stop."""


def test_a_cluster_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the address: the wait ends with both numbers."""
    monkeypatch.setattr(nodes, "LIMIT", 0.1)
    monkeypatch.setattr(nodes, "_POLL", 0.1)
    with pytest.raises(ResourceError, match="0 of 2 nodes have joined"):
        nodes.await_nodes("127.0.0.1:1", 2, nothing)


@pytest.mark.parametrize("address", ["auto", "head", "ray://head:10001"])
def test_an_address_that_cannot_be_asked(address: str) -> None:
    """Ten minutes would not make it one."""
    with pytest.raises(ResourceError, match="needs the head's address as host:port"):
        nodes.await_nodes(address, 2, nothing)


def test_a_stop_ends_the_wait() -> None:
    """A stop file is looked at between two tries."""

    def check() -> None:
        raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        nodes.await_nodes("127.0.0.1:1", 2, check)


def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would try for minutes, deaf to every signal: a sentence comes before it is asked."""
    monkeypatch.setattr(nodes, "HEAD_LIMIT", 0.1)
    for address in ("127.0.0.1:1", "head..example:1", "x" * 64 + ":1", "head:\u00b2"):
        with pytest.raises(ResourceError, match=r"Ray cluster at .*: nobody listens") as caught:
            nodes.await_head(address, nothing)
        assert address in str(caught.value)
    with pytest.raises(StoppedError):
        nodes.await_head("127.0.0.1:1", _stop)


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001"])
def test_an_address_that_only_ray_understands(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """It is left to Ray."""
    asked: list[str] = []
    monkeypatch.setattr(nodes, "_is_open", asked.append)
    monkeypatch.setattr(nodes, "HEAD_LIMIT", 0.1)
    nodes.await_head(address, nothing)
    assert asked == []


def test_somebody_listens() -> None:
    """Then nothing is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nodes.await_head(f"127.0.0.1:{server.getsockname()[1]}", _stop)


def _stop() -> None:
    raise StoppedError("stopped")
