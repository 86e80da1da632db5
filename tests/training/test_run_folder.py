"""A run folder: opened, gone on with, refused, and read back."""

import gc
import json
import math
import os
import threading

import pytest
import torch

from lofit_fast.training.run_clearing import FILES, FOLDERS
from lofit_fast.training.run_folder import RunFolder, dtype_of_run, held
from tests.training.killed_changes import Killed, killed_at

IDENTITY = {"recipe": {"top": 2}, "model": {"layers": 3}, "data": "abc", "heads": None}


def opened(path, identity=IDENTITY, resume=True, **how):
    """The run of a folder, as one that has been opened and let go of."""
    with RunFolder.open(path, identity, resume, **how) as run:
        return run


def row(stage="select", epoch=1, loss=1.0):
    return {"stage": stage, "epoch": epoch, "loss": loss}


def test_run_starts_empty(tmp_path):
    run = opened(tmp_path / "deep" / "run")
    assert (run.stage, run.metrics, run.heads, run.scores, run.history) == ("select", {}, None, None, [])
    assert json.loads((run.path / "state.json").read_text())["identity"] == IDENTITY


def test_run_goes_on(tmp_path):
    run = opened(tmp_path)
    scores = torch.tensor([[0.1, 0.2], [0.3, 1 / 3]])
    run.record("select", {"seconds": 1.5})
    run.write_heads([(1, 1), (1, 0)], scores)
    run.append_history(row())
    again = opened(tmp_path)
    assert (again.stage, again.heads, again.history) == ("tune", [(1, 1), (1, 0)], [row()])
    # through JSON and back without a change
    assert again.scores.equal(scores)
    again.record("tune", {"seconds": 2.5})
    assert again.stage == "done"
    assert again.metrics == {"select": {"seconds": 1.5}, "tune": {"seconds": 2.5}}


