"""Answers on disk: read back as written, ignored where they do not hold, never read at import."""

import json

import pytest
import torch

from lofit_kernels import answers
from lofit_kernels.answers import Key, Path, answers_content, answers_file, key, read_answers, tokens_bucket
from lofit_kernels.dispatch import answers_for

CASE = key(torch.bfloat16, 2048, 2048, 128, 16, 5000)
ANSWER = Path("delta", "triton", "fused")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))


@pytest.fixture
def written():
    """written(**changes): a file of one answer, with some fields changed."""

    def write(**changes) -> None:
        content = answers_content("A GPU (80 GB)", {CASE: (ANSWER, {"milliseconds": {"x": 1.0}})}) | changes
        file = answers_file("A GPU (80 GB)")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("T", "bucket"), [(0, 1), (1, 1), (3, 1), (4, 4), (15, 4), (16, 16), (4095, 1024), (4096, 4096), (16383, 4096)]
)
def test_tokens_bucket(T, bucket):
    assert tokens_bucket(T) == bucket


@pytest.mark.parametrize(
    ("n_scale", "share"), [(0, 0.125), (1, 0.125), (2, 0.125), (3, 0.25), (8, 0.5), (9, 1), (16, 1)]
)
def test_key_rounds_the_share_of_heads_up(n_scale, share):
    assert key(torch.float16, 640, 1024, 64, n_scale, 100) == Key("float16", 640, 1024, 64, share, 64)


def test_answers_file_is_named_for_the_device(tmp_path):
    assert answers_file("A GPU (80 GB)") == tmp_path / "autotune" / "a-gpu-80-gb.json"


def test_read_answers_as_written(written):
    written()
    assert read_answers("A GPU (80 GB)") == {CASE: ANSWER}


def test_answers_content_keeps_what_was_there(written):
    written()
    other, again = CASE._replace(N=4096), Path("delta", "aten", "vendor")
    content = answers_content("A GPU (80 GB)", {other: (again, {})})
    assert [(Key(**row["case"]), Path(**row["path"])) for row in content["answers"]] == [(CASE, ANSWER), (other, again)]
    assert content["answers"][0]["milliseconds"] == {"x": 1.0}
    content = answers_content("A GPU (80 GB)", {CASE: (again, {})})
    assert [row["path"] for row in content["answers"]] == [again._asdict()]


def test_no_file_is_no_answers():
    assert read_answers("another") == {}


@pytest.mark.parametrize(
    "changes",
    [{"device": "B GPU"}, {"versions": {"torch": "1.0", "triton": None}}, {"format_version": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_answers_of_something_else_are_ignored(written, changes):
    written(**changes)
    assert read_answers("A GPU (80 GB)") == {}


@pytest.mark.parametrize("changes", [{"answers": 3}, {"answers": [{"case": {}, "path": {}}]}, {"answers": None}])
def test_a_damaged_file_is_ignored_aloud(written, changes):
    written(**changes)
    with pytest.warns(UserWarning, match="ignoring .*a-gpu-80-gb.json"):
        assert read_answers("A GPU (80 GB)") == {}


def test_a_cut_off_file_is_ignored_aloud(written):
    written()
    file = answers_file("A GPU (80 GB)")
    file.write_text(file.read_text()[:50])
    with pytest.warns(UserWarning, match="ignoring"):
        assert read_answers("A GPU (80 GB)") == {}


def test_answers_are_read_once(written, monkeypatch):
    monkeypatch.setitem(answers_for.__globals__, "_ANSWERS", {})
    written()
    assert answers_for("A GPU (80 GB)") == {CASE: ANSWER}
    answers_file("A GPU (80 GB)").unlink()
    assert answers_for("A GPU (80 GB)") == {CASE: ANSWER}


def test_device_name():
    assert answers.device_name(torch.device("cpu")) == "cpu"
