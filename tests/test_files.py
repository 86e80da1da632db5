"""Folders and files that are written whole or not at all."""

import errno
import json
import math
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lofit_fast.files import (
    WriteError,
    as_json,
    file_errors,
    given_path,
    read_json,
    same_json,
    whole_folder,
    writable_folder,
    write_json,
    write_text,
)

BIG = torch.zeros(100_000)


def names(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_whole_folder_moves_files_at_the_end(tmp_path):
    target = tmp_path / "new" / "folder"
    with whole_folder(target) as scratch:
        (scratch / "a.txt").write_text("a")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "b.txt").write_text("b")
        assert not (target / "a.txt").exists()
    assert names(target) == ["a.txt", "sub", "sub/b.txt"]
    assert (target / "sub" / "b.txt").read_text() == "b"


def test_whole_folder_replaces_its_own_names_only(tmp_path):
    (tmp_path / "mine.txt").write_text("old")
    (tmp_path / "yours.txt").write_text("kept")
    with whole_folder(tmp_path) as scratch:
        (scratch / "mine.txt").write_text("new")
    assert names(tmp_path) == ["mine.txt", "yours.txt"]
    assert (tmp_path / "mine.txt").read_text() == "new"
    assert (tmp_path / "yours.txt").read_text() == "kept"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whole_folder_leaves_nothing_of_a_failed_block(tmp_path, error):
    (tmp_path / "mine.txt").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path) as scratch:
        (scratch / "mine.txt").write_text("half")
        raise error
    assert names(tmp_path) == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "old"


def test_whole_folder_writes_over_a_read_only_file(tmp_path):
    (tmp_path / "mine.txt").write_text("old")
    (tmp_path / "mine.txt").chmod(0o400)
    with whole_folder(str(tmp_path)) as scratch:
        (scratch / "mine.txt").write_text("new")
    assert (tmp_path / "mine.txt").read_text() == "new"


def test_write_text_and_json(tmp_path):
    write_text(tmp_path / "a.txt", "hello")
    write_json(str(tmp_path / "b.json"), {"heads": [(0, 1)], "none": None})
    assert names(tmp_path) == ["a.txt", "b.json"]
    assert (tmp_path / "a.txt").read_text() == "hello"
    assert json.loads((tmp_path / "b.json").read_text()) == {"heads": [[0, 1]], "none": None}


def test_write_json_of_what_is_no_json_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert names(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == 1


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"loss": math.nan}, "content['loss'] = nan"),
        ({"rows": [[0.0, (1.0, -math.inf)]]}, "content['rows'][0][1][1] = -inf"),
        (math.inf, "content = inf"),
    ],
)
def test_write_json_refuses_numbers_that_json_has_not(content, place, tmp_path):
    path = tmp_path / "a" / "b.json"
    with pytest.raises(ValueError, match=f"b.json: got {re.escape(place)}, expected finite numbers"):
        write_json(path, content)
    assert not path.parent.exists()


def test_as_json_is_what_a_file_gives_back(tmp_path):
    content = {"clip": math.inf, "rows": ((1, -math.inf), (None, 0.5)), "nan": [math.nan]}
    plain = as_json(content)
    assert plain == {"clip": "Infinity", "rows": [[1, "-Infinity"], [None, 0.5]], "nan": ["NaN"]}
    write_json(tmp_path / "a.json", plain)
    assert read_json(tmp_path / "a.json") == plain == as_json(plain)


def test_infinity_in_an_older_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"clip": Infinity}')
    assert read_json(tmp_path / "a.json") == {"clip": math.inf}


def test_writable_folder_creates_it_and_leaves_it_empty(tmp_path):
    folder = writable_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert folder.is_dir()
    assert names(folder) == []


@pytest.mark.parametrize("below", ["", "sub"])
def test_writable_folder_names_what_it_cannot_write(tmp_path, below):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to output folder .*file.*: ") as raised:
        writable_folder(blocker / below)
    assert str(blocker) in str(raised.value)
    assert blocker.read_text() == "in the way"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("there", ["", "old", "old/older"])
def test_whole_folder_removes_the_folders_it_made_for_a_failed_block(tmp_path, there, error):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = names(tmp_path)
    with pytest.raises(error), whole_folder(tmp_path / "old" / "older" / "new") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == before


def test_whole_folder_moves_nothing_where_one_file_cannot_go(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="cannot write to output folder .* b is there, as something else"):  # noqa: SIM117
        with whole_folder(tmp_path) as scratch:
            (scratch / "a").write_text("new")
            (scratch / "b").write_text("new")
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_text() == "old"


def test_write_text_of_a_failed_write_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError):
        write_text(tmp_path / "new" / "a.txt", b"bytes are no text")
    assert names(tmp_path) == []


def test_writable_folder_that_takes_no_files_is_removed(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lofit_fast.files.tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="cannot write to output folder .*: No space left"):
        writable_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == []


