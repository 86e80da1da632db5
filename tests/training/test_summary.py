"""What a finished run leaves to read, whole or to be made again."""

from types import SimpleNamespace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training import summary

pytest.importorskip("matplotlib", reason="matplotlib is not installed: there are no pictures")


def test_a_summary_comes_after_its_pictures(llama, tmp_path, monkeypatch):
    handle = lf.patch(llama, lf.LofitConfig(offset=[(0, 1)]))
    history = [{"stage": "tune", "epoch": 1, "loss": 1.0}]
    about = {"metrics": {"tune": {"seconds": 1.0}}, "heads": [(0, 1)], "scores": torch.ones(3, 4), "history": history}
    result = SimpleNamespace(handle=handle, **about)

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
