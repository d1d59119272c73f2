"""A generation's connections are shut down, and nothing else is touched."""

from __future__ import annotations

import fcntl
import socket

import pytest

from luban.train.elastic.link import break_connections


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname(), timeout=5)
        return near, listener.accept()[0]


def test_tcp_connections_end_and_those_to_keep_do_not(tmp_path, monkeypatch):
    (lost, far), (kept, other) = connected(), connected()
    pair = socket.socketpair()  # of this machine, as forked processes use them
    locked = open(tmp_path / "lock", "w")
    fcntl.flock(locked, fcntl.LOCK_EX)
    mine = [each.fileno() for each in (lost, kept, *pair, locked)]
    monkeypatch.setattr(
        "luban.train.elastic.link.os.listdir", lambda folder: list(map(str, mine))
    )  # not the test runner's
    break_connections({kept.fileno()})
    monkeypatch.undo()
    assert far.recv(1) == b""
    with pytest.raises(OSError):
        lost.sendall(b"x")
    kept.sendall(b"k")
    pair[0].sendall(b"p")
    assert other.recv(1) == b"k" and pair[1].recv(1) == b"p"
    locked.close()
    with open(tmp_path / "lock") as again:  # no copy of a descriptor holds it
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for each in (lost, far, kept, other, *pair):
        each.close()
