"""Where machine code is kept."""

import os
import sys
import tempfile

import pytest

from luban.core.errors import MissingExtra
from luban.netsim import compiled


@pytest.fixture
def fresh(monkeypatch):
    """`cache_folder` without what it has found before."""
    compiled.cache_folder.cache_clear()
    yield monkeypatch
    compiled.cache_folder.cache_clear()


def test_the_folder_is_another_for_other_sources_and_old_ones_go(fresh, tmp_path):
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    for i in range(compiled.KEPT + 2):
        old = tmp_path / "luban" / "netsim" / f"old{i}"
        old.mkdir(parents=True)
        os.utime(old, (2**32, 2**32))  # "newer" than the folder that is used
    folder = compiled.cache_folder()
    assert folder is not None and folder.parent == tmp_path / "luban" / "netsim"
    assert len(list(folder.parent.iterdir())) == compiled.KEPT and folder.is_dir()


def test_a_cache_that_cannot_be_written_is_no_failure(fresh, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    fresh.setenv("XDG_CACHE_HOME", str(blocked))
    fresh.setattr(tempfile, "tempdir", str(tmp_path))
    folder = compiled.cache_folder()
    assert folder is not None and folder.is_relative_to(tmp_path)
    compiled.cache_folder.cache_clear()
    fresh.setattr(tempfile, "tempdir", str(blocked))
    assert compiled.cache_folder() is None

    def twice(x):
        return 2 * x

    assert compiled.cached(twice)(4) == 8


def test_without_numba_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "luban.netsim.compiled")
    with pytest.raises(MissingExtra, match=r"pip install 'luban\[plan\]'"):
        import luban.netsim.compiled  # noqa: F401
