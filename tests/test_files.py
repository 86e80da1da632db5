"""Folders and files that are written whole or not at all."""

import json

import pytest

from lofit_fast.files import whole_folder, writable_folder, write_json, write_text


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
