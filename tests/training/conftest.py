"""What several tests of training stand on."""

import pytest

from lofit_fast.training.engine import compiled_layers


@pytest.fixture
def quick_compiler(monkeypatch, dynamo):
    """Dynamo and AOT autograd without Inductor: the same graphs and guards, no C++ compiler."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")


@pytest.fixture(autouse=True, scope="package")
def prompts_of_tests(tmp_path_factory):
    """What trainings keep of prompts stays among the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOFIT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
