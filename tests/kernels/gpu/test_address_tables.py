"""Tables of addresses: made once, followed when tensors move, and never taken from a CUDA graph."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import lofit_fast as lf
from benchmarks.proof.host_cost import on_a_gpus_path
from lofit_kernels.gpu import address_tables
from lofit_kernels.gpu.address_tables import TABLES, AddressTables
from tests.tiny_models import tiny_model, tokens

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class OnDevice:
    """A table that says to be on a GPU."""

    def __init__(self, numbers):
        self.numbers, self.is_cuda, self.device, self.streams = tuple(numbers), True, CUDA, []

    def view(self, *size):
        return self

    def record_stream(self, stream):
        self.streams.append(stream)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU whose current stream is captured where `capturing` is set."""
    state = SimpleNamespace(capturing=False, made=0)

    def tensor(numbers, dtype, device):
        state.made += 1
        return OnDevice(numbers)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(address_tables.torch, "tensor", tensor)
    return state


def test_a_table_is_made_once():
    tables = AddressTables()
    first = tables.table((1, 2, 3, 4), 2, CPU)
    assert first.tolist() == [[1, 2], [3, 4]] and first.dtype == torch.int64
    assert tables.table((1, 2, 3, 4), 2, CPU) is first
    assert tables.table((1, 2, 3, 4), 4, CPU).tolist() == [[1, 2, 3, 4]]
    assert tables.table((5,), 2, CPU, lambda: [6, 7]).tolist() == [[6, 7]]
    assert tables.made == 3


def test_the_least_recently_used_go_first():
    tables = AddressTables(limit=2)
    first = tables.table((1,), 1, CPU)
    tables.table((2,), 1, CPU)
    tables.table((1,), 1, CPU)
    tables.table((3,), 1, CPU)
    assert tables.table((1,), 1, CPU) is first and tables.made == 3
    tables.table((2,), 1, CPU)
    assert tables.made == 4


def test_a_table_that_a_graph_holds_outlives_all_others(gpu):
    tables = AddressTables(limit=1)
    held = tables.table((1,), 1, CUDA)
    gpu.capturing = True
    assert tables.used(tables.table((1,), 1, CUDA)) is held
    gpu.capturing = False
    for number in range(2, 50):
        tables.table((number,), 1, CUDA)
    assert any(table is held for table in tables._captured.values())
    # what was not captured is only kept from being overwritten while a kernel reads it
    assert tables.used(tables.table((49,), 1, CUDA)).streams == ["stream"] and held.streams == []


def test_nothing_is_copied_during_a_capture(gpu):
    tables = AddressTables()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="run one step, forward and backward, before the capture"):
        tables.table((1,), 1, CUDA)
    assert gpu.made == 0
    gpu.capturing = False
    tables.table((1,), 1, CUDA)
    gpu.capturing = True
    tables.table((1,), 1, CUDA)
    assert gpu.made == 1


@contextlib.contextmanager
def no_tensor_from_the_host():
    """torch.tensor and what copies from the host like it raise: in a capture they would be illegal."""
    real = torch.tensor, torch.as_tensor, torch.from_numpy

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was made from numbers of the host")

    torch.tensor = torch.as_tensor = torch.from_numpy = refuse
    try:
        yield
    finally:
        torch.tensor, torch.as_tensor, torch.from_numpy = real


@pytest.mark.parametrize(
    "config", [{"scale": "all"}, {"offset": [(0, 1), (1, 0), (1, 3)]}, {"offset": "all", "scale": "all"}]
)
def test_a_second_step_makes_no_tensor_from_the_host_and_reads_none(config):
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(**config))
    hidden = torch.randn(1, 5, 64)
    layers = list(handle.layers.values())
    decoder = handle.watches.decoder

    def step():
        handle.watches.fold._begin(decoder, ())
        sum(layer(hidden).sum() for layer in layers).backward()
        handle.watches.fold._end(decoder, (), None)

    with on_a_gpus_path():
        step()
        made = TABLES.made
        with no_tensor_from_the_host(), no_reads():
            step()
        assert TABLES.made == made


@contextlib.contextmanager
def no_reads():
    """Reading a number of a tensor on the host raises: on a GPU it would wait for the device, and end a capture."""
    names = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
    real = {name: getattr(torch.Tensor, name) for name in names}

    def refuse(*args, **kwargs):
        raise AssertionError("a number of a tensor was read on the host")

    for name in names:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(torch.Tensor, name, method)


def test_tables_follow_tensors_that_move():
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    decoder = handle.watches.decoder

    def begin():
        handle.watches.fold._begin(decoder, ())
        return handle.watches.fold._fold._known.table

    def addresses(table):
        return {number for row in table.numbers.tolist() for number in (row[0], row[2], row[3])}

    def expected():
        layers = handle.layers.values()
        return {t.data_ptr() for layer in layers for t in (layer.weight, layer.offset, layer.offset_heads)}

    with on_a_gpus_path():
        assert addresses(begin()) == expected()
        # what was there stays allocated, so that nothing is put where it was
        kept = [p.data for p in model.parameters()]
        model.bfloat16()
        assert addresses(begin()) == expected()
        model.float()
        assert addresses(begin()) == expected() and kept
        handle.layers[1].offset.data = handle.layers[1].offset.data.clone()
        assert addresses(begin()) == expected()


def test_a_step_under_fake_capture_raises_only_before_the_first_step(monkeypatch):
    # numbers of the kernels are not looked at here: only what is asked of tables
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    with on_a_gpus_path():
        model(tokens()).logits.sum().backward()
        made = TABLES.made
        model(tokens()).logits.sum().backward()
        assert TABLES.made == made
    assert handle.watches.fold._fold._known.backend == "triton"
