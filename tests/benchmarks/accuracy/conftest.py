"""Reports without the seconds that their pictures take."""

import pytest


@pytest.fixture
def unsaved_pictures(monkeypatch):
    """Draw the pictures of a report and write none of them."""
    monkeypatch.setattr("benchmarks.accuracy.figures.save", lambda figure, path: None)
