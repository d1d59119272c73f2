"""What is said of a process that is gone: what happened and to which address, not where the library's sources lie."""

from __future__ import annotations

import pytest

from luban.parallel.world import described_loss, is_lost_connection

WHERE = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
ADVICE = " This is typically caused by a remote worker hanging or bugs in the application."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{WHERE}pair.cc:537] Read error [127.0.0.1]:53981: Connection reset by peer.{ADVICE}",
            "has ended: Read error [127.0.0.1]:53981: Connection reset by peer",
        ),
        (
            f"{WHERE}pair.cc:544] Connection closed by peer [127.0.0.1]:7.{ADVICE}",
            "has ended: Connection closed by peer [127.0.0.1]:7",
        ),
        (
            f"{WHERE}unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete",
            "has not answered for 10 minutes, and may hang: Timed out waiting 600000ms for recv operation to complete",
        ),
        ("gloo/transport: something else\nmore", "has ended: gloo/transport: something else"),
    ],
)
def test_a_lost_connection_is_described(text, said):
    error = RuntimeError(text)
    assert is_lost_connection(error)
    assert described_loss(error) == said
