"""Adapter folders written by earlier releases, one of each format version, load and compute what they did."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lofit_fast import handle_of, load
from lofit_fast.patching.storage import CONFIG_FILE, READ_VERSIONS, TENSOR_FILE
from tests.masked_hook import MaskedHook
from tests.oracle import vectors_of
from tests.patched_models import logits
from tests.tiny_models import HEAD_DIM, tiny_model

OLDER = Path(__file__).parent / "older"
FOLDERS = sorted(path.name for path in OLDER.iterdir())
SCALE, OFFSET = ((1, 2), (0, 0)), ((0, 1), (1, 0), (1, 3), (2, 2))


def written(component: str, layer: int, rows: int) -> torch.Tensor:
    """What every folder holds there, exact in float32: no two numbers of a layer are the same."""
    start = {"scale": 100, "offset": 0}[component] + 1000 * layer
    return torch.arange(start, start + rows * HEAD_DIM).view(rows, HEAD_DIM).float() / 4096


def test_there_is_a_folder_of_each_version():
    versions = {json.loads((OLDER / name / CONFIG_FILE).read_text())["format_version"] for name in FOLDERS}
    assert versions == set(READ_VERSIONS)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_older_adapter_computes_what_it_did(name):
    model = tiny_model("llama")
    before = logits(model)
    handle = load(model, OLDER / name)
    assert handle_of(model) is handle
    assert (handle.config.scale, handle.config.offset) == (SCALE, OFFSET)
    assert (handle.config.init_std, handle.config.seed) == (2e-3, 5)
    assert handle.config.positions == ("answer" if name == "version-3" else "all")
    for key, vectors in handle.vectors().items():
        assert torch.equal(vectors.detach(), written(*key, len(vectors))), key
    with nullcontext() if handle.acting is None else handle.acting_on("all"):
        got = logits(model)
    vectors = vectors_of(handle)
    handle.unpatch()
    hook = MaskedHook(model, r"model.layers.N.self_attn.o_proj", vectors)
    torch.testing.assert_close(got, logits(model), rtol=1e-5, atol=1e-5)
    hook.remove()
    assert torch.equal(logits(model), before) and not torch.allclose(got, before, atol=1e-3)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_older_adapter_saved_again_is_of_this_release(name, tmp_path):
    handle = load(tiny_model("llama"), OLDER / name)
    handle.save(tmp_path)
    again = load(tiny_model("llama"), tmp_path)
    assert again.config == handle.config
    assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), again.parameters(), strict=True))
    assert sum(tensor.numel() for tensor in load_file(tmp_path / TENSOR_FILE).values()) == 6 * HEAD_DIM
