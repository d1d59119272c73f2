"""What may be said of the sites and names of a server."""

from __future__ import annotations

import pytest

from luban.core.errors import UsageError

pytest.importorskip("starlette")
from luban.serve.api.guard import check_sites


@pytest.mark.parametrize(
    "origin",
    ["notaurl", "chat.example.org", "https://", "https://h.example/", "https://h.example/page", "ftp://h", "*", ""],
)
def test_what_no_browser_sends_as_an_origin_is_refused(origin):
    with pytest.raises(UsageError, match="--cors takes a site as browsers name it"):
        check_sites([origin], [])


@pytest.mark.parametrize("host", ["https://h.example", "h.example:80", "h.example/x", "", "[::1]"])
def test_what_is_no_name_is_refused(host):
    with pytest.raises(UsageError, match="--allowed-host takes a name without a port"):
        check_sites([], [host])


def test_sites_and_names_pass():
    check_sites(["https://chat.example.org", "http://localhost:3000", "http://[::1]:80"], ["Models.example.org", "box"])
