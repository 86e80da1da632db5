"""What several tests of the prefix cache stand on."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
