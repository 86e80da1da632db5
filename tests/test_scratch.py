"""Scratch folders of processes that have ended are removed, those of living ones are not."""

import os
import sys

import pytest

from lofit_fast import scratch
from lofit_fast.files import whole_folder, write_text
from lofit_fast.scratch import remove_abandoned, scratch_folder

fcntl = pytest.importorskip("fcntl", reason="the system has no locks on folders")


def left_by_a_killed_process(folder) -> str:
    """The scratch folder of a process that died in the midst of a write."""
    child = os.fork()
    if not child:
        with whole_folder(folder) as place:
            (place / "half.bin").write_bytes(bytes(1000))
            os._exit(9)
    os.waitpid(child, 0)
    (name,) = [path.name for path in folder.iterdir() if path.name.startswith(".lofit-")]
    return name


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    name = left_by_a_killed_process(tmp_path)
    assert (tmp_path / name / "half.bin").is_file()
    write_text(tmp_path / "other.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_what_a_living_process_writes_in_stays(tmp_path):
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            with whole_folder(tmp_path) as place:
                (place / "mine.txt").write_text("mine")
                os.write(ready[1], b"1")
                os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    for _ in range(3):
        write_text(tmp_path / "other.txt", "whole")
    with whole_folder(tmp_path) as place:
        # nor one of this process
        remove_abandoned(tmp_path)
        assert place.is_dir()
    os.write(done[1], b"1")
    os.waitpid(child, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "other.txt"]


def test_what_only_looks_like_one_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept.txt").write_text("kept")
    folder = tmp_path / "folder"
    (folder / ".lofit-fast").mkdir(parents=True)
    (folder / ".lofit-01234567").symlink_to(elsewhere)
    (folder / ".lofit-76543210").write_text("a file")
    write_text(folder / "other.txt", "whole")
    assert sorted(os.listdir(folder)) == [".lofit-01234567", ".lofit-76543210", ".lofit-fast", "other.txt"]
    assert (elsewhere / "kept.txt").is_file()


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    name = left_by_a_killed_process(tmp_path)
    monkeypatch.setattr(scratch, "fcntl", None)
    write_text(tmp_path / "other.txt", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([name, "other.txt"])


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "flock", unsupported)
    write_text(tmp_path / "a.txt", "whole")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("times", [1, 3])
def test_a_folder_that_is_taken_for_abandoned_before_its_lock_is_made_again(tmp_path, monkeypatch, times):
    made, plain = [], scratch.tempfile.mkdtemp

    def stolen(**options):
        folder = plain(**options)
        made.append(folder)
        if len(made) <= times:
            os.rmdir(folder)
        return folder

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", stolen)
    with scratch_folder(tmp_path) as place:
        assert str(place) == made[-1]
        assert len(made) == times + 1
    assert os.listdir(tmp_path) == []


def test_a_folder_that_another_process_holds_is_left_to_it(tmp_path, monkeypatch):
    made, held, plain = [], [], scratch.tempfile.mkdtemp

    def found(**options):
        folder = plain(**options)
        made.append(folder)
        if len(made) == 1:
            held.append(os.open(folder, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return folder

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", found)
    with scratch_folder(tmp_path) as place:
        assert str(place) == made[1]
    os.close(held[0])


def test_no_descriptor_stays_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip(f"{sys.platform} does not list open files")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        write_text(tmp_path / f"{number}.txt", "whole")
        with pytest.raises(RuntimeError), whole_folder(tmp_path):
            raise RuntimeError
    assert len(os.listdir("/proc/self/fd")) == before
