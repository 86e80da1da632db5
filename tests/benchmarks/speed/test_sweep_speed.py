"""The sweep's benchmark times commands that have really trained: each must leave its adapters."""

import pytest

from benchmarks.speed.step import sweep_speed


def leaving(*folders):
    """A stand-in for a command: adapters in these folders and nothing else."""

    def run(*arguments):
        assert arguments[:2] == ("-m", "lofit_fast.cli")
        for folder in folders:
            (folder / "adapter").mkdir(parents=True)
            (folder / "adapter" / "adapter_model.safetensors").touch()

    return run


def test_a_command_that_trains_is_timed(tmp_path, monkeypatch):
    run = leaving(tmp_path / "runs" / "a", tmp_path / "runs" / "b", tmp_path / "step1" / "1" / "select")
    monkeypatch.setattr(sweep_speed, "run_python", run)
    assert sweep_speed.timed(tmp_path, 2, "sweep", "grid.toml") > 0


@pytest.mark.parametrize("found", [0, 1, 3])
def test_a_command_that_leaves_other_adapters_is_not_timed(found, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_speed, "run_python", leaving(*(tmp_path / str(n) for n in range(found))))
    with pytest.raises(RuntimeError, match=f"left {found} adapters in .*, expected 2"):
        sweep_speed.timed(tmp_path, 2, "sweep", "grid.toml")
