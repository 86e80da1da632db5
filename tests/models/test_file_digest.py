"""A digest is kept for a file that is the same, and for no other."""

import hashlib
import json
import os

import pytest

from lofit_fast.models import file_digest
from lofit_fast.models.file_digest import digest_of
from lofit_kernels import answers


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that has been there for a while, as far as anybody asks."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digest, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def read(monkeypatch):
    """The files that were read."""
    seen, plain = [], file_digest.sha256_of
    monkeypatch.setattr(file_digest, "sha256_of", lambda path: seen.append(path) or plain(path))
    return seen


def test_a_file_is_read_once(file, read):
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [digest_of(file) for _ in range(3)] == [expected] * 3
    assert len(read) == 1


def test_other_bytes_of_one_size_and_time_are_noticed(file, read):
    digest_of(file)
    times = os.stat(file)
    file.write_bytes(b"WEIGHTS")
    # the time that a program can set back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns and file.stat().st_size == times.st_size
    assert digest_of(file) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_file_in_the_place_of_another_is_noticed(file):
    digest_of(file)
    other = file.with_name("other")
    other.write_bytes(b"WEIGHTS")
    other.rename(file)
    assert digest_of(file) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_file_that_has_just_changed_is_not_trusted(file, read, monkeypatch):
    monkeypatch.setattr(file_digest, "SETTLED_SECONDS", 10.0)
    digest_of(file)
    digest_of(file)
    assert len(read) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "[" * 100_000, "\udcff", '{"sha256": "x"}', "SAME"])
def test_a_broken_note_is_said_and_made_anew(file, read, content, tmp_path):
    expected = digest_of(file)
    [note] = (tmp_path / "cache" / "digests").iterdir()
    if content == "SAME":
        # a list of as many letters
        content = json.dumps({**json.loads(note.read_text()), "sha256": list(expected)})
    note.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="ignoring .*, which holds no checksum") as seen:
        assert digest_of(file) == expected
    assert len(seen) == 1
    assert digest_of(file) == expected
    assert len(read) == 2


def test_a_note_of_the_file_as_it_was_is_out_of_date_and_no_damage(file, read, recwarn):
    digest_of(file)
    file.write_bytes(b"other")
    digest_of(file)
    assert len(read) == 2 and not recwarn


def test_without_a_home_directory_nothing_is_kept(file, read, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOFIT_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(answers.File, "home", nowhere)
    assert digest_of(file) == digest_of(file)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written_is_done_without(file, read, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    assert digest_of(file) == digest_of(file)
    assert len(read) == 2


def test_a_link_is_the_file(file, read, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    assert digest_of(link) == digest_of(file)
    assert len(read) == 1
