"""Commands as several processes: each divides its work, does it once, or is refused; and speaks once."""

import json
import os
import re
import signal
import socket

import pytest
import typer
from torch.distributed import HashStore

from lofit_fast.cli import app, company, judge_commands
from lofit_fast.cli.command import command
from lofit_fast.cli.company import refused
from tests.cli.calling import as_json, call
from tests.distributed.launches import error_of, launched

pytestmark = pytest.mark.distributed
ON_CPU = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}=", "completion": a * 2}) + "\n" for a in "abcdefghijkl"))
    return str(path)


def test_answers_are_printed_once_in_the_order_of_the_prompts(model):
    asked = ("generate", "--model", model, "--max-new-tokens", "4", *ON_CPU)
    alone = call(*asked, input="ab\n\ncd=\nx\n").stdout
    first, *others = launched(2, *asked, stdin="ab\n\ncd=\nx\n")
    assert (first.code, first.out) == (0, alone) and alone.count("\n") >= 3
    assert [tuple(other) for other in others] == [(0, "", "")]


@pytest.mark.slow
def test_a_task_is_judged_once(model, data):
    asked = ("eval", "--model", model, "--data", data, "--batch-size", "1", *ON_CPU)
    first, second = launched(2, *asked, "--json")
    assert json.loads(first.out) == as_json(*asked) and (second.code, second.out, second.err) == (0, "", "")


@pytest.mark.slow
def test_one_process_does_what_is_not_divided(model):
    asked = ("plan", "--model", model, "--tokens", "64", "--json")

    def before(rank):
        from lofit_fast.models import op_paths

        layers_of = op_paths.layers_of
        op_paths.layers_of = lambda name: (print(rank, os.environ.get("WORLD_SIZE")), layers_of(name))[1]

    first, second = launched(2, *asked, before=before)
    number, report = first.out.split("\n", 1)
    assert number == "0 None" and json.loads(report) == as_json(*asked) and tuple(second) == (0, "", "")