@contextmanager
def small_files():
    """A scope in which no file grows beyond 4 kB: the kernel refuses the write, as it does on a full disk."""
    resource = pytest.importorskip("resource", reason="the system has no limit on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def picture(path):
    from lofit_fast.plots import heads_map

    pytest.importorskip("matplotlib")
    heads_map(torch.rand(30, 30), [(0, 0)], path)


# each has an error of its own for a disk that is full
WRITERS = {
    "python": lambda path: path.write_bytes(bytes(100_000)),
    "safetensors": lambda path: save_file({"a": BIG}, path),
    "torch": lambda path: torch.save(BIG, path),
    "torch's old format": lambda path: torch.save(BIG, path, _use_new_zipfile_serialization=False),
    "numpy": lambda path: BIG.numpy().tofile(path),
    "picture": picture,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failing_write_names_folder_and_reason_whoever_writes(writer, tmp_path):
    (tmp_path / "a").write_text("old")
    with small_files(), pytest.raises(OSError) as raised, whole_folder(tmp_path) as scratch:
        WRITERS[writer](scratch / "a")
    assert str(raised.value).startswith(f"cannot write to output folder {tmp_path}: ")
    # numpy counts bytes instead
    assert "File too large" in str(raised.value) or writer in ("numpy", "torch")
    assert ".lofit-" not in str(raised.value)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_gone_is_named_too(writer, tmp_path):
    with pytest.raises(OSError, match="cannot write to output folder"), file_errors(tmp_path / "gone"):
        WRITERS[writer](tmp_path / "gone" / "a") if writer != "picture" else (tmp_path / "gone" / "a").write_bytes(b"")


OTHERS = {
    "no matter of files": (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
    "a file elsewhere": (FileNotFoundError(2, "No such file", "/data/x"), FileNotFoundError, "/data/x"),
    "another process": (BlockingIOError("process 7 does so now"), BlockingIOError, "process 7"),
    "wrong input": (ValueError("not finite"), ValueError, "not finite"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_failing_write_passes_as_it_is(case, tmp_path):
    error, kind, message = OTHERS[case]
    with pytest.raises(kind, match=message) as raised, whole_folder(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error, code, reason",
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, "No space left on device"),
        (Exception("I/O error: No space left on device (os error 28)"), errno.ENOSPC, "No space left on device"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            errno.EIO,
            "failed writing",
        ),
        (OSError("no words of the system"), None, "no words of the system"),
    ],
)
def test_the_number_of_the_error_is_kept(error, code, reason, tmp_path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(WriteError, match=f"cannot write to output folder {tmp_path}: .*{reason}") as raised:  # noqa: SIM117
        with whole_folder(tmp_path), file_errors(tmp_path / "inner"):
            raise error
    assert raised.value.errno == code
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.errno) == (str(raised.value), code)


@pytest.mark.parametrize(
    ("path", "error"), [("", ValueError), ("a\0b", ValueError), (b"a", TypeError), (None, TypeError), (3, TypeError)]
)
def test_what_is_no_path_is_refused(path, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (given_path, writable_folder, whole_folder, lambda given: write_text(given, "text")):
        with pytest.raises(error, match="expected the path of a file or folder"):
            scope = use(path)
            with scope:
                pass
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_named(tmp_path):
    path = tmp_path / ("a" * 300)
    for use in (writable_folder, lambda folder: write_text(folder / "a.json", "text")):
        with pytest.raises(WriteError, match="cannot write to output folder .*aaa: File name too long"):
            use(path)


def test_links_are_replaced_and_not_written_through(tmp_path):
    outside, folder = tmp_path / "outside.txt", tmp_path / "folder"
    outside.write_text("theirs")
    folder.mkdir()
    (folder / "a.txt").symlink_to(outside)
    (folder / "b.txt").symlink_to(tmp_path / "nothing")
    with whole_folder(folder) as scratch:
        (scratch / "a.txt").write_text("ours")
        (scratch / "b.txt").write_text("ours")
    assert outside.read_text() == "theirs"
    assert not (tmp_path / "nothing").exists()
    assert [(folder / name).read_text() for name in ("a.txt", "b.txt")] == ["ours", "ours"]
    assert not any((folder / name).is_symlink() for name in ("a.txt", "b.txt"))


def test_a_folder_is_not_written_into_through_a_link(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    with pytest.raises(OSError, match="sub is a link there, which may lead anywhere"), whole_folder(folder) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a.txt").write_text("ours")
    assert names(outside) == []


@pytest.mark.parametrize("withdraw", [False, True])
def test_the_file_that_readers_begin_with_moves_last(withdraw, tmp_path, monkeypatch):
    (tmp_path / "b").write_text("old")
    moved, plain = [], os.replace

    def watched(source, target):
        moved.append((target.name, (tmp_path / "b").exists()))
        plain(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with whole_folder(tmp_path, last="b", withdraw=withdraw) as scratch:
        for name in ("a", "b", "c"):
            (scratch / name).write_text("new")
    assert moved == [(name, not withdraw) for name in ("a", "c", "b")]


BROKEN = {
    "cut": b'{"a": [1, 2',
    "empty": b"",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin": b'{"a": "\xe4"}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_names_its_file(case, tmp_path):
    (tmp_path / "a.json").write_bytes(BROKEN[case])
    with pytest.raises(ValueError, match=f"{tmp_path / 'a.json'} is not whole JSON: ") as raised:
        read_json(tmp_path / "a.json")
    assert len(str(raised.value)) < 500


def test_json_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lofit_fast.files.JSON_BYTES", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(ValueError, match="it has more than 10 bytes"):
        read_json(tmp_path / "a.json")


def test_json_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in (".", "pipe"):
        with pytest.raises(OSError, match="expected a file, got a folder or a device"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")
    with pytest.raises(OSError):
        read_json(tmp_path / "loop")


def test_json_with_the_mark_of_windows_editors(tmp_path):
    (tmp_path / "a.json").write_bytes('{"ä": 1}'.encode("utf-8-sig"))
    assert read_json(str(tmp_path / "a.json")) == {"ä": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"top": 1}, {"top": 1.0}, False),
        ({"top": 1}, {"top": True}, False),
        ([{"a": 1, "b": (2, 3)}], ({"b": [2, 3], "a": 1},), True),
        ({"limit": math.inf}, {"limit": math.inf}, True),
        ({"path": Path("a")}, {"path": Path("b")}, False),
    ],
)
def test_same_json(one, other, same):
    assert same_json(one, other) == same_json(other, one) == same
