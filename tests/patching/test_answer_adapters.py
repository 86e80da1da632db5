"""Adapters for answers on disk, and what cannot be made of them."""

import json
import pickle

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.storage import CONFIG_FILE, read_adapter
from lofit_fast.patching.verify import check_export
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens


def saved(folder, positions="answer"):
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset="all", positions=positions))
    randomize(handle)
    handle.save(folder)
    return model, handle


def changed(folder, **entries):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_config_takes_two_words():
    assert lf.LofitConfig(offset="all").positions == "all"
    for wrong in ("answers", None, True, ["answer"]):
        with pytest.raises(ValueError, match="expected positions to be 'all' or 'answer'"):
            lf.LofitConfig(offset="all", positions=wrong)
        with pytest.raises(ValueError, match="expected positions to be 'all' or 'answer'"):
            lf.Recipe(positions=wrong)


def test_a_folder_says_so_and_loads_so(tmp_path):
    model, _ = saved(tmp_path)
    loaded = tiny_model("llama")
    assert lf.load(loaded, tmp_path).config.positions == "answer"
    with pytest.raises(ValueError, match="does not say where"):
        loaded(tokens())
    assert torch.equal(loaded(tokens(), labels=tokens()).logits, model(tokens(), labels=tokens()).logits)
    assert pickle.loads(pickle.dumps(lf.LofitConfig(offset="all", positions="answer"))).positions == "answer"


def test_earlier_releases_refuse_the_folder_and_read_all_others(tmp_path):
    saved(tmp_path / "answer")
    saved(tmp_path / "all", "all")
    versions = {
        name: json.loads((tmp_path / name / CONFIG_FILE).read_text())["format_version"] for name in ("answer", "all")
    }
    # they read up to 2, and would let these vectors act everywhere
    assert versions == {"answer": 3, "all": 2}


def test_folders_without_the_field_act_everywhere(tmp_path):
    saved(tmp_path, "all")
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "positions"}))
    assert read_adapter(tmp_path).config.positions == "all"
    changed(tmp_path, positions="prompt")
    with pytest.raises(ValueError, match="does not describe an adapter: expected positions"):
        lf.load(tiny_model("llama"), tmp_path)


def test_vectors_of_other_positions_are_not_taken(tmp_path):
    _, answers = saved(tmp_path)
    everywhere = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    before = [parameter.clone() for parameter in everywhere.parameters()]
    with pytest.raises(ValueError, match="positions='answer' into a handle with positions='all'"):
        everywhere.take(read_adapter(tmp_path))
    states = [lf.AdapterCheckpoints(handle).state_dict() for handle in (answers, everywhere)]
    for handle, state in ((everywhere, states[0]), (answers, states[1])):
        with pytest.raises(ValueError, match="other heads or positions"):
            lf.AdapterCheckpoints(handle).load_state_dict(state)
    assert all(a.equal(b) for a, b in zip(before, everywhere.parameters(), strict=True))


@pytest.mark.parametrize("make", ["merge", "export", "check_export", "verify_export"])
def test_no_plain_model_is_made_of_it(tmp_path, make):
    model, handle = saved(tmp_path / "adapter")
    calls = {
        "merge": handle.merge,
        "export": lambda: lf.export(handle, tmp_path / "plain"),
        "check_export": lambda: check_export(handle, tmp_path),
        "verify_export": lambda: lf.verify_export(handle, tmp_path),
    }
    with pytest.raises(ValueError, match="a plain model cannot tell a prompt from an answer"):
        calls[make]()
    assert lf.handle_of(model) is handle
    assert not (tmp_path / "plain").exists()


def test_peft_refuses_the_folder(tmp_path):
    peft = pytest.importorskip("peft")
    import lofit_fast.peft as bridge

    saved(tmp_path)
    with pytest.raises(ValueError, match="not for models of PEFT"):
        peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="not for models of PEFT"):
        bridge.LofitPeftConfig(offset="all", positions="answer")