@pytest.mark.parametrize("as_json", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_error_of_all_is_one_line(tmp_path, as_json):
    asked = ("generate", "--model", tmp_path / "none", "--prompt", "a")
    if as_json:
        first, second = launched(2, *asked, "--json")
        assert "is no model folder" in json.loads(first.out)["error"] and (first.code, second.code) == (1, 1)
        assert not second.out
    else:
        assert error_of(launched(2, *asked)) == f"{tmp_path / 'none'} is no model folder: config.json not found"


def test_an_error_of_one_names_it(model):
    def before(rank):
        if rank == 1:
            judge_commands.loaded = lambda *_: (_ for _ in ()).throw(OSError("disk gone"))

    asked = ("generate", "--model", model, "--prompt", "a", *ON_CPU)
    assert error_of(launched(2, *asked, before=before)) == "process 1 of 2: disk gone"


@pytest.mark.slow
def test_an_option_that_is_not_there_is_said_once(model):
    first, second = launched(2, "generate", "--modle", model)
    assert (first.code, second.code) == (2, 2) and "--modle" in first.err and not second.err + second.out


def test_a_command_that_cannot_be_divided_is_refused():
    other = typer.Typer()
    other.callback()(lambda: None)
    command(other, across=refused("one process answers at one port"), name="answer")(_do_nothing)

    def before(rank):
        app.app = other

    message = error_of(launched(2, "answer", before=before))
    assert message == "expected one process for this command, got 2: one process answers at one port"


def _do_nothing():
    """Nothing."""


def test_help_says_what_several_processes_do():
    for name, said in {"train": "divide the work", "merge": "the others wait"}.items():
        assert said in " ".join(call(name, "--help").stdout.split())


@pytest.mark.slow
def test_other_libraries_are_named():
    def before(rank):
        versions = company.shared_versions() | {"torch": f"2.{rank}"}
        company.shared_versions = lambda: versions

    message = error_of(launched(2, "plan", "--model", "x", "--tokens", "1", before=before))
    host = socket.gethostname()
    assert message.startswith("expected the same libraries in every process")
    assert f"process 0 on {host} has torch 2.0, process 1 on {host} has torch 2.1" in message


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_PORT": None}, "this is process 0 of 2, but MASTER_PORT"),
        ({"RANK": None}, "one of 2 processes (WORLD_SIZE), but not which (RANK)"),
        ({"RANK": "7"}, "process 7 of 2: expected 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_an_environment_in_part_is_refused(monkeypatch, variables, said):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | variables
    for name, value in given.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(said)):
        company.Company().meet(company.FIRST)


@pytest.mark.slow
def test_who_does_not_join_is_named():
    asked = ("plan", "--model", "x", "--tokens", "1")
    first, second = launched(3, *asked, ranks=[0, 2], LOFIT_FAST_TIMEOUT_MINUTES=0.02)
    assert (first.code, second.code) == (1, 1)
    assert "process 1 of 3 has not joined within 1.2 s (LOFIT_FAST_TIMEOUT_MINUTES)" in first.err + second.err
    (alone,) = launched(2, *asked, ranks=[1], LOFIT_FAST_TIMEOUT_MINUTES=0.02)
    assert alone.code == 1 and "process 0 of 2 has not joined: nobody answers at 127.0.0.1:" in alone.err


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (first,) = launched(2, "plan", "--model", "x", "--tokens", "1", ranks=[0], MASTER_PORT=port)
    assert first.code == 1 and f"another program uses 127.0.0.1:{port}: expected a free port" in first.err


def test_two_launches_at_one_port_do_not_mix():
    found = company.Launched(1, 2, 1, 2)
    store = HashStore()
    company._take_place(found, store, company._introduction())
    with pytest.raises(ValueError, match=f"process 1 of 2 has joined already: it is process {os.getpid()} on"):
        company._take_place(found, store, company._introduction() | {"process": 1})


@pytest.mark.slow
def test_the_first_is_missed_by_those_that_wait_for_it():
    def before(rank):
        from lofit_fast.models import op_paths

        op_paths.layers_of = lambda name: os.kill(os.getpid(), signal.SIGKILL)

    first, second = launched(2, "plan", "--model", "x", "--tokens", "1", before=before)
    assert (first.code, second.code) == (-signal.SIGKILL, 1)
    # before it has heard of it, or after
    assert second.err.splitlines()[-1].startswith("error: process 0 of 2 has ended w")


@pytest.mark.slow
def test_more_processes_than_examples_are_refused(model, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"prompt": "a=", "completion": "b"}\n' * 2)
    asked = ("train", "--model", model, "--data", tmp_path / "few.jsonl", "--top", "2", *ON_CPU)
    message = error_of(launched(3, *asked, "--batch-size", "3", "-o", tmp_path / "run"))
    assert "3 processes" in message and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(model):
    def before(rank):
        if rank == 1:
            judge_commands.loaded = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    asked = ("generate", "--model", model, "--prompt", "a", *ON_CPU)
    first, second = launched(2, *asked, before=before)
    assert second.code == -signal.SIGKILL and first.code == 1
    assert "process 1 (" in first.err and "has ended or does not answer" in first.err


def test_processes_of_other_kinds_are_named():
    one = {"host": "a", "versions": {"torch": "2.12"}, "command": ["train"]}
    with pytest.raises(ValueError, match="process 0 on a has torch 2.12, process 1 on b has torch 2.13"):
        company._check_alike([one, {"host": "b", "versions": {"torch": "2.13"}, "command": ["train"]}])
    with pytest.raises(ValueError, match="process 0 on a runs 'train', process 1 on a runs 'eval -m x'"):
        company._check_alike([one, one | {"command": ["eval", "-m", "x"]}])


def test_devices_that_cannot_be_shared_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--device cuda:0 is one device for 2 processes"):
        company._check_devices(company.Launched(0, 2, 0, 2), "cuda:0", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    company._check_devices(company.Launched(1, 3, 1, 3), "auto", lambda own: ["cuda:0", own])
    company._check_devices(company.Launched(2, 3, 2, 3), "cpu", None)
    with pytest.raises(ValueError, match="3 processes for the 2 GPUs of .*: expected --nproc-per-node 2 or fewer"):
        company._check_devices(company.Launched(2, 3, 2, 3), "auto", lambda own: ["cuda:0", "cuda:1", own])


def test_processes_that_each_see_a_device_of_their_own_share_none(monkeypatch):
    store = HashStore()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    both = [company.Company(company.Launched(rank, 2, rank, 2), store, (0, 1)) for rank in range(2)]
    store.set("chip/1", "GPU-b")
    monkeypatch.setattr("lofit_fast.models.device.name_of_chip", lambda device: f"{device} is GPU-a")
    company._check_devices(both[0].launched, "auto", both[0]._chips)
    assert store.get("chip/0") == b"cuda:0 is GPU-a"
    # of one machine with one GPU
    with pytest.raises(ValueError, match="2 processes for the 1 GPUs"):
        company._check_devices(both[1].launched, "auto", both[1]._chips)
