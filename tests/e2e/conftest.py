"""A browser for tests of pages; files of such tests skip themselves where there is none."""

from __future__ import annotations

import pytest
from browser import Browser, driver_process


@pytest.fixture(scope="session")
def driver():
    """The address of a running chromedriver."""
    with driver_process() as address:
        yield address


@pytest.fixture
def browser(driver, tmp_path):
    """A browser with a profile of its own."""
    opened = Browser(driver, tmp_path / "profile")
    yield opened
    opened.close()
