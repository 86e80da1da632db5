"""The memory checker finds what is planted, at its line, and nothing in our kernels."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from tests.proof import planted
from tests.proof.bodies import suites
from tests.proof.watch import Watch, fault

CASES = [
    (family, case)
    for family, modules in suites().items()
    for module in modules
    for case in importlib.import_module(f"tests.proof.{module}").CASES
]
# of each family the case over all its gradients or forms; `make sanitize` runs the others, too
SAMPLE = 1


def cases():
    seen = {}
    for family, case in CASES:
        seen[family] = seen.get(family, 0) + 1
        far = "2^3" in case.name
        marks = [] if far or seen[family] <= SAMPLE else [pytest.mark.slow]
        yield pytest.param(case, id=f"{family}: {case.name}", marks=marks)


@pytest.fixture(autouse=True)
def interpreter(device):
    """These need the interpreter."""
    if device.type != "cpu":
        pytest.skip("the memory checker watches Triton's interpreter")


@pytest.fixture
def device():
    triton = pytest.importorskip("triton")
    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


@pytest.mark.parametrize("case", list(cases()))
def test_our_kernels_are_clean(case):
    case.run()


@pytest.mark.parametrize(
    "kernel, kind",
    [
        (planted._reads_beyond_kernel, "out of bounds"),
        (planted._writes_beyond_kernel, "out of bounds"),
        (planted._two_writers_kernel, "race"),
        (planted._reads_a_neighbour_kernel, "race"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_watch_finds_a_planted_fault_at_its_line(device, kernel, kind):
    with Watch(), fault(kind) as found:
        planted.launch(kernel, device)
    line = planted.planted_line(kernel)
    # a race shows where the second of the two accesses is
    lines = {f"planted.py:{line}", f"planted.py:{line - 1}"} if kind == "race" else {f"planted.py:{line}"}
    assert found[0].where in lines


def test_watch_is_silent_about_a_sound_kernel(device):
    with Watch() as watch:
        assert torch.equal(planted.launch(planted._sound_kernel, device), torch.full((100,), 2.0))
    (launch,) = watch.launches
    assert launch.kernel == "_sound_kernel" and (launch.regions["x"].reads == 1).all()
    # and nothing of it is left behind
    planted.launch(planted._sound_kernel, device)
    assert len(watch.launches) == 1 and torch.empty(3).shape == (3,)


def test_watch_finds_a_forbidden_read(device):
    from lofit_kernels.gpu.affine import affine_fwd

    z, heads = torch.ones(3, 32), torch.tensor([0])
    with Watch() as watch, fault("forbidden"):
        watch.forbid(z, torch.arange(16, 32))
        affine_fwd(z, torch.ones(1, 16), heads, None, None, 16)


def test_watch_finds_an_address_less_aligned_than_promised(device):
    x = torch.ones(100, device=device)
    with Watch():
        planted._promises_kernel[(1,)](x, AHEAD=4)
    with Watch(), fault("promise") as found:
        planted._promises_kernel[(1,)](x, AHEAD=1)
    assert found[0].where == f"planted.py:{planted.planted_line(planted._promises_kernel)}"


def test_fault_expects_one():
    with pytest.raises(AssertionError, match="no fault was found, expected race"), fault("race"):
        pass
    with pytest.raises(ValueError, match="other"), fault("race"):
        raise ValueError("other")
