"""JSON that notices a change of its content."""

import json

import pytest

from lofit_fast.sealed import read_sealed, write_sealed

CONTENT = {"name": "é", "list": [1, 2.5, None, -1e-17], "inside": {"b": True, "a": (3, 4)}}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, CONTENT)
    assert read_sealed(path) == json.loads(json.dumps(CONTENT))
    # again, from what was read
    write_sealed(path, read_sealed(path))
    assert read_sealed(path)["inside"] == {"b": True, "a": [3, 4]}


def test_every_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, CONTENT)
    whole, expected = path.read_bytes(), read_sealed(path)
    noticed = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            # blanks between, and the name of the checksum: then it is one without
            got = read_sealed(path)
            got.pop(next(iter(got.keys() - expected.keys()), None), None)
            assert got == expected
        except ValueError as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed > 0.7 * len(whole)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', "[" * 10**5])
def test_what_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_sealed(path)


def test_of_an_earlier_release_there_is_no_checksum(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_sealed(path) == {"a": 1}
    write_sealed(path, {"a": 1})
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match="is not what was written"):
        read_sealed(path)
