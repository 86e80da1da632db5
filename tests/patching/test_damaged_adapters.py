"""Damaged adapter folders: a clear error, or the very same adapter; never other numbers, never other heads."""

import json
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofit_fast as lf
from lofit_fast.patching.seal import CONFIG_DIGEST, TENSOR_DIGEST
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE, read_adapter
from tests.mutations import BYTES, JSON, TENSORS
from tests.oracle import randomize
from tests.tiny_models import HEAD_DIM, tiny_model

KINDS = [(CONFIG_FILE, kind) for kind in (*BYTES, *JSON)] + [(TENSOR_FILE, kind) for kind in (*BYTES, *TENSORS)]
TIMES = {"deep": 2, "deep header": 2, "40,000 heads": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved adapter: its folder's files, and what is read from them."""
    folder = tmp_path_factory.mktemp("adapter")
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale=[(1, 2), (0, 0)], offset=[(0, 1), (1, 0), (1, 3)]))
    randomize(handle)
    handle.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, read_adapter(folder)


@pytest.mark.parametrize("name, kind", KINDS)
def test_a_damaged_folder_is_an_error_or_the_same_adapter(saved, name, kind, tmp_path):
    files, whole = saved
    mutate = {**BYTES, **(JSON if name == CONFIG_FILE else TENSORS)}[kind]
    for seed in range(TIMES.get(kind, 12)):
        damaged = {**files, name: mutate(files[name], Random(f"{name} {kind} {seed}"))}
        for file, content in damaged.items():
            (tmp_path / file).write_bytes(content)
        try:
            got = read_adapter(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and len(str(error)) < 2000
            continue
        assert got.config == whole.config and got.fingerprint == whole.fingerprint
        assert got.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(got.tensors[key], vectors) for key, vectors in whole.tensors.items())


def test_every_flipped_bit_of_the_numbers_is_noticed(saved, tmp_path):
    files, _ = saved
    raw = files[TENSOR_FILE]
    begin = 8 + int.from_bytes(raw[:8], "little")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for at in range(begin, len(raw), 7):
        (tmp_path / TENSOR_FILE).write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=f"{tmp_path / TENSOR_FILE}( is damaged: its tensors are not|: .*not fin)"):
            read_adapter(tmp_path)


def as_earlier(folder, files, change):
    """The folder as earlier releases wrote it, with other tensors."""
    content = json.loads(files[CONFIG_FILE])
    content = {k: v for k, v in content.items() if k not in (TENSOR_DIGEST, CONFIG_DIGEST, "base_digest")}
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    (folder / TENSOR_FILE).write_bytes(files[TENSOR_FILE])
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})


def test_folders_of_earlier_releases_load(saved, tmp_path):
    files, whole = saved
    as_earlier(tmp_path, files, lambda tensors: None)
    got = read_adapter(tmp_path)
    assert got.config == whole.config and got.base_digest == ""
    assert all(torch.equal(got.tensors[key], vectors) for key, vectors in whole.tensors.items())
    # of an adapter without a digest of its base nothing is said
    lf.load(tiny_model("llama", seed=3), tmp_path, strict=True)


PLACE = "base_model.model.model.layers.0.self_attn.o_proj.lofit_offset"
ROW = torch.ones(1, HEAD_DIM)
EARLIER = {
    "not finite": ({PLACE: ROW * torch.nan}, "offset of layer 0 has numbers that are not finite"),
    "int8": ({PLACE: ROW.to(torch.int8)}, "offset of layer 0 in torch.int8: expected floating numbers"),
    "bool": ({PLACE: ROW.bool()}, "in torch.bool: expected floating"),
    "complex": ({PLACE: ROW.to(torch.complex64)}, "in torch.complex64: expected floating"),
    "float8": ({PLACE: ROW.to(torch.float8_e4m3fn)}, "in torch.float8_e4m3fn: expected floating"),
    "two names": ({PLACE.replace("lofit_", ""): ROW}, "holds offset of layer 0 twice, under two names"),
    "two places": ({PLACE.replace("self_attn.o_proj.lofit_offset", "mlp.down_proj.scale"): ROW}, "layer 0"),
    "zero before": ({PLACE.replace("layers.0", "layers.00"): ROW}, "foreign tensor"),
    "long": ({"a.1." * 100_000 + PLACE: ROW}, "foreign tensor 'a.1.a.1."),
}


@pytest.mark.parametrize("case", EARLIER)
def test_odd_tensors_of_earlier_releases_are_refused(case, saved, tmp_path):
    changes, message = EARLIER[case]
    as_earlier(tmp_path, saved[0], lambda tensors: tensors.update(changes))
    with pytest.raises(ValueError, match=message) as raised:
        read_adapter(tmp_path)
    assert str(tmp_path / TENSOR_FILE) in str(raised.value) and len(str(raised.value)) < 1000


def test_numbers_that_a_narrower_model_cannot_hold_are_refused(saved, tmp_path):
    as_earlier(tmp_path, saved[0], lambda tensors: tensors.update({PLACE: ROW.double() * 1e300}))
    with pytest.raises(ValueError, match="offset of layer 0 has numbers that are not finite"):
        lf.load(tiny_model("llama"), tmp_path)


def test_vectors_that_are_not_finite_are_not_saved(tmp_path):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    handle.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        handle.layers[1].offset[0, 0] = torch.inf
    with pytest.raises(ValueError, match="cannot save the adapter: offset of layer 1 has numbers that are not finite"):
        handle.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_adapter_gives_one_file(saved, tmp_path):
    for _ in range(3):
        handle = lf.patch(tiny_model("llama"), saved[1].config)
        randomize(handle)
        handle.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved[0]


def test_vectors_of_other_heads_are_not_taken(saved):
    _, whole = saved
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale=[(1, 2), (0, 0)], offset=[(0, 1), (1, 0), (1, 2)]))
    with pytest.raises(ValueError, match="cannot load offsets of other heads than the handle has"):
        handle.take(whole)
    # in another order they are the same
    handle.unpatch()
    lf.patch(handle.model, lf.LofitConfig(scale=[(0, 0), (1, 2)], offset=[(1, 3), (0, 1), (1, 0)])).take(whole)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_folder_in_the_place_of_a_file(name, saved, tmp_path):
    for file, content in saved[0].items():
        (tmp_path / file).mkdir() if file == name else (tmp_path / file).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=f"no adapter folder: {name} not found"):
        read_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        read_adapter(tmp_path / (TENSOR_FILE if name == CONFIG_FILE else CONFIG_FILE))
