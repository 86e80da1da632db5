"""A few trials of every proof of reliability, and that each notices what it should. `make reliability` tries more."""

import errno
import json
import os
import random
from functools import partial
from pathlib import Path

import pytest
import torch

import lofit_fast as lf
from benchmarks.proof.reliability import corrupt_anything, damaged_files, kill_anywhere, killed_works, long_soak
from benchmarks.proof.reliability.file_faults import DIE, KILLED_HERE, FileFaults, OutsideWatch, limit_files
from benchmarks.proof.reliability.forked import forked
from benchmarks.proof.reliability.same_folders import difference, partly_there
from benchmarks.proof.reliability.same_seed import SETTINGS
from benchmarks.proof.reliability.trial_journal import Journal, Proof, Trial, carried_out, record, summary
from lofit_fast.files import write_json
from tests.ordinary_sample import slow_if, some_now

# forks of a process that has done much else take memory and time: a few, small ones
WATCH = OutsideWatch()


def writes(folder: Path) -> None:
    """A work that replaces two files, and goes on with the second where the first is there."""
    if not (folder / "first.json").is_file():
        write_json(folder / "first.json", {"one": 1})
    write_json(folder / "second.json", {"two": 2})


def carelessly(folder: Path) -> None:
    """A work that writes in place, and takes what is there for whole."""
    if not (folder / "first.json").is_file():
        with (folder / "first.json").open("w") as file:
            file.write("{")
            file.flush()
            (folder / "between").mkdir()
            file.write('"one": 1}')


WORKS = {"careful": killed_works.Work(writes), "careless": killed_works.Work(carelessly)}


@pytest.fixture
def small_works(monkeypatch):
    """Works of two files, beside those of the library."""
    for name, work in WORKS.items():
        monkeypatch.setitem(killed_works.WORKS, name, work)


# slow: a careful work killed at every operation
@pytest.mark.parametrize(
    "name, every", [("careless", 1), ("careful", 3), pytest.param("careful", 1, marks=pytest.mark.slow)]
)
def test_kills_at_operations_notice_what_is_not_whole(small_works, tmp_path, name, every):
    whole = kill_anywhere.whole_run(name, tmp_path)
    folder = tmp_path / "trial"
    faults = [partial(FileFaults, folder, at, DIE) for at in range(1, whole.operations + 1, every)]
    found = [kill_anywhere.with_fault(whole, folder, fault) for fault in faults]
    noticed = [words for words in found if words is not None and "not whole" in words]
    assert bool(noticed) == (name == "careless")
    assert name == "careless" or found == [None] * len(found)


def test_kills_at_random_moments(tmp_path):
    whole = kill_anywhere.whole_run("export", tmp_path)
    assert kill_anywhere.at_moments(whole, random.Random(0), tmp_path / "trial") is None


@pytest.mark.parametrize("at", some_now([1, 2, 3, 4], 1, 3))
def test_a_refused_write_is_an_oserror_that_names_its_file(small_works, tmp_path, at):
    whole = kill_anywhere.whole_run("careful", tmp_path)
    fault = partial(FileFaults, tmp_path / "trial", at, errno.ENOSPC, lasting=True)
    assert kill_anywhere.with_fault(whole, tmp_path / "trial", fault) is None


def test_faults_strike_where_they_are_asked_to(tmp_path):
    def counted() -> int:
        faults = FileFaults(tmp_path)
        writes(tmp_path)
        (tmp_path.parent / "elsewhere").write_text("")
        return faults.count

    count = forked(counted).value
    assert count > 4
    assert forked(lambda: (FileFaults(tmp_path, count, DIE), writes(tmp_path))).status in (KILLED_HERE, 0)
    limited = forked(lambda: (limit_files(10, deadly=False), (tmp_path / "big").write_bytes(b"x" * 100)))
    assert "OSError" in limited.raised
    deadly = forked(lambda: (limit_files(10, deadly=True), (tmp_path / "big").write_bytes(b"x" * 100)))
    assert deadly.status < 0
    assert (tmp_path / "big").stat().st_size == 10


