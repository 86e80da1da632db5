"""An adapter saved over another, and stopped at every file operation: the folder holds one of the two, whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofit_fast as lf
from lofit_fast.patching.seal import CONFIG_DIGEST, TENSOR_DIGEST
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE, read_adapter, save_adapter
from tests.oracle import randomize
from tests.stopped_writes import DEAD, REFUSED, WHOLE, stopped
from tests.tiny_models import tiny_model

# of the same shapes, so that one's tensors fit the other's heads
OLD, NEW = [(0, 1), (1, 0), (1, 3)], [(0, 2), (1, 1), (1, 2)]


def adapter_of(heads, seed):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=heads))
    randomize(handle, seed=seed)
    return handle.adapter()


def as_earlier_releases_wrote_it(folder):
    path = folder / CONFIG_FILE
    description = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in description.items() if k not in (TENSOR_DIGEST, CONFIG_DIGEST)}))
    save_file(load_file(folder / TENSOR_FILE), folder / TENSOR_FILE, metadata={"format": "pt"})


def is_same(got, expected) -> bool:
    equal = all(torch.equal(got.tensors[key], vectors) for key, vectors in expected.tensors.items())
    return got.config == expected.config and got.tensors.keys() == expected.tensors.keys() and equal


CASES = [("this release", "killed")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("this release", "full"), ("an earlier release", "killed"), ("nothing", "killed"))
]


@pytest.mark.parametrize("before, how", CASES)
def test_a_save_that_is_stopped_anywhere_leaves_the_old_adapter_or_the_new_one(before, how, tmp_path):
    old, new = adapter_of(OLD, 1), adapter_of(NEW, 2)
    seen, ends = set(), []
    for at in range(1, 60):
        folder = tmp_path / f"{at}"
        if before != "nothing":
            save_adapter(old, folder)
        if before == "an earlier release":
            as_earlier_releases_wrote_it(folder)
        ends.append(stopped(lambda folder=folder: save_adapter(new, folder), folder, at, how))
        try:
            got = read_adapter(folder)
            assert is_same(got, old) or is_same(got, new)
            seen.add("old" if is_same(got, old) else "new")
        except FileNotFoundError:
            assert before == "nothing"
            seen.add("none")
        # the next save works, and clears away what was left
        save_adapter(new, folder)
        assert is_same(read_adapter(folder), new)
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSOR_FILE]
        if ends[-1] == WHOLE:
            break
    assert set(ends[:-1]) == {DEAD if how == "killed" else REFUSED} and ends[-1] == WHOLE
    assert len(ends) > 5
    assert seen == {"none" if before == "nothing" else "old", "new"}


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_reader_between_two_saves_gets_one_of_them(name, tmp_path, monkeypatch):
    old, new = adapter_of(OLD, 1), adapter_of(NEW, 2)
    save_adapter(old, tmp_path)
    opened, plain = [], Path.open

    def then_replaced(path, *args, **options):
        file = plain(path, *args, **options)
        if path == tmp_path / name and not opened:
            opened.append(path)
            save_adapter(new, tmp_path)
        return file

    monkeypatch.setattr(Path, "open", then_replaced)
    got = read_adapter(tmp_path)
    assert opened
    # the old config was read already: the file of tensors decides
    assert is_same(got, new if name == CONFIG_FILE else old)
    assert is_same(read_adapter(tmp_path), new)
