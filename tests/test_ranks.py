"""What the processes of a run say to each other."""

import os
import signal

import pytest

from lofit_fast import ranks
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


def test_a_killed_process_is_named():
    def work(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RanksError, match="rank 1: ended with status -9"):
        in_processes(2, work)
