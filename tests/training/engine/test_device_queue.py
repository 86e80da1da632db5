"""Where a model computes, and who waits for it: without an accelerator, by stand-ins for torch's own functions."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lofit_fast.training import arguments, trainer
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.cost import peak_memory
from lofit_fast.training.engine import device_queue
from lofit_fast.training.engine.device_queue import Sender, current, devices_of, wait_for
from lofit_fast.training.trainer import AttachmentTraining
from tests.training.small_trainers import scaled, trainer_on

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def on_the_second(monkeypatch):
    """What the current CUDA device is set to, for a model that is on the second."""
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(arguments, "device_of", lambda model: SECOND)
    return made_current


def test_a_model_stays_on_the_second_gpu(on_the_second, llama, tmp_path):
    chosen = training_arguments(llama, tmp_path, Schedule(1e-3, 1), progress=False)
    assert chosen.device == SECOND
    assert chosen.place_model_on_device is False
    assert on_the_second == [SECOND]
    assert (chosen.use_cpu, chosen.logging_nan_inf_filter) == (False, False)


def test_one_process_of_several_goes_where_its_launcher_says(on_the_second, llama, tmp_path, monkeypatch):
    kind = arguments.TrainingArguments
    monkeypatch.setattr(kind, "parallel_mode", property(lambda self: arguments.ParallelMode.DISTRIBUTED))
    chosen = training_arguments(llama, tmp_path, Schedule(1e-3, 1), progress=False)
    assert (chosen.device.type, chosen.place_model_on_device, on_the_second) == ("cpu", None, [])


def test_arguments_on_a_cpu_are_transformers_own(llama, tmp_path):
    chosen = training_arguments(llama, tmp_path, Schedule(1e-3, 1), progress=False)
    assert (chosen.device.type, chosen.use_cpu, chosen.logging_nan_inf_filter) == ("cpu", True, True)
    assert not chosen.dataloader_pin_memory
    assert chosen.place_model_on_device is None


def test_batches_are_pinned_for_an_accelerator_alone(on_the_second, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert [kind for kind in ("cuda", "xpu", "mps", "cpu") if device_queue.pins(torch.device(kind))] == ["cuda", "xpu"]
    assert training_arguments(llama, tmp_path, Schedule(1e-3, 1), progress=False).dataloader_pin_memory
    monkeypatch.setattr(arguments, "device_of", lambda model: torch.device("cpu"))
    assert not training_arguments(llama, tmp_path, Schedule(1e-3, 1), progress=False).dataloader_pin_memory


def test_the_current_device_is_the_models_and_comes_back(monkeypatch):
    now = [0]
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: (now[0], now.__setitem__(0, index))[0])
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: now.__setitem__(0, index))
    with current(SECOND):
        # as transformers does
        now[0] = 0
        device_queue.make_current(torch.device("cpu"))
    assert now == [0]
    with current(SECOND):
        assert now == [1]
    with current(torch.device("cpu")):
        assert now == [0]


def spread_model():
    """Layers on two GPUs, as a device_map lays them."""
    with FakeTensorMode():
        return nn.ParameterList(nn.Parameter(torch.empty(2, device=each)) for each in (SECOND, SECOND, FIRST))


def test_the_devices_of_a_device_map():
    assert devices_of(spread_model()) == [SECOND, FIRST]
    assert devices_of(nn.Linear(2, 2)) == [torch.device("cpu")]


def test_each_device_is_waited_for_and_the_host_is_not(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    wait_for([SECOND, torch.device("cpu"), FIRST])
    assert waited == [SECOND, FIRST]


def test_an_epochs_clock_is_read_when_the_device_is_done(tmp_path, monkeypatch):
    said, history = [], []
    monkeypatch.setattr(trainer, "wait_for", lambda devices: said.append(("wait", [d.type for d in devices])))
    clock = SimpleNamespace(perf_counter=lambda: said.append("clock") or 0.0)
    monkeypatch.setattr(trainer, "time", clock)
    trainer_on(scaled(), tmp_path, history=history, num_train_epochs=2).train()
    assert said == [("wait", ["cpu"]), "clock"] * 4
    assert len(history) == 2


def test_peak_memory_is_of_all_the_models_devices(monkeypatch):
    held = {FIRST: [10, 50], SECOND: [20, 90]}
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[device][0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[device][1])
    with peak_memory(SECOND, FIRST) as memory:
        pass
    assert (memory.peak_bytes, reset) == (110, [SECOND, FIRST])


def test_the_l1_term_of_layers_on_two_devices():
    handle = scaled()
    expected = 0.5 * sum(layer.scale.abs().sum() for layer in handle.layers.values())
    training = SimpleNamespace(handle=handle, l1=0.5, args=SimpleNamespace(device=torch.device("cpu")))
    torch.testing.assert_close(AttachmentTraining.l1_term(training), expected)
    # the last layer elsewhere
    layers = {**handle.layers, 2: SimpleNamespace(scale=nn.Parameter(torch.zeros(4, 16, device="meta")))}
    training.handle = SimpleNamespace(layers=dict(reversed(layers.items())))
    assert AttachmentTraining.l1_term(training).device.type == "meta"


class FakeStream:
    """A stream that says what it is asked."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.said.append(f"on {self.name}")

    def __exit__(self, *error):
        self.said.append(f"off {self.name}")


def test_batches_are_copied_beside_the_step_before(monkeypatch):
    said = []
    copies, work = FakeStream("copies", said), FakeStream("work", said)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: said.append(f"kept for {stream.name}"))
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: said.append((device, non_blocking)) or self
    )
    batch = {"input_ids": torch.ones(1, 2), "use_cache": False, "prefix_states": torch.ones(1, 2, 3)}
    (sent,) = Sender(SECOND).send([batch])
    assert sent.keys() == batch.keys()
    copy = (SECOND, True)
    assert said == ["on copies", copy, copy, "off copies", "work waits for copies", "kept for work", "kept for work"]


def test_copies_to_apples_devices_are_waited_for():
    assert [Sender(torch.device(kind)).beside for kind in ("mps", "meta")] == [False, True]


def test_what_the_host_has_counted_is_pinned_first(monkeypatch):
    said = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: said.append("pinned") or self)
    sender = Sender(torch.device("meta"))
    sender.pins = True
    assert sender.count(torch.tensor(5)).device.type == "meta"
    assert (sender.count(7), sender.count(None), said) == (7, None, ["pinned"])


def test_a_model_that_is_trained_on_a_cpu_needs_no_sender(tmp_path):
    assert trainer_on(scaled(), tmp_path).sender is None