def strictly_read(path):
    """What a file holds for a parser that knows no more than JSON."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_scores_of_layers_without_attention_are_plain_json(tmp_path):
    run = opened(tmp_path)
    scores = torch.tensor([[0.1, 0.2], [-math.inf, -math.inf], [0.3, -math.inf]])
    run.write_heads([(2, 0)], scores, "lofit")
    assert strictly_read(tmp_path / "heads.json")["scores"][1:] == [[None, None], [scores[2, 0].item(), None]]
    assert opened(tmp_path).scores.equal(scores)


def test_infinite_scores_of_an_earlier_release_are_read(tmp_path):
    run = opened(tmp_path)
    (tmp_path / "heads.json").write_text('{"heads": [[0, 1]], "scores": [[0.5, 1.0], [-Infinity, -Infinity]]}')
    assert run.scores.equal(torch.tensor([[0.5, 1.0], [-math.inf, -math.inf]]))


def test_an_infinite_setting_is_plain_json_and_goes_on(tmp_path):
    recipe = {"max_grad_norm": math.inf, "limits": (0.0, math.inf)}
    identity = {**IDENTITY, "recipe": recipe}
    opened(tmp_path, identity)
    assert strictly_read(tmp_path / "state.json")["identity"]["recipe"]["max_grad_norm"] == "Infinity"
    assert opened(tmp_path, identity).stage == "select"
    # as earlier releases wrote it
    (tmp_path / "state.json").write_text(json.dumps({"stage": "tune", "identity": identity, "metrics": {}}))
    assert opened(tmp_path, identity).stage == "tune"
    strictly_read(tmp_path / "state.json")
    with pytest.raises(ValueError, match="another recipe"):
        opened(tmp_path, {**identity, "recipe": {**recipe, "max_grad_norm": 1.0}})


def test_run_with_given_heads_has_no_scores(tmp_path):
    run = opened(tmp_path)
    run.write_heads([(0, 1)], None)
    assert (run.heads, run.scores) == ([(0, 1)], None)


def test_run_identity_survives_json(tmp_path):
    identity = {**IDENTITY, "heads": ((0, 1), (2, 3))}
    opened(tmp_path, identity)
    assert opened(tmp_path, identity).stage == "select"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "xyz"}, "data"),
        ({"recipe": {"top": 3}}, "recipe"),
        ({"heads": [[0, 1]], "model": {"layers": 4}}, "heads, model"),
        ({"extra": 1}, "extra"),
        # which Python takes for equal: one head, and all heads
        ({"recipe": {"top": 2.0}}, "recipe"),
    ],
)
def test_run_of_another_identity_is_refused(tmp_path, changes, named):
    opened(tmp_path).record("select", {})
    before = (tmp_path / "state.json").read_text()
    with pytest.raises(ValueError, match=rf"{tmp_path}.*another {named}: .*resume=False"):
        opened(tmp_path, {**IDENTITY, **changes})
    assert (tmp_path / "state.json").read_text() == before


def test_run_starts_over(tmp_path):
    run = opened(tmp_path)
    run.write_heads([(0, 1)], None)
    run.append_history(row())
    run.record("select", {"seconds": 1.0})
    run = opened(tmp_path, {**IDENTITY, "data": "xyz"}, resume=False)
    assert (run.stage, run.metrics, run.heads, run.history) == ("select", {}, None, [])


def test_run_history_replaces_an_epoch(tmp_path):
    run = opened(tmp_path)
    for entry in (row(epoch=1), row(epoch=2, loss=5.0), row("tune", 1), row(epoch=2, loss=4.0)):
        run.append_history(entry)
    assert run.history == [row(epoch=1), row("tune", 1), row(epoch=2, loss=4.0)]


DAMAGES = {
    "cut": lambda text: text[:-9],
    "empty": lambda text: b"",
    "zeros": lambda text: bytes(len(text)),
    "deep": lambda text: b"[" * 100_000,
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "flipped": lambda text: text.replace(b'"select"', b'"selext"', 1),
    "a value": lambda text: text.replace(b'"abc"', b'"abd"', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_can_be_started_over(tmp_path, damage):
    run = opened(tmp_path)
    run.write_heads([(0, 1)], None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"old")
    path = tmp_path / "state.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"state\.json is .*resume=False \(--no-resume\)"):
        opened(tmp_path)
    run = opened(tmp_path, resume=False)
    assert (run.stage, run.heads, run.history) == ("select", None, [])
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("key", ["stage", "metrics", "identity"])
def test_a_state_that_lacks_a_part_is_damaged_and_not_somebody_elses(tmp_path, key):
    opened(tmp_path)
    content = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({k: v for k, v in content.items() if k not in (key, "sha256")}))
    with pytest.raises(ValueError, match=rf"damaged: it has no {key} of a run: start over"):
        opened(tmp_path)
    assert opened(tmp_path, resume=False).stage == "select"


def test_a_shared_run_with_a_damaged_state_begins_anew(tmp_path, capsys):
    opened(tmp_path).record("select", {})
    (tmp_path / "state.json").write_text("{")
    assert opened(tmp_path, mend=True).stage == "select"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "begins anew" in said


def test_damaged_heads_are_chosen_again_unless_the_run_is_done(tmp_path, capsys):
    run = opened(tmp_path)
    run.write_heads([(0, 1)], torch.rand(2, 2), "lofit")
    path = tmp_path / "heads.json"
    whole = path.read_text()
    path.write_text(whole.replace("0.", "1.", 1))
    assert opened(tmp_path).heads is None
    assert "heads are chosen again" in capsys.readouterr().err
    path.write_text(whole.replace("0.", "1.", 1))
    run.record("tune", {})
    with pytest.raises(ValueError, match=r"heads\.json is not what was written"):
        opened(tmp_path)


def test_a_run_of_an_earlier_release_has_no_checksums(tmp_path):
    run = opened(tmp_path)
    run.write_heads([(0, 1)], torch.rand(2, 2))
    for name in ("state.json", "heads.json"):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({k: v for k, v in content.items() if k != "sha256"}))
    assert opened(tmp_path).heads == [(0, 1)]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", ["[]", "{}", '{"stage": 5}', '{"_data_files": [], "_split": "train"}'])
def test_a_state_of_something_else_is_neither_read_nor_replaced(tmp_path, content, resume):
    (tmp_path / "state.json").write_text(content)
    (tmp_path / "summary.json").write_text("theirs")
    with pytest.raises(ValueError, match=r"state\.json is not that of a run, .*: choose another folder"):
        opened(tmp_path, resume=resume)
    assert [(tmp_path / name).read_text() for name in ("state.json", "summary.json")] == [content, "theirs"]


@pytest.mark.parametrize("line", ['{"stage": "sel', "[]", '{"stage": "x", "epoch": 1}', '{"stage": "tune"}', "\x00"])
def test_run_with_a_damaged_history(tmp_path, line):
    run = opened(tmp_path)
    run.append_history(row())
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"line 2 of .*history\.jsonl is damaged"):
        _ = run.history
    # said before anything is trained
    with pytest.raises(ValueError, match=r"line 2 of .*history\.jsonl is damaged"):
        opened(tmp_path)
    assert opened(tmp_path, resume=False).history == []


def test_a_number_that_changed_in_the_history_is_noticed(tmp_path):
    run, path = opened(tmp_path), tmp_path / "history.jsonl"
    run.append_history(row() | {"loss": 2.125})
    path.write_text(path.read_text().replace("2.125", "2.126"))
    with pytest.raises(ValueError, match=r"line 1 of .*history\.jsonl is damaged: it is not what was written"):
        _ = run.history


def test_a_history_of_an_earlier_release_is_read(tmp_path):
    run = opened(tmp_path)
    (tmp_path / "history.jsonl").write_text(json.dumps(row()) + "\n")
    assert run.history == [row()]
    # and gone on with
    run.append_history(row() | {"epoch": 7})
    assert [r["epoch"] for r in run.history] == [row()["epoch"], 7]


def test_epochs_that_are_trained_again_are_forgotten(tmp_path):
    run = opened(tmp_path)
    rows = [row(epoch=1), row(epoch=2), row(epoch=3), row("tune", 1)]
    for each in rows:
        run.append_history(each)
    run.forget_after("select", 2.5)
    assert run.history == rows
    run.forget_after("select", 2.0)
    assert run.history == [rows[0], rows[1], rows[3]]
    run.forget_after("select", 0.0)
    assert run.history == [rows[3]]


def test_run_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write.*file/run"):
        opened(tmp_path / "file" / "run")


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(tmp_path, resume):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds adapter but no state\.json"):
        opened(tmp_path, {"recipe": 1}, resume)
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "mine"


def filled(folder):
    """A run folder with all that a run leaves, and with things of the user's own in it."""
    run = opened(folder)
    run.write_heads([(0, 1)], None)
    run.append_history(row())
    for name in ("select", "tune"):
        for inside in ("checkpoint-4", "checkpoint-8", "adapter", "checkpoint-best", "notes"):
            (folder / name / inside).mkdir(parents=True)
            (folder / name / inside / "trainer_state.json").write_text("{}")
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    (folder / "mine.txt").write_text("mine")
    run.record("select", {})
    run.record("tune", {})
    return run


