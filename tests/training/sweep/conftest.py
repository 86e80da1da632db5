"""What several tests of sweeps stand on."""

import pytest

from lofit_fast.training import objectives, two_steps
from lofit_fast.training import summary as report_module
from tests.training.sweep.small_sweeps import written_data


@pytest.fixture
def bare(monkeypatch):
    """Without the pictures and the answers of each run, which are tested elsewhere."""
    for name in ("heads_map", "loss_curves"):
        monkeypatch.setattr(report_module, name, lambda *_: None)
    monkeypatch.setattr(objectives, "exact_match_accuracy", lambda *_, **__: 0.5)


@pytest.fixture
def data(tmp_path):
    """The path of ten examples."""
    return written_data(tmp_path)


@pytest.fixture
def trainings(monkeypatch):
    """The stages that were really trained, as (stage, learning rate)."""
    done = []
    train = two_steps.train

    def noting(handle, data, schedule, engine, *, folder, **how):
        done.append((folder.name, schedule.lr))
        return train(handle, data, schedule, engine, folder=folder, **how)

    monkeypatch.setattr(two_steps, "train", noting)
    return done
