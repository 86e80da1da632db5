"""The adapter folder: what goes in comes out, and every way it can be broken has its own error."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lofit_fast import LofitConfig, handle_of, load, patch
from lofit_fast.patching import storage as adapter_module
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE, read_adapter
from tests.oracle import randomize
from tests.ordinary_sample import slow_if
from tests.patched_models import SOME, logits, snapshot
from tests.tiny_models import FAMILIES, HEAD_DIM, tiny_model

BOTH = LofitConfig(scale=[(1, 2), (0, 0)], offset=SOME, init_std=2e-3, seed=5)


@pytest.fixture
def folder(tmp_path):
    """A saved adapter of a tiny Llama."""
    handle = patch(tiny_model("llama"), BOTH)
    randomize(handle)
    return handle.save(tmp_path / "adapter")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def rewrite(folder: Path, **changes) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuses(model, folder: Path, error: type[Exception], *messages: str) -> None:
    before = snapshot(model)
    with pytest.raises(error) as raised:
        load(model, folder)
    assert all(message in str(raised.value) for message in messages), str(raised.value)
    assert snapshot(model) == before
    assert handle_of(model) is None


CONFIGS = [BOTH, LofitConfig(scale="all"), LofitConfig(offset="all"), LofitConfig(offset=SOME)]


# in the ordinary run a Llama has every config, the others both vectors at once; slow: every family every one
@pytest.mark.parametrize(
    "family, config",
    slow_if(lambda family, config: family != "llama" and config is not BOTH, list(product(FAMILIES, CONFIGS))),
)
def test_adapter_round_trip(family, config, tmp_path):
    model = tiny_model(family)
    handle = patch(model, config)
    randomize(handle)
    expected = logits(model)
    assert handle.save(tmp_path / "a") == tmp_path / "a"
    again = tiny_model(family)
    loaded = load(again, str(tmp_path / "a"))
    assert loaded.config == config
    assert loaded.model is again
    assert handle_of(again) is loaded
    pairs = zip(handle.named_parameters(), loaded.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("dtype, wide", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_adapter_round_trip_in_other_dtypes(tmp_path, dtype, wide):
    model = tiny_model("llama", dtype)
    handle = patch(model, BOTH)
    model.to(dtype)
    randomize(handle)
    handle.save(tmp_path)
    again = tiny_model("llama", dtype)
    loaded = load(again, tmp_path)
    again.to(dtype)
    assert {p.dtype for p in loaded.parameters()} == {wide}
    pairs = zip(handle.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in pairs)


def test_adapter_holds_the_selected_heads_only(folder):
    tensors = load_file(folder / TENSOR_FILE)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    rows = {"0.scale": 1, "0.offset": 1, "1.scale": 1, "1.offset": 2, "2.offset": 1}
    expected = {}
    for key, n in rows.items():
        layer, component = key.split(".")
        expected[f"base_model.model.model.layers.{layer}.self_attn.o_proj.lofit_{component}"] = (
            (n, HEAD_DIM),
            torch.float32,
        )
    assert shapes == expected


def test_adapter_folder_says_what_it_is(folder):
    assert names(folder) == [CONFIG_FILE, TENSOR_FILE]
    description = json.loads((folder / CONFIG_FILE).read_text())
    assert description["peft_type"].startswith("LOFIT: load this folder with lofit_fast.load")
    assert description["format_version"] == 2
    assert description["scale"] == [[1, 2], [0, 0]]
    assert description["fingerprint"] == {
        "model_type": "llama",
        "layers": 3,
        "heads": 4,
        "head_dim": 16,
        "hidden": 32,
    }
    with safe_open(folder / TENSOR_FILE, framework="pt") as file:
        metadata = file.metadata()
    # the header repeats the config
    assert metadata.keys() == {"format", "lofit"}
    assert metadata["format"] == "pt"
    assert json.loads(metadata["lofit"]) == description


def test_adapter_names_its_base_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    patch(model, BOTH).save(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base_model == str(tmp_path / "base")


def test_adapter_saved_again_replaces_the_old_one(folder):
    model = tiny_model("llama")
    handle = patch(model, LofitConfig(offset=[(2, 0)]))
    randomize(handle, seed=9)
    (folder / "README.md").write_text("mine")
    handle.save(folder)
    assert names(folder) == ["README.md", CONFIG_FILE, TENSOR_FILE]
    assert [name for name, _ in load(tiny_model("llama"), folder).named_parameters()] == ["2.offset"]


OTHERS = {
    "layers": ("llama", {"num_hidden_layers": 2}),
    "heads": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}),
    "hidden": ("llama", {"hidden_size": 48}),
    "family": ("mistral", {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_adapter_for_another_model_names_both(folder, other):
    family, changes = OTHERS[other]
    model = tiny_model(family, **changes)
    shape = [f"{key}={value!r}" for key, value in read_adapter(folder).fingerprint.as_dict().items()]
    from lofit_fast.patching.architectures import find_projections, fingerprint

    this = fingerprint(model, find_projections(model)).as_dict()
    refuses(model, folder, ValueError, "for another model", *shape, *[f"{k}={v!r}" for k, v in this.items()])


def test_adapter_on_a_patched_model_is_refused(folder):
    model = tiny_model("llama")
    handle = patch(model, LofitConfig(scale="all"))
    with pytest.raises(ValueError, match="already patched"):
        load(model, folder)
    assert handle_of(model) is handle


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_adapter_with_a_file_missing(folder, name):
    (folder / name).unlink()
    refuses(tiny_model("llama"), folder, FileNotFoundError, str(folder), name, "not found")


def test_adapter_folder_missing(tmp_path):
    refuses(tiny_model("llama"), tmp_path / "nowhere", FileNotFoundError, "nowhere", CONFIG_FILE, TENSOR_FILE)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name, message", [(TENSOR_FILE, "truncated"), (CONFIG_FILE, "not whole JSON")])
def test_adapter_truncated(folder, name, message, kept):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refuses(tiny_model("llama"), folder, ValueError, str(path), message)


@pytest.mark.parametrize("name, message", [(TENSOR_FILE, "not a safetensors file"), (CONFIG_FILE, "not whole JSON")])
def test_adapter_of_noise(folder, name, message):
    (folder / name).write_bytes(bytes(range(128, 256)) * 8)
    refuses(tiny_model("llama"), folder, ValueError, name, message)


@pytest.mark.parametrize("content, kind", [({"peft_type": "LORA", "r": 8}, "'LORA'"), ([1], "'list'"), ({}, "None")])
def test_adapter_of_another_kind(folder, content, kind):
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    refuses(tiny_model("llama"), folder, ValueError, "not a LoFiT adapter", f"got {kind}")


def test_adapter_of_a_newer_format(folder):
    rewrite(folder, format_version=4)
    refuses(tiny_model("llama"), folder, ValueError, "format version 4", "reads up to 3")


def test_adapter_of_the_first_format(folder):
    expected = [p.clone() for p in load(tiny_model("llama"), folder).parameters()]
    rewrite(folder, format_version=1, peft_type="LOFIT")
    tensors = load_file(folder / TENSOR_FILE)
    old = {name.removeprefix("base_model.model.model.").replace("lofit_", ""): t for name, t in tensors.items()}
    assert "layers.1.self_attn.o_proj.offset" in old
    save_file(old, folder / TENSOR_FILE)
    got = load(tiny_model("llama"), folder).parameters()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("key", ["format_version", "fingerprint", "scale", "offset", "init_std", "seed"])
def test_adapter_lacking_a_key(folder, key):
    description = json.loads((folder / CONFIG_FILE).read_text())
    del description[key]
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    refuses(tiny_model("llama"), folder, ValueError, CONFIG_FILE, f"lacks {key}")


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": {"model_type": "llama"}},
        {"fingerprint": None},
        {"fingerprint": {"layers": 3, "heads": 4, "head_dim": 16, "hidden": 32, "model_type": "llama", "more": 1}},
        {"scale": [[0, 1, 2]]},
        {"offset": "every"},
    ],
)
def test_adapter_with_a_value_of_the_wrong_kind(folder, changes):
    rewrite(folder, **changes)
    refuses(tiny_model("llama"), folder, ValueError, CONFIG_FILE, *changes)


def break_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE)


FIRST = "base_model.model.model.layers.1.self_attn.o_proj.lofit_offset"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({FIRST: torch.zeros(2, HEAD_DIM + 1)}), "offset of layer 1 is (2, 17), expected (2, 16)"),
        (lambda t: t.update({FIRST: torch.zeros(1, HEAD_DIM)}), "offset of layer 1 is (1, 16), expected (2, 16)"),
        (lambda t: t.pop(FIRST), "offset of layer 1 is None, expected (2, 16)"),
        (lambda t: t.update({"layers.2.self_attn.o_proj.scale": torch.zeros(1, HEAD_DIM)}), "expected None"),
        (lambda t: t.update({"lora_A.weight": torch.zeros(1)}), "foreign tensor 'lora_A.weight'"),
    ],
    ids=["width", "rows", "missing", "more", "foreign"],
)
def test_adapter_tensors_that_do_not_fit(folder, change, message):
    break_tensors(folder, change)
    refuses(tiny_model("llama"), folder, ValueError, message)


def test_adapter_naming_heads_beyond_the_model(folder):
    rewrite(folder, offset=[[0, 9]])
    refuses(tiny_model("llama"), folder, ValueError, "(0, 9)")


@pytest.mark.parametrize("fails", ["save", "write_json"])
def test_adapter_that_fails_to_write_leaves_nothing(folder, tmp_path, monkeypatch, fails):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    before = {name: (folder / name).read_bytes() for name in names(folder)}
    monkeypatch.setattr(adapter_module, fails, fail)
    handle = patch(tiny_model("llama"), LofitConfig(scale="all"))
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            handle.save(target)
    # the old adapter is whole, and of the new one there is no file
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert names(tmp_path / "new") == []


@pytest.mark.parametrize("below", ["", "sub/adapter"])
def test_adapter_into_a_folder_that_cannot_be(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    handle = patch(tiny_model("llama"), BOTH)
    with pytest.raises(OSError, match="cannot write to output folder .*file"):
        handle.save(tmp_path / "file" / below)
    assert names(tmp_path) == ["file"]


def test_vectors_are_not_taken_inside_folded(folder):
    handle = load(tiny_model("llama"), folder)
    randomize(handle, seed=8)
    before = snapshot(handle.model)
    with handle.folded(), pytest.raises(ValueError, match="which computes with the old ones: leave it first"):
        handle.take(read_adapter(folder))
    assert snapshot(handle.model) == before
    handle.take(read_adapter(folder))