USERS = {"mine.txt", "adapter/README.md"} | {
    f"{stage}/{name}/trainer_state.json" for stage in ("select", "tune") for name in ("checkpoint-best", "notes")
}


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}


def test_starting_over_takes_away_what_is_a_runs_own_and_nothing_else(tmp_path):
    filled(tmp_path)
    assert opened(tmp_path, resume=False).stage == "select"
    assert files_of(tmp_path) == USERS | {"state.json"}


@pytest.mark.parametrize("name", [*FOLDERS, "select/adapter", *FILES, "state.json"])
def test_links_are_refused_or_taken_away_and_never_followed(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    opened(folder)
    if name not in FILES and name != "state.json":
        (outside / "checkpoint-4").mkdir(parents=True)
        (outside / "checkpoint-4" / "trainer_state.json").write_text("{}")
        (outside / "adapter_config.json").write_text("{}")
    else:
        outside.write_bytes((folder / "state.json").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside)
    before = files_of(outside) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(ValueError, match=rf"{name} is a link"):
        opened(folder)
    assert opened(folder, resume=False).stage == "select"
    assert not (folder / name).is_symlink()
    assert (files_of(outside) if outside.is_dir() else outside.read_bytes()) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_in_a_folders_place_is_named_or_taken_away(tmp_path, name):
    opened(tmp_path)
    (tmp_path / name).write_text("notes of mine")
    with pytest.raises(ValueError, match=rf"{name} is a file, where a run has a folder"):
        opened(tmp_path)
    assert (tmp_path / name).read_text() == "notes of mine"
    assert opened(tmp_path, resume=False).stage == "select" and not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["", "tune", "tune/checkpoint-2"])
