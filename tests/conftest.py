"""Set-up shared by all tests: Triton's interpreter where there is no GPU, quiet libraries, tiny models."""

import gc
import os
import sys

import torch

# must be set before triton.language is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# tiny tensors gain nothing from threads, and lose much to them where cores are shared
torch.set_num_threads(1)

import pytest  # noqa: E402

from lofit_fast.models.load import ALIASES, smollm2_file  # noqa: E402
from lofit_kernels.dispatch import use_answers  # noqa: E402
from tests.tiny_models import FAMILIES, tiny_model  # noqa: E402


def pytest_collection_finish(session):
    """Leave what was imported out of every later garbage collection, of which training makes several a run."""
    # only where kernels are interpreted is it imported
    if "triton.runtime.interpreter" in sys.modules:
        from tests import quick_interpreter

        quick_interpreter.install()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests of files that fork several processes of one group."""
    for item in items:
        if hasattr(getattr(item, "module", None), "in_processes"):
            item.add_marker("distributed")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what runs a real model where that is not installed."""
    if item.get_closest_marker("real") and smollm2_file() is None:
        pytest.skip(f"the packaged model is not installed: {ALIASES['smollm2'].install}")


@pytest.fixture(autouse=True, scope="module")
def imported_by_others():
    """What earlier files have imported and left counts in no later garbage collection either."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def untraced():
    """No coverage meanwhile, for tests that compile what others run: its tracer doubles what the compiler takes.

    pytest-cov's own `no_cover` does not stop the tracer in xdist's processes.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture
def dynamo(untraced):
    """A compiler that has compiled nothing yet: no graph of another test serves this one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def nothing_measured():
    """The default paths, whatever `lofit-fast autotune` has left in the user's cache folder."""
    use_answers(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", {})


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Each model family in turn."""
    return request.param


@pytest.fixture
def llama():
    """A tiny Llama, three layers of four heads."""
    return tiny_model("llama")
