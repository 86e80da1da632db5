"""What several tests of training stand on."""

import pytest

from lofit_fast.training import engine as engine_module


@pytest.fixture
def quick_compiler(monkeypatch, dynamo):
    """Dynamo and AOT autograd without Inductor: the same graphs and guards, no C++ compiler."""
    monkeypatch.setattr(engine_module, "BACKEND", "aot_eager")