def test_what_refused_removals_have_left_goes_when_the_run_goes_on(tmp_path, name):
    opened(tmp_path)
    left = tmp_path / name / ".lofit-abcd1234"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"0")
    opened(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_folder_is_refused(path):
    with pytest.raises(ValueError, match="expected the path of a file or folder, got"):
        opened(path)


def test_a_folder_may_itself_be_reached_by_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    opened(tmp_path / "runs" / "a").record("select", {})
    assert opened(tmp_path / "disk" / "a").stage == "tune"


def test_a_run_that_is_killed_anywhere_while_it_starts_over_has_nothing_of_the_old_one(tmp_path, monkeypatch):
    new, number = {**IDENTITY, "data": "xyz"}, 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        filled(folder)
        with monkeypatch.context() as patched:
            killed_at(patched, number)
            try:
                opened(folder, new, resume=False)
            except Killed:
                pass
            else:
                break
        gc.collect()
        # whether or not it is told so again; before its first change, the old run is all there
        try:
            run = opened(folder, new)
        except ValueError:
            assert RunFolder(folder).stage == "done" and (folder / "adapter" / "adapter_config.json").exists()
            run = opened(folder, new, resume=False)
        assert (run.stage, run.metrics, run.heads, run.history) == ("select", {}, None, [])
        assert files_of(folder) - {f for f in files_of(folder) if ".lofit-" in f} <= USERS | {"state.json"}
    assert number > 15


def test_one_process_at_a_time(tmp_path):
    with RunFolder.open(tmp_path, IDENTITY, True) as run:
        for resume in (True, False):
            with pytest.raises(BlockingIOError, match=rf"cannot train in {tmp_path}: process {os.getpid()} on host"):
                opened(tmp_path, resume=resume)
        with pytest.raises(BlockingIOError), held(tmp_path):
            pytest.fail("two were inside")
        run.record("select", {})
    assert opened(tmp_path).stage == "tune"


def test_a_second_thread_is_refused_too(tmp_path):
    refused = []

    def second():
        try:
            opened(tmp_path)
        except BlockingIOError as error:
            refused.append(error)

    with RunFolder.open(tmp_path, IDENTITY, True):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_after_a_divergence_another_rate_is_the_same_run(tmp_path):
    def identity(**changes):
        return {**IDENTITY, "recipe": {"top": 2, "select_lr": 1.0, "tune_lr": 1.0, **changes}}

    run = opened(tmp_path, identity())
    with pytest.raises(ValueError, match="another recipe"):
        opened(tmp_path, identity(select_lr=0.5))
    run.note_divergence("select", 1.0, step=3)
    for changes in ({"tune_lr": 0.5}, {"select_lr": 0.5, "top": 3}, {"select_lr": 0.5, "top": 2.0}):
        with pytest.raises(ValueError, match="another recipe"):
            opened(tmp_path, identity(**changes))
    opened(tmp_path, identity(select_lr=0.5))
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["identity"]["recipe"]["select_lr"] == 0.5
    assert state["changed"] == [
        {"setting": "select_lr", "was": 1.0, "now": 0.5, "after": {"stage": "select", "lr": 1.0, "step": 3}}
    ]
    # once: until it diverges again
    with pytest.raises(ValueError, match="another recipe"):
        opened(tmp_path, identity(select_lr=0.25))


@pytest.mark.parametrize("content", ["", "[]", '{"identity": 3}', '{"identity": {"dtype": null}}', "{" * 50])
def test_no_dtype_of_what_is_no_run(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    assert dtype_of_run(tmp_path) is None
    assert dtype_of_run(tmp_path / "nothing") is None
