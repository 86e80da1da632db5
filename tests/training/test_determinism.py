"""The same seed gives the same adapter, bit for bit, for every knob of the engine, and after an interruption too."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.pack import GROUPED
from lofit_fast.training import Engine
from lofit_fast.training.begun_with import as_begun, begun_with
from lofit_fast.training.run_folder import RunFolder
from tests.tiny_models import tiny_model
from tests.training.tiny_runs import EXAMPLES, fit, vectors

ANSWER = {"positions": "answer"}
KNOBS = {
    "defaults": ({}, {}),
    "eager": ({"attention": "eager"}, {}),
    "sdpa": ({"attention": "sdpa"}, {}),
    "grouped": ({"attention": GROUPED, "packing": True}, {}),
    "causal": ({"attention": "lofit_causal", "packing": False}, {}),
    "in no order of length": ({"group_by_length": False}, {}),
    "narrow": ({"narrow": True}, {}),
    "large pages": ({"large_pages": True}, {}),
    "prepacked": ({"prepack": True}, {}),
    "int8": ({"frozen_products": "int8"}, {}),
    "prefix cache": ({"prefix_cache_gb": 0.1}, {"min_layer": 1}),
    "prompt cache": ({"prompt_cache_gb": 0.1}, ANSWER),
    "no prompt cache": ({"prompt_cache_gb": 0.0}, ANSWER),
    "accumulation": ({}, {"accumulation_steps": 2}),
    "verified": ({"verify": True}, {}),
}
QUICK = {"top": 2, "select_epochs": 1, "tune_epochs": 2, "batch_size": 4}
# what the fewest others run through
SAMPLE = ("defaults", "prompt cache")


def adapter(folder, knobs, changes):
    # both steps are trained alike: once is enough of the first
    how = {"engine": Engine(**knobs), "heads": None if knobs == {} else [(1, 2), (2, 0)]}
    result = fit(tiny_model("llama"), folder, lf.Recipe(**QUICK, **changes), EXAMPLES[:8], **how)
    return torch.cat([vector.flatten() for vector in vectors(result.handle)])


def cut(self, row):
    if (row["stage"], row["epoch"]) == ("tune", 2):
        raise KeyboardInterrupt
    self._write_history([*self.history, row])


def check(tmp_path, monkeypatch, knobs, changes):
    torch.manual_seed(1)
    first = adapter(tmp_path / "first", knobs, changes)
    torch.manual_seed(2)
    assert adapter(tmp_path / "again", knobs, changes).equal(first)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append_history", cut)
        adapter(tmp_path / "cut", knobs, changes)
    torch.manual_seed(3)
    assert adapter(tmp_path / "cut", knobs, changes).equal(first)


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in KNOBS]
)
def test_one_seed_is_one_adapter(tmp_path, monkeypatch, name):
    check(tmp_path, monkeypatch, *KNOBS[name])


@pytest.mark.slow
def test_one_seed_is_one_adapter_with_compiled_layers(tmp_path, monkeypatch, quick_compiler):
    check(tmp_path, monkeypatch, {"compile": True}, {})


def test_every_knob_is_among_them():
    tried = {knob for knobs, _ in KNOBS.values() for knob in knobs} | {"compile"}
    assert tried == set(Engine.__dataclass_fields__)


def test_a_run_goes_on_with_the_threads_it_began_with(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    seen = []
    model = tiny_model("llama")
    model.register_forward_pre_hook(
        lambda *_: seen.append(torch.get_num_threads()) if torch.is_grad_enabled() else None
    )
    recipe = lf.Recipe(**QUICK)
    try:
        torch.set_num_threads(3)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(RunFolder, "append_history", cut)
            fit(model, tmp_path, recipe, EXAMPLES[:8])
        assert set(seen) == {3}
        seen.clear()
        torch.set_num_threads(2)
        fit(model, tmp_path, recipe, EXAMPLES[:8])
        assert set(seen) == {3} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "threads" in line]
    assert said == "the step 'tune' was begun with threads 3, now 2 (taken again)"


def test_what_cannot_be_taken_again_is_said(capsys):
    model = tiny_model("llama")
    now = begun_with(model)
    assert now["device"].startswith("CPU") and now["threads"] == torch.get_num_threads()
    for kept in (now, {}):
        with as_begun(kept, model, "tune"):
            assert torch.get_num_threads() == now["threads"]
    assert capsys.readouterr().err == ""
    with as_begun({**now, "torch": "2.0", "autotune": "abc", "threads": "many"}, model, "tune"):
        assert torch.get_num_threads() == now["threads"]
    (said,) = capsys.readouterr().err.splitlines()
    assert f"torch 2.0, now {torch.__version__}" in said and "autotune abc, now None" in said and "last bits" in said
