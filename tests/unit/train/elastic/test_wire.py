"""Requests to a service that is killed and started again, and requests that it must refuse."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from luban.core.errors import TrainingError
from luban.train.elastic.wire import Client, OperationFailed, Refused, Server, StaleGeneration


def refuse() -> None:
    raise Refused("no")


def stale() -> None:
    raise StaleGeneration("over")


def fail() -> None:
    raise ValueError("database is full")


OPERATIONS = {"add": lambda a, b: a + b, "refuse": refuse, "stale": stale, "fail": fail}


@pytest.fixture
def address(tmp_path):
    return tmp_path / "address.json"


def test_operations_are_called_by_name(address):
    server = Server(OPERATIONS, address).start()
    client = Client(address, patience=5)
    assert client("add", a=2, b=3) == 5 and client("add", a=[1], b=["é"]) == [1, "é"]
    with pytest.raises(Refused, match="no"):
        client("refuse")
    with pytest.raises(StaleGeneration, match="over"):
        client("stale")
    with pytest.raises(Refused, match="no operation 'subtract'"):
        client("subtract")
    with pytest.raises(OperationFailed, match="ValueError: database is full"):
        client("fail")
    with pytest.raises(OperationFailed, match="TypeError"):
        client("add", a=1)
    assert client("add", a=1, b=1) == 2
    client.close()
    server.stop()


def test_a_client_waits_for_a_service_that_comes_back(address):
    server = Server(OPERATIONS, address).start()
    client = Client(address, patience=20)
    assert client("add", a=1, b=1) == 2
    server.stop()
    client.close()
    started = []
    later = threading.Timer(0.2, lambda: started.append(Server(OPERATIONS, address).start()))
    later.start()
    assert client("add", a=1, b=2) == 3
    later.join()
    client.close()
    started[0].stop()


def test_a_service_that_stays_away_is_named(address):
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"address.json\) has not answered for 0 seconds"):
        Client(address, patience=0.1)("add", a=1, b=1)
    assert time.monotonic() - began < 5


def test_another_runs_token_and_noise_are_refused(address):
    server = Server(OPERATIONS, address).start()
    where = json.loads(address.read_text())
    for line in (
        b"\n",
        b"{}\n",
        b"GET / HTTP/1.1\r\n\r\n",
        json.dumps({"token": "x", "operation": "add"}).encode() + b"\n",
    ):
        with socket.create_connection((where["host"], where["port"]), timeout=5) as connection:
            connection.sendall(line)
            answer = connection.makefile().readline()
            assert "result" not in answer
    client = Client(address, patience=5)
    assert client("add", a=1, b=1) == 2
    client.close()
    server.stop()
