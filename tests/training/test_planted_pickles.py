"""The vectors in accelerate's states, and pickles planted in states and checkpoints: nothing of them is run."""

import contextlib
import pickle
import shutil
import warnings

import pytest
import torch

import lofit_fast as lf
from tests.planted_pickle import Planted
from tests.tiny_models import tiny_model, tokens
from tests.training.stock_trainers import patched, stock, told, vectors

# the second is accelerate's own way, which unpickles what it has written
WITH_ACCELERATE = {
    "follow": lambda accelerator, handle: lf.AdapterCheckpoints(handle).follow(accelerator),
    "register": lambda accelerator, handle: accelerator.register_for_checkpointing(lf.AdapterCheckpoints(handle)),
}


def accelerated(how):
    """(handle, accelerator, prepared model) with the vectors in the accelerator's states."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    handle, accelerator = patched(), Accelerator(cpu=True)
    model, _ = accelerator.prepare(handle.model, torch.optim.AdamW(handle.parameters(), lr=0.1))
    WITH_ACCELERATE[how](accelerator, handle)
    return handle, accelerator, model


@pytest.mark.parametrize("how", WITH_ACCELERATE)
def test_accelerate_saves_and_loads_the_vectors(how, tmp_path):
    handle, accelerator, model = accelerated(how)
    before = vectors(handle)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator.load_state(tmp_path)
        model(tokens())
    assert told(caught) == []
    assert torch.equal(vectors(handle), before)


def test_a_planted_pickle_shows_that_it_was_run(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_state_with_a_planted_pickle_runs_nothing(tmp_path):
    handle, accelerator, _ = accelerated("follow")
    accelerator.save_state(tmp_path / "state")
    assert not list((tmp_path / "state").glob("custom_checkpoint_*"))
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        shutil.copytree(tmp_path / "state", tmp_path / name)
        torch.save(Planted(tmp_path / "ran"), tmp_path / name / name)
        # random numbers that cannot be read, accelerate does without
        with contextlib.suppress(RuntimeError, pickle.UnpicklingError):
            accelerator.load_state(tmp_path / name)
        assert not (tmp_path / "ran").exists(), name


def test_a_checkpoint_with_a_planted_pickle_runs_nothing(tmp_path):
    handle = patched()
    stock(handle, tmp_path, [lf.AdapterCheckpoints(handle)]).train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        planted = tmp_path / name / "checkpoint-2"
        shutil.copytree(tmp_path / "checkpoint-2", planted)
        assert (planted / name).is_file()
        torch.save(Planted(tmp_path / "ran"), planted / name)
        with pytest.raises(pickle.UnpicklingError, match="eights"):
            stock(handle, tmp_path, [lf.AdapterCheckpoints(handle)]).train(resume_from_checkpoint=str(planted))
    assert not (tmp_path / "ran").exists()


def test_a_state_of_other_heads_or_none_is_refused_before_anything(tmp_path):
    handle, accelerator, _ = accelerated("follow")
    accelerator.save_state(tmp_path / "state")
    shutil.copytree(tmp_path / "state", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "lofit")
    other = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 0)]))
    other.save(tmp_path / "state" / "lofit" / "adapter")
    before = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}, vectors(handle)
    for folder, error, message in (("state", ValueError, "other heads"), ("bare", FileNotFoundError, "no adapter")):
        with pytest.raises(error, match=message):
            accelerator.load_state(tmp_path / folder)
    assert torch.equal(vectors(handle), before[1])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in handle.model.state_dict().items())


def test_following_needs_a_handle():
    with pytest.raises(ValueError, match=r"expected AdapterCheckpoints\(handle\)"):
        lf.AdapterCheckpoints().follow(None)