def test_a_watch_sees_what_a_link_leads_to(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    (inside / "link").symlink_to(outside)
    with WATCH.inside(inside):
        (inside / "file").write_text("mine")
        assert WATCH.seen == []
        (inside / "link" / "file").write_text("not mine")
    assert WATCH.seen == [f"open {outside / 'file'}"]


# the runs and the caches take longer, and have tests of their own
@pytest.mark.parametrize(
    ("name", "count"),
    slow_if(
        lambda _, count: count > 40,
        [("adapter", 40), ("adapter", 120), ("heads", 40), ("sweep file", 40), ("data", 12), ("data", 60)],
    ),
)
def test_damaged_files_are_refused_or_give_the_same(tmp_path, name, count):
    if name == "data":
        pytest.importorskip("trl", reason="preferences are among the data, and are encoded with TRL, which is missing")
    subject = corrupt_anything.Subject(name, damaged_files.DAMAGED[name], tmp_path, WATCH)
    found = [subject.tried(number, 0) for number in range(count)]
    assert [words for words in found if words is not None] == []


@pytest.mark.slow
def test_a_careless_reader_is_noticed(tmp_path, monkeypatch):
    # what reads a pipe waits for ever
    monkeypatch.setattr(corrupt_anything, "_SECONDS", 0.2)

    def make(folder: Path) -> None:
        (folder / "a.json").write_text('{"numbers": [1, 2, 3], "words": {"a": "b"}}')

    def read(folder: Path) -> object:
        return json.loads((folder / "a.json").read_text())["numbers"]

    damaged = damaged_files.Damaged(make, read, ("a.json",), 1)
    subject = corrupt_anything.Subject("careless", damaged, tmp_path, WATCH)
    found = "\n".join(filter(None, (subject.tried(number, 0) for number in range(150))))
    assert "gives another result in silence" in found
    assert all(words in found for words in ("KeyError", "RecursionError", "a raw JSONDecodeError", "does not end"))


def test_every_setting_of_the_engine_is_run_twice():
    knobs = {name.partition(" ")[0] for name in SETTINGS}
    assert set(lf.Engine.__dataclass_fields__) <= knobs


@pytest.mark.parametrize("iterations", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["patch and unpatch", "saves and loads"])
def test_nothing_is_left_of_a_short_soak(tmp_path, kind, iterations):
    found = long_soak.soaked(kind, iterations, tmp_path / "soak")
    assert all(count <= 0 for count in found["left"].values())


def test_the_slope_is_of_bytes_per_thousand():
    assert long_soak.slope([(at, 500 + 3 * at) for at in range(0, 100, 7)]) == pytest.approx(3000)


def test_a_leak_is_noticed(tmp_path, monkeypatch):
    kept = []

    def leaks(iterations, memory, folder):
        for at in range(iterations):
            kept.append(lf.patch(long_soak.tiny_base(), long_soak.CONFIGS[1]))
            memory.look(at)
        return kept[-1].unpatch()

    monkeypatch.setitem(long_soak.KINDS, "leaks", leaks)
    found = long_soak.soaked("leaks", 6, tmp_path)
    assert found["left"]["handles"] == 6 and found["left"]["layers"] >= 6


def test_a_journal_goes_on(tmp_path):
    ran = []

    def trial(key, outcome):
        return Trial(key, key[0], lambda: ran.append(key) or outcome)

    trials = [trial("a1", None), trial("a2", "wrong"), trial("b1", None)]
    journal = Journal(tmp_path / "j.jsonl")
    assert carried_out(trials[:2], journal, tell=lambda text: None)
    # a line that a kill has cut
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"key": "b1", "ki')
    again = Journal(tmp_path / "j.jsonl")
    assert carried_out(trials, again, tell=lambda text: None)
    assert ran == ["a1", "a2", "b1"]
    row = record(Proof("name", 1, "what", "python -m command"), again)
    assert (row["tried"], row["failed"], row["named"]) == (3, 1, ["a: wrong"])
    assert row["counts"] == {"a": {"tried": 2, "failed": 1}, "b": {"tried": 1, "failed": 0}}
    assert "1 of 3 failed" in summary(row)


def test_folders_differ_by_more_than_clocks(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, seconds in ((one, 1.0), (two, 2.0)):
        write_json(folder / "state.json", {"metrics": {"tune": {"seconds": seconds, "loss": 3}}, "at": str(folder)})
    assert difference(one, two) is None
    write_json(two / "state.json", {"metrics": {"tune": {"seconds": 1.0, "loss": 4}}, "at": str(two)})
    assert "state.json differs" in difference(one, two)
    (two / "more.json").write_text("{")
    assert "has ['more.json']" in difference(one, two)
    assert "more.json is there but not whole" in partly_there(two)


def test_torch_works_in_a_forked_child():
    def trained() -> list[float]:
        torch.manual_seed(0)
        handle = lf.patch(long_soak.tiny_base(), lf.LofitConfig(offset=[(2, 1)]))
        long_soak._loss(handle.model, 2, 9, 0).backward()
        return [parameter.grad.abs().sum().item() for parameter in handle.parameters()]

    ended = forked(trained)
    assert ended.done, ended
    assert ended.value == pytest.approx(trained())
    assert forked(lambda: os.environ["OF_THE_CHILD"], OF_THE_CHILD="1").value == "1"
