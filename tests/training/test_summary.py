"""What a finished run leaves to read, whole or to be made again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training import summary

pytest.importorskip("matplotlib", reason="matplotlib is not installed: there are no pictures")


def result_of(model):
    """As of a short run."""
    handle = lf.patch(model, lf.LofitConfig(offset=[(0, 1)]))
    history = [{"stage": "tune", "epoch": 1, "loss": 1.0}]
    about = {"metrics": {"tune": {"seconds": 1.0}}, "heads": [(0, 1)], "scores": torch.ones(3, 4), "history": history}
    return SimpleNamespace(handle=handle, **about)


def test_a_summary_is_plain_json_where_nothing_is_clipped(llama, tmp_path):
    recipe = lf.Recipe(max_grad_norm=math.inf)
    told = summary.write_summary(tmp_path, result_of(llama), model="m", task="t", recipe=recipe, data_seed=1)
    assert "Infinity" not in json.dumps(told, allow_nan=False).replace('"Infinity"', "")
    assert json.loads((tmp_path / "summary.json").read_text()) == told
    assert told["recipe"]["max_grad_norm"] == "Infinity"


def test_a_summary_comes_after_its_pictures(llama, tmp_path, monkeypatch):
    result = result_of(llama)

    def write():
        summary.write_summary(tmp_path, result, model="m", task="t", recipe=lf.Recipe(), data_seed=1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(summary, "loss_curves", killed)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert not (tmp_path / "summary.json").exists()
    write()
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "heads.png", "loss.png"}
