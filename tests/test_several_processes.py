"""Functions in forked processes of one group: what a process that dies leaves, and what it leaves alone."""

import ctypes
import gc
import os
import sys
import time

import pytest
import torch
from torch import distributed

from tests.several_processes import RanksError, in_processes


class Held:
    """What says that it was let go of. Two of them hold each other, so that only a collection finds them."""

    def __init__(self, gone):
        self.gone, self.other = gone, None

    def __del__(self):
        self.gone.append(os.getpid())


def test_a_process_that_c_ends_has_its_last_words_in_the_error(capsys):
    """As gloo ends one whose message has another size than is waited for."""

    def work(rank):
        if rank == 1:
            os.write(2, b"what(): no such message\n")
            print("said by Python", file=sys.stderr)
            ctypes.CDLL(None).abort()

    with pytest.raises(RanksError) as found:
        in_processes(2, work)
    said = str(found.value)
    assert "rank 0" not in said and said.startswith("rank 1: ended with status -6\nwhat(): no such message\n")
    # C++'s frames and Python's, without the modules
    assert "frame #0: " in said and "Fatal Python error: Aborted" in said
    assert " in work\n" in said and "Extension modules" not in said
    assert "what(): no such message\n" in capsys.readouterr().err


def test_of_long_last_words_the_beginning_and_the_end_are_kept():
    def work(rank):
        os.write(2, b"first" + b"." * 50_000 + b"last\n")
        os._exit(3)

    with pytest.raises(RanksError) as found:
        in_processes(1, work)
    said = str(found.value)
    assert said.startswith("rank 0: ended with status 3\nfirst..") and said.endswith("..last") and len(said) < 20_000


def test_one_that_takes_too_long_says_where_it_is():
    def work(rank):
        while True:
            time.sleep(0.01)

    with pytest.raises(RanksError) as found:
        in_processes(1, work, limit=1.0)
    said = str(found.value)
    assert said.startswith("rank 0: ended with a kill after 1 s\n") and " in work\n" in said


def test_what_is_written_by_one_that_returns_is_no_error(capsys):
    assert in_processes(1, lambda rank: os.write(2, b"a warning\n")) == [10]
    assert capsys.readouterr().err == "a warning\n"


def test_a_process_lets_go_of_nothing_that_the_test_has_made(monkeypatch):
    gone = []
    # the first thing that it does of its own
    monkeypatch.setattr(torch, "set_num_threads", lambda n: gc.collect())
    gc.disable()
    try:
        one, other = Held(gone), Held(gone)
        one.other, other.other = other, one
        del one, other
        assert in_processes(1, lambda rank: (gc.collect(), gone)[1]) == [[]]
    finally:
        gc.enable()
    gc.collect()
    # here they are let go of
    assert gone == [os.getpid()] * 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no list of threads on this system")
def test_nothing_is_forked_from_a_process_with_a_group_of_its_own(tmp_path):
    """Whose threads a forked process does not have: it waits for them once it lets go of the group."""

    def work(rank):
        with pytest.raises(RuntimeError, match=r"has, or has left behind, a gloo group.*gloo_tcp_loop"):
            in_processes(1, lambda rank: None)
        left = distributed.group.WORLD
        distributed.destroy_process_group()
        # somebody still holds it
        with pytest.raises(RuntimeError, match="has left behind"):
            in_processes(1, lambda rank: None)
        del left
        return in_processes(1, lambda rank: "alone")

    assert in_processes(1, work) == [["alone"]]
