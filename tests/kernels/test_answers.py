"""Answers on disk: read back as written, ignored where they do not hold, never read at import."""

import json
import os

import pytest
import torch

from lofit_kernels import answers
from lofit_kernels.answers import Key, Path, answers_content, answers_file, key, read_answers, tokens_bucket
from lofit_kernels.dispatch import answers_for, forget_plans, plan
from lofit_kernels.functional import head_affine_linear

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


def one_answer(**changes):
    """The answers of a file, with some fields of its only one changed; None takes a field away."""
    row = {"case": CASE._asdict(), "path": ANSWER._asdict()}
    for place, value in changes.items():
        part, _, field = place.partition("_")
        row[part] = (
            {**row[part], field: value} if value is not None else {k: v for k, v in row[part].items() if k != field}
        )
    return [row]


DAMAGED = {
    "rows of another kind": [3, "x"],
    "an unknown gemm": one_answer(path_gemm="banana"),
    "an unknown form": one_answer(path_form="banana"),
    "a form that is no text": one_answer(path_form=3),
    "a form that is a list": one_answer(path_form=["pass"]),
    "no backend": one_answer(path_backend=None),
    "a field too many": one_answer(path_more="x"),
    "a share that is no number": one_answer(case_share=float("nan")),
    "a share of another size": one_answer(case_share=0.3),
    "a negative size": one_answer(case_N=-1),
    "a size in words": one_answer(case_K="many"),
    "a size that is true": one_answer(case_D=True),
    "a dtype that is a list": one_answer(case_dtype=[]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_answers_are_none(written, damage):
    written(answers=DAMAGED[damage])
    with pytest.warns(UserWarning, match="ignoring .*a-gpu-80-gb.json, which holds no measured answers") as seen:
        assert read_answers("A GPU (80 GB)") == {}
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


CONTENTS = {
    "empty": b"",
    "cut": b'{"format_version": 1, "answ',
    "a list": b"[]",
    "a number": b"7",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "not a number": b"NaN",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_file_is_written_anew(content):
    file = answers_file("A GPU (80 GB)")
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENTS[content])
    with pytest.warns(UserWarning, match="ignoring") as seen:
        written_anew = answers_content("A GPU (80 GB)", {CASE: (ANSWER, {})})
    assert len(seen) == 1
    file.write_text(json.dumps(written_anew))
    assert read_answers("A GPU (80 GB)") == {CASE: ANSWER}


def test_what_is_no_file_holds_nothing():
    file = answers_file("A GPU (80 GB)")
    file.mkdir(parents=True)
    with pytest.warns(UserWarning, match="ignoring .*it is no file"):
        assert read_answers("A GPU (80 GB)") == {}
    file.rmdir()
    # it would be waited for
    os.mkfifo(file)
    with pytest.warns(UserWarning, match="ignoring .*it is no file"):
        assert read_answers("A GPU (80 GB)") == {}


def test_a_file_that_may_not_be_read_holds_nothing(written, monkeypatch):
    written()

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    # root may read everything
    monkeypatch.setattr(type(answers_file("x")), "read_bytes", refuse)
    with pytest.warns(UserWarning, match="ignoring .*PermissionError"):
        assert read_answers("A GPU (80 GB)") == {}


def test_a_home_directory_in_the_variable_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOFIT_FAST_CACHE", "~/kept")
    assert answers.cache_folder() == tmp_path / "kept"
    monkeypatch.setenv("LOFIT_FAST_CACHE", "~nobody-of-this-name/kept")
    with pytest.raises(FileNotFoundError, match="no home directory"):
        answers.cache_folder()


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home directory, who names no cache folder."""

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOFIT_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(answers.File, "home", nowhere)


def test_without_a_home_directory_nothing_is_kept(homeless):
    assert read_answers("A GPU (80 GB)") == {}
    assert [row["path"] for row in answers_content("A", {CASE: (ANSWER, {})})["answers"]] == [ANSWER._asdict()]
    with pytest.raises(FileNotFoundError, match="no home directory .* LOFIT_FAST_CACHE"):
        answers.cache_folder()


def test_without_a_home_directory_a_forward_takes_the_default(homeless, monkeypatch):
    monkeypatch.setitem(answers_for.__globals__, "_ANSWERS", {})
    forget_plans()
    try:
        z, weight, scale = torch.randn(3, 8), torch.randn(5, 8), torch.randn(1, 4)
        y = head_affine_linear(z, weight, scale=scale, scale_heads=torch.tensor([1]))
    finally:
        forget_plans()
    assert torch.allclose(y, torch.cat((z[:, :4], z[:, 4:] * (1 + scale)), 1) @ weight.T, atol=1e-5)


def test_a_cache_below_a_file_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "file" / "below"))
    assert read_answers("A GPU (80 GB)") == {}


@pytest.mark.parametrize(
    "answer",
    [
        Path("pass", "aten", "fused"),
        Path("fold", "aten", "vendor"),
        Path("dither", "aten", "vendor"),
        Path("banana", "aten", "vendor"),
        Path("pass", "aten", "banana"),
    ],
)
def test_an_answer_that_nothing_computes_is_not_taken(answer):
    case = {"has_scale": True, "dtype": torch.float32, "device_type": "cpu"}
    assert plan(**case, answer=answer) == plan(**case)


def test_answers_are_read_once(written, monkeypatch):
    monkeypatch.setitem(answers_for.__globals__, "_ANSWERS", {})
    written()
    assert answers_for("A GPU (80 GB)") == {CASE: ANSWER}
    answers_file("A GPU (80 GB)").unlink()
    assert answers_for("A GPU (80 GB)") == {CASE: ANSWER}


def test_device_name():
    assert answers.device_name(torch.device("cpu")) == "cpu"
