"""A store that is wanted: used, filled by one process at a time, made anew where it is damaged, never half a one."""

import multiprocessing
import threading
import time
import warnings
from contextlib import contextmanager

import pytest
import torch

from lofit_fast.training.prefix_cache import proven_store
from lofit_fast.training.prefix_cache.proven_store import Unfit, Wanted, proven
from lofit_fast.training.prefix_cache.store import PrefixStore

ROWS = [(1,), (2, 3), (4, 5, 6), (7, 8, 9)]
KEY = "a" * 32


def states_of(batch):
    """(B, S, 4): of every token its number, of padding zero."""
    width = max(map(len, batch))
    return torch.tensor([[[float(i)] * 4 for i in (*row, *[0] * (width - len(row)))] for row in batch])


class Filling:
    """Counts the batches that are computed, and does something before each."""

    def __init__(self, before=lambda: None):
        self.batches, self.before = 0, before

    def __call__(self, rows):
        def compute(batch):
            self.before()
            self.batches += 1
            return states_of(batch)

        return compute


def wanted(root, computing, rows=ROWS, gb=1.0):
    how = {"gb": gb, "computing": computing, "progress": False}
    return Wanted("things", root, KEY, rows, torch.zeros(1, 1, 4), **how)


def right(store):
    same = all(store.find(row).equal(states_of([row])[0]) for row in ROWS if store.find(row) is not None)
    return store if same else "other numbers"


def kept(root, computing=None, **how):
    """The store, which must be whole."""
    store = proven(wanted(root, computing or Filling(), **how), right)
    assert len(store) == len(ROWS)
    return store


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    monkeypatch.setattr(proven_store, "FILL_TOKENS", 3)


def test_a_store_is_filled_once(tmp_path):
    filling = Filling()
    kept(tmp_path, filling)
    assert filling.batches == 4
    kept(tmp_path, filling)
    assert filling.batches == 4


def test_damage_is_said_and_made_anew(tmp_path):
    kept(tmp_path)
    path = tmp_path / KEY / "states.bin"
    content = path.read_bytes()
    # the same numbers in another order: no sum would tell
    path.write_bytes(content[16:32] + content[:16] + content[32:])
    filling = Filling()
    with pytest.warns(UserWarning, match=f"things: {path} is not what was written: 2 of 4 sequences .* made anew"):
        kept(tmp_path, filling)
    assert filling.batches == 4
    assert path.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept(tmp_path)


def test_one_that_the_model_disagrees_with_is_made_anew(tmp_path):
    def other(rows):
        return lambda batch: states_of(batch) + 1

    proven(wanted(tmp_path, other), lambda store: store)
    filling = Filling()
    kept(tmp_path, filling)
    assert filling.batches == 4
    with pytest.raises(Unfit, match="other numbers"):
        proven(wanted(tmp_path / "elsewhere", other), right)
    assert not list((tmp_path / "elsewhere").rglob("index.json"))


def test_any_bound_may_be_asked_for(tmp_path):
    for gb in (1e300, 1e-9 * 9 * 16):
        assert kept(tmp_path, gb=gb).states.shape == (9, 4)
    with pytest.raises(Unfit, match="need 1.44e-07 GB, the bound is 1e-09 GB"):
        proven(wanted(tmp_path, Filling(), gb=1e-9), right)


def test_a_link_in_the_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / KEY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unfit, match="is a link"):
        proven(wanted(tmp_path / "root", Filling()), right)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# in the child: fills, says so after the first batch, and takes as long as the parent wants
def _fill(root, begun, go):
    def before():
        begun.set()
        go.wait(60)

    torch.set_num_threads(1)
    kept(root, Filling(before))


@contextmanager
def another_that_fills(root):
    """(a process that is in the middle of a fill, an event that lets it go on)."""
    # forked, since importing torch anew takes seconds; it computes nothing that needs torch's threads
    context = multiprocessing.get_context("fork")
    begun, go = context.Event(), context.Event()
    process = context.Process(target=_fill, args=(root, begun, go))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        process.start()
    try:
        assert begun.wait(60)
        yield process, go
    finally:
        process.kill()
        process.join()


def later(act, seconds=0.3):
    """Call something from a thread, once the caller has begun to wait."""
    threading.Timer(seconds, act).start()


def test_a_second_process_waits_and_then_reads(tmp_path, caplog):
    filling = Filling()
    with another_that_fills(tmp_path) as (process, go):
        later(go.set)
        kept(tmp_path, filling)
        process.join()
        assert process.exitcode == 0
    assert filling.batches == 0
    (line,) = caplog.messages
    assert line.startswith(f"waiting to fill {tmp_path / KEY}: process {process.pid} on host ")


def test_a_fill_that_is_killed_is_done_anew(tmp_path):
    filling = Filling()
    with another_that_fills(tmp_path) as (process, _):
        assert list((tmp_path / KEY).glob(".lofit-*/states.bin"))
        assert PrefixStore.open(tmp_path / KEY) is None
        later(process.kill)
        kept(tmp_path, filling)
    assert filling.batches == 4
    assert sorted(path.name for path in (tmp_path / KEY).iterdir()) == ["index.json", "states.bin"]
    assert not list(tmp_path.glob("*.owner.json*"))


@pytest.mark.slow
def test_any_number_of_processes_killed_at_any_moment(tmp_path):
    for round_ in range(40):
        with another_that_fills(tmp_path) as (process, go):
            go.set()
            time.sleep(0.0005 * round_)
            process.kill()
            process.join()
        store = kept(tmp_path)
        assert all(store.find(row).equal(states_of([row])[0]) for row in ROWS)
        PrefixStore.discard(tmp_path / KEY)
