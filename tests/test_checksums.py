"""Checksums beside files: every changed byte is noticed, in every file."""

import json

import pytest

from lofit_fast.checksums import SUMS_FILE, check_sums, write_sums, written_sums

FILES = {"config.json": b"{}", "model.safetensors": b"weights and so on", "sub/template.txt": b"hello"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path)
    return tmp_path


def test_what_is_as_it_was_written_passes(folder):
    check_sums(folder)
    assert written_sums(folder).keys() == FILES.keys()
    # again, since the file of checksums is none of those
    write_sums(folder)
    check_sums(folder)
    (folder / "added.txt").write_text("since")
    check_sums(folder)


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_noticed(name, folder):
    raw = FILES[name]
    for at in range(len(raw)):
        (folder / name).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=f"{folder / name} is damaged: it is not as it was written.*delete"):
            check_sums(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{folder / name} is damaged"):
        check_sums(folder)
    check_sums(folder, "*.nothing")


def test_a_folder_without_checksums_passes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_sums(tmp_path)
    assert written_sums(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("content", [[], {"files": None}, {"files": {"a": 1}}, {}])
def test_damaged_checksums_say_so(content, folder):
    (folder / SUMS_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{SUMS_FILE} is damaged"):
        check_sums(folder)
    (folder / SUMS_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"{SUMS_FILE} is not whole JSON"):
        check_sums(folder)
