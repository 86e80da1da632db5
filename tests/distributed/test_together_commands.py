"""Commands whose processes hold one base together: what one process prints and writes, or why not, in one line."""

import json

import pytest

from tests.cli.calling import as_json, call
from tests.distributed.launches import error_of, launched
from tests.distributed.same_runs import assert_same_logits, assert_same_run

pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers without tp_plan")
pytestmark = pytest.mark.distributed
ON_CPU = ("--dtype", "float32", "--device", "cpu")
CUT = ("--tensor-parallel", *ON_CPU)


def test_answers_are_those_of_one_process(model):
    asked = ("generate", "--model", model, "--max-new-tokens", "4", "--prompt", "ab", "--prompt", "cd=")
    first, second = launched(2, *asked, *CUT)
    assert (first.code, first.out) == (0, call(*asked, *ON_CPU).stdout), first.err
    assert tuple(second) == (0, "", "")


@pytest.mark.slow
def test_training_and_judging_are_those_of_one_process(model, data, tmp_path):
    asked = ("train", "--model", model, "--data", data, "--top", "3", "--batch-size", "5")
    asked += ("--select-epochs", "2", "--tune-epochs", "2")
    first, second = launched(2, *asked, *CUT, "--json", "-o", tmp_path / "two")
    assert first.code == 0 and (second.code, second.out) == (0, ""), first.err + second.err
    report, alone = json.loads(first.out), as_json(*asked, *ON_CPU, "-o", tmp_path / "one")
    assert report.keys() == alone.keys() and report["n_heads"] == 3
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert_same_logits(model, tmp_path / "two", tmp_path / "one")
    judged = ("eval", "--model", model, "--data", data, "--adapter", tmp_path / "two" / "adapter")
    first, second = launched(2, *judged, *CUT, "--json")
    assert json.loads(first.out) == as_json(*judged, *ON_CPU) and (second.code, second.out) == (0, "")


@pytest.mark.slow
def test_heads_are_chosen_as_in_one_process(model, data, tmp_path):
    asked = ("select", "--model", model, "--data", data, "--top", "3", "--batch-size", "5", "--select-epochs", "1")
    asked += tuple(part for name in ("saliency", "lofit", "random") for part in ("--method", name))
    first, second = launched(2, *asked, *CUT, "--json", "-o", tmp_path / "two")
    assert first.code == 0 and (second.code, second.out) == (0, ""), first.err + second.err
    alone = as_json(*asked, *ON_CPU, "-o", tmp_path / "one")
    for mine, its in zip(json.loads(first.out)["methods"], alone["methods"], strict=True):
        assert (mine["method"], mine["heads"]) == (its["method"], its["heads"])
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    # and without a folder of one's own
    first, second = launched(2, *asked, *CUT, "--json")
    assert (
        first.code == second.code == 0 and json.loads(first.out)["methods"][1]["heads"] == alone["methods"][1]["heads"]
    )


@pytest.mark.slow
def test_a_dry_run_and_a_profiled_fast_one(model, data, tmp_path):
    asked = ("train", "--model", model, "--data", data, "--top", "2", "--dry-run")
    first, second = launched(2, *asked, *CUT, "--json")
    report, alone = json.loads(first.out), as_json(*asked, *ON_CPU)
    assert report["engine"] == alone["engine"] and (second.code, second.out) == (0, ""), first.err
    asked = ("train", "--model", model, "--data", data, "--top", "2", "--fast", "--profile")
    asked += ("--tune-epochs", "1", "--batch-size", "1")
    first, second = launched(2, *asked, *CUT, "--json", "-o", tmp_path / "run")
    assert json.loads(first.out)["n_heads"] == 2 and (second.code, second.out) == (0, ""), first.err + second.err
    assert list((tmp_path / "run" / "profile").iterdir()) and (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.slow
def test_what_cannot_be_cut_is_refused(model, data, tmp_path):
    words = "--nproc-per-node N"
    assert words in call("generate", "--model", model, "--prompt", "a", *CUT, code=1).output
    train = ("train", "--model", model, "--data", data, "-o", tmp_path / "run", *CUT)
    said = error_of(launched(3, *train))
    assert said.startswith("3 processes do not divide 4 heads of ") and "4 heads and 2 heads of keys and values" in said
    select = ("select", "--model", model, "--data", data, "--method", "all", *CUT)
    assert error_of(launched(2, *select)).startswith("--tensor-parallel is not for iti_probe, probing_layers")
    said = error_of(launched(2, *train, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"))
    assert "accelerate is configured for FSDP, but the model is tensor-parallel already" in said
    assert not (tmp_path / "run").exists()
