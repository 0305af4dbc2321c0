"""For all tests: what the environments keep to start quickly is kept in a folder of the test."""

from itertools import count
from pathlib import Path

import matplotlib
import pytest

NUMBERS = count()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """A folder for what fixtures of modules keep."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_configdir())  # what libraries compile, and their fonts, are shared
        patch.setenv("WARP_CACHE_PATH", str(Path.home() / ".cache" / "warp"))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _own_cache(_cache, monkeypatch):
    """A test that draws pictures of its own must not leave them to others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_cache / str(next(NUMBERS))))
