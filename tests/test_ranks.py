"""What the processes of a run say to each other."""

import os
import signal
import socket
import time

import pytest
import torch

from lofit_fast import launchers, ranks, roll_call
from tests.several_processes import RanksError, in_processes


def test_one_process_is_the_first_and_sends_nothing():
    with ranks.together("nothing"):
        assert (ranks.count(), ranks.rank(), ranks.first()) == (1, 0, True)
    assert ranks.gathered("a") == ["a"] and ranks.told(lambda: 3) == 3
    ranks.check_same("a", "letter")


def test_several_hear_each_other():
    def work(rank):
        ranks.check_same("a", "letter")
        made = []
        heard = ranks.told(lambda: made.append(rank) or rank + 5)
        return ranks.count(), ranks.rank(), ranks.first(), ranks.gathered(rank * 10), heard, made

    assert in_processes(3, work) == [(3, r, r == 0, [0, 10, 20], 5, [0] * (r == 0)) for r in range(3)]


def test_what_the_first_raises_all_raise():
    def work(rank):
        with pytest.raises(ValueError, match="no such task"):
            ranks.told(lambda: (_ for _ in ()).throw(ValueError("no such task")))
        return ranks.gathered(rank)

    assert in_processes(2, work) == [[0, 1], [0, 1]]


def test_an_error_in_one_is_an_error_in_all():
    def work(rank):
        try:
            with ranks.together("reading the data"):
                if rank == 1:
                    raise OSError("disk full")
        except Exception as error:
            return type(error).__name__, str(error)

    (kind, said), own = in_processes(2, work)
    assert (kind, said) == ("ElsewhereError", "process 1 of 2 failed in reading the data: OSError: disk full")
    assert own == ("OSError", "disk full")


def test_values_that_differ_are_named():
    def work(rank):
        with pytest.raises(ValueError, match="expected the same seed in every process, got process 0: 1; process 1: 2"):
            ranks.check_same(rank + 1, "seed")

    in_processes(2, work)


def test_a_count_and_a_fraction_differ():
    def work(rank):
        with pytest.raises(ValueError, match="got process 0: 1; process 1: 1.0"):
            ranks.check_same((1, 1.0)[rank], "top")

    in_processes(2, work)


def test_a_killed_process_is_named():
    def work(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RanksError, match="rank 1: ended with status -9"):
        in_processes(2, work)


def test_sums_and_what_the_first_has():
    def work(rank):
        mine = torch.full((2,), float(rank))
        total = ranks.summed(mine)
        ranks.as_first([mine])
        return total.tolist(), mine.tolist()

    assert in_processes(3, work) == [([3.0, 3.0], [0.0, 0.0])] * 3
    alone = torch.ones(2)
    assert ranks.summed(alone) is alone


# as a model that all hold together waits, in each of its forwards
@pytest.mark.parametrize("wait", [lambda x: ranks.summed(x), lambda x: torch.distributed.all_reduce(x)])
def test_one_that_fails_ends_the_others_at_once_and_by_name(monkeypatch, wait):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)

    def work(rank):
        try:
            with ranks.joined("counting"):
                if rank == 2:
                    raise OSError("disk full")
                wait(torch.ones(1))
        except Exception as error:
            # nothing is sent to a group that is none any more, and nobody takes itself for the first
            assert (ranks.count(), ranks.rank()) == (3, rank)
            with pytest.raises(ranks.ElsewhereError, match="start all of them again"):
                ranks.begun()
            return type(error).__name__, str(error)

    *others, own = in_processes(3, work)
    assert own == ("OSError", "disk full")
    assert all(
        kind == "ElsewhereError" and "process 2 failed in counting: OSError: disk full" in s for kind, s in others
    )


def test_where_all_fail_they_stay_a_group():
    def work(rank):
        with pytest.raises(ValueError, match="bad"), ranks.joined("counting"):
            raise ValueError("bad")
        with ranks.joined("counting"):
            return ranks.gathered(rank)

    assert in_processes(2, work) == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_one_that_does_not_answer_is_named_within_the_time_limit(monkeypatch):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)

    def work(rank):
        with pytest.raises(ranks.ElsewhereError) as found, ranks.joined("counting"):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            ranks.gathered(rank)
        return str(found.value)

    began = time.monotonic()
    said, _ = in_processes(2, work, limit=3.0, timeout=0.7, dying={1})
    assert "process 1 (" in said and "has ended or does not answer" in said
    assert time.monotonic() - began < 12


def test_an_error_that_cannot_be_sent_is_sent_as_words():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def work(rank):
        def make():
            raise Odd("this", "that")

        with pytest.raises(RuntimeError, match="Odd: this and that"):
            ranks.told(make)

    in_processes(2, work)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, launchers.Launched(1, 4, 1, 2)),
        ({"RANK": "9", "WORLD_SIZE": "16", "SLURM_LOCALID": "1"}, launchers.Launched(9, 16, 1, 16)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, launchers.Launched(2, 3, 2, 3)),
    ],
)
def test_what_a_launcher_says(monkeypatch, said, found):
    _say(monkeypatch, said)
    assert launchers.launched() == found
    with launchers.unlaunched():
        assert launchers.launched() is None
    assert launchers.launched() == found


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"WORLD_SIZE": "4"}, "this is one of 4 processes (WORLD_SIZE), but not which"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', expected the number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this is process 2 of 2: expected 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT do not say where they meet"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", launchers.TIMEOUT: "soon"}, "'soon'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", launchers.TIMEOUT: "0"}, "above 0"),
    ],
)
def test_what_no_launcher_would_say_is_refused(monkeypatch, said, words):
    _say(monkeypatch, said)
    with pytest.raises(ValueError) as found:
        ranks.begun()
    assert words in str(found.value)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _say(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: the port is in use; choose another"):
            ranks.begun()


def test_others_that_do_not_come_are_waited_for_no_longer_than_the_limit(monkeypatch, capsys):
    monkeypatch.setattr(launchers, "_QUIET", 0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    _say(monkeypatch, said | {launchers.TIMEOUT: "0.005"})
    with pytest.raises(OSError, match=r"process 0 of 2 has not met the others at .* within 0.005 minutes"):
        ranks.begun()
    said = capsys.readouterr().err
    assert f"process 0 of 2 waits at 127.0.0.1:{port} for the others to join, 0.005 minutes at the most" in said


def _say(monkeypatch, said):
    for names in (launchers._RANK, launchers._COUNT, launchers._LOCAL, launchers._LOCAL_COUNT):
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT", launchers.TIMEOUT):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
