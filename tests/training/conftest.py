"""What several tests of training stand on."""

import pytest
import torch

from lofit_fast.training import engine as engine_module


@pytest.fixture
def quick_compiler(monkeypatch):
    """Dynamo and AOT autograd without Inductor: the same graphs and guards, no C++ compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(engine_module, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()
