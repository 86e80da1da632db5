"""What several tests of training stand on."""

import pytest

from lofit_fast.training.engine import compiled_layers


@pytest.fixture
def quick_compiler(monkeypatch, dynamo):
    """Dynamo and AOT autograd without Inductor: the same graphs and guards, no C++ compiler."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
