"""Checkpoints of a stage: whole or passed over, the newest few kept, and nobody else's folders touched."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofit_fast as lf
from lofit_fast.sealed import write_sealed
from lofit_fast.training.stage_checkpoints import WHOLE, keep_newest, last_whole, written_whole
from tests.training.tiny_runs import RECIPE, assert_equal_vectors, fit, vectors

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """(a finished run's folder, its tuned vectors)."""
    from tests.tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("made") / "run"
    result = fit(tiny_model("llama"), folder, RECIPE)
    return folder, vectors(result.handle)


@pytest.fixture
def stage(made, tmp_path):
    """A copy of the tune stage of that run: checkpoint-4 and checkpoint-6."""
    return Path(shutil.copytree(made[0] / "tune", tmp_path / "tune"))


def without_list(folder):
    """As an earlier release has left them."""
    for path in folder.glob(f"checkpoint-*/{WHOLE}"):
        path.unlink()


def test_the_newest_two_are_kept_and_say_what_they_hold(stage):
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    found, passed = last_whole(stage)
    assert (found.path, found.step, found.epoch, found.over, passed) == (stage / "checkpoint-6", 6, 3.0, True, [])
    listed = json.loads((found.path / WHOLE).read_text())["files"]
    assert set(FILES) <= listed.keys()
    assert not last_whole(stage / "nothing")[0]


def flip(path):
    raw = bytearray(path.read_bytes())
    # of a tensor, a number
    raw[-1 if path.suffix == ".safetensors" else len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "flipped": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "of another step": lambda path: shutil.copy(path.parents[1] / "checkpoint-4" / path.name, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", [*FILES, WHOLE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(stage, name, damage):
    before = (stage / "checkpoint-6" / name).read_bytes()
    DAMAGES[damage](stage / "checkpoint-6" / name)
    found, passed = last_whole(stage)
    as_an_earlier_release = (damage, name) == ("missing", WHOLE)
    if as_an_earlier_release or (
        damage == "of another step" and (stage / "checkpoint-6" / name).read_bytes() == before
    ):
        assert (found.step, passed) == (6, [])
        return
    assert found.step == 4
    assert len(passed) == 1 and "checkpoint-6 is passed over: " in passed[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "a folder"])
def test_one_of_an_earlier_release_is_looked_through(stage, name, damage):
    without_list(stage)
    assert last_whole(stage)[0].step == 6
    DAMAGES[damage](stage / "checkpoint-6" / name)
    found, passed = last_whole(stage)
    assert found.step == 4
    assert name in passed[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_that_is_not_finite_is_none_to_go_on_from(stage, value):
    path = stage / "checkpoint-6"
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = value
    # an earlier release has no digests
    config = json.loads((path / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if not key.endswith("_digest")}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    without_list(stage)
    found, passed = last_whole(stage)
    assert found.step == 4
    assert "finite" in passed[0]


def test_a_planted_pickle_is_not_run(stage, tmp_path):
    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    without_list(stage)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": Planted()}, stage / "checkpoint-6" / name)
    assert last_whole(stage)[0].step == 4
    assert not (tmp_path / "ran").exists()


def test_a_list_of_files_elsewhere_or_of_too_few_is_damaged(stage):
    path = stage / "checkpoint-6" / WHOLE
    content = json.loads(path.read_text())
    del content["sha256"]
    for changed in (
        {**content, "files": {**content["files"], "../checkpoint-4/optimizer.pt": content["files"]["optimizer.pt"]}},
        {**content, "files": {k: v for k, v in content["files"].items() if k != "rng_state.pth"}},
        {**content, "files": []},
        {**content, "step": 4},
        {**content, "epoch": None},
    ):
        write_sealed(path, changed)
        assert last_whole(stage)[0].step == 4


def test_links_and_folders_of_others_are_left_alone(stage, tmp_path):
    outside = Path(shutil.copytree(stage / "checkpoint-6", tmp_path / "outside"))
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-007", "checkpoint-12-backup", "checkpoint-٣"):
        (stage / name).mkdir()
        (stage / name / "trainer_state.json").write_text("{}")
    # named as ours, but nothing of ours in it
    (stage / "checkpoint-99").mkdir()
    (stage / "checkpoint-99" / "notes.txt").write_text("mine")
    (stage / "checkpoint-100").symlink_to(outside)
    (stage / "checkpoint-101").write_text("a file")
    before = {path.name for path in stage.iterdir()}
    assert last_whole(stage)[0].step == 6
    keep_newest(stage, [6])
    assert before - {path.name for path in stage.iterdir()} == {"checkpoint-4"}
    assert set(FILES) <= {path.name for path in outside.iterdir()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, error):
    with pytest.raises(OSError, match=str(tmp_path)), written_whole(tmp_path, 3, 1.0, False) as scratch:
        (scratch / "checkpoint-3").mkdir()
        (scratch / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def written(folder, step, text):
    with written_whole(folder, step, 1.0, False) as scratch:
        (scratch / f"checkpoint-{step}").mkdir()
        (scratch / f"checkpoint-{step}" / "trainer_state.json").write_text(text)


def test_a_step_trained_again_replaces_its_checkpoint_and_nobody_elses_folder(tmp_path):
    for text in ("first", "second"):
        written(tmp_path, 3, text)
        assert (tmp_path / "checkpoint-3" / "trainer_state.json").read_text() == text
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="checkpoint-4 is there, as something else"):
        written(tmp_path, 4, "ours")
    assert (tmp_path / "checkpoint-4" / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}


def damaged_run(made, folder, *damaged, as_earlier=False):
    """A copy of the finished run, taken back to the middle of its second step, with damaged checkpoints."""
    shutil.copytree(made[0], folder)
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"], state["metrics"]["tune"]
    (folder / "state.json").write_text(json.dumps({**state, "stage": "tune"}))
    shutil.rmtree(folder / "adapter")
    if as_earlier:
        without_list(folder / "tune")
    for name in damaged:
        (folder / "tune" / name).unlink()


@pytest.mark.parametrize("as_earlier", [False, True])
@pytest.mark.parametrize(
    ("damaged", "then"),
    [
        (["checkpoint-6/trainer_state.json"], "goes on from checkpoint-4"),
        (["checkpoint-6/optimizer.pt", "checkpoint-4/scheduler.pt"], "begins anew"),
    ],
)
def test_fit_goes_on_from_the_checkpoint_before_or_begins_anew(
    llama, made, tmp_path, capsys, damaged, then, as_earlier
):
    folder = tmp_path / "run"
    damaged_run(made, folder, *damaged, as_earlier=as_earlier)
    (folder / "tune" / "checkpoint-best").mkdir()
    result = fit(llama, folder, RECIPE)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert then in said and all(name.split("/")[0] in said for name in damaged)
    assert_equal_vectors(vectors(result.handle), made[1])
    assert [(row["stage"], row["epoch"]) for row in result.history] == [
        (stage, epoch) for stage in ("select", "tune") for epoch in (1, 2, 3)
    ]
    assert {"checkpoint-4", "checkpoint-6", "checkpoint-best"} == {p.name for p in (folder / "tune").iterdir()}


def test_a_done_run_with_a_damaged_adapter_is_refused_and_the_model_left_alone(llama, made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made[0], folder)
    flip(folder / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is done, but its adapter is not whole: .*--no-resume"):
        fit(llama, folder, RECIPE)
    assert lf.handle_of(llama) is None
    shutil.rmtree(folder / "adapter")
    with pytest.raises(ValueError, match=r"is done, but its adapter is not whole"):
        fit(llama, folder, RECIPE)
    # of other heads, but whole
    handle = lf.patch(llama, lf.LofitConfig(offset=[(0, 0)]))
    handle.save(folder / "adapter")
    handle.unpatch()
    with pytest.raises(ValueError, match=r"is not offsets on the heads that .*heads\.json"):
        fit(llama, folder, RECIPE)
    (folder / "history.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"line 1 of .*history\.jsonl is damaged"):
        fit(llama, folder, RECIPE)
    assert lf.handle_of(llama) is None
    result = fit(llama, folder, RECIPE, resume=False)
    assert_equal_vectors(vectors(result.handle), made[1])
