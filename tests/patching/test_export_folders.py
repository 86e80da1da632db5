"""Folders that an export goes to: nobody's base is replaced, and a changed byte of an export is noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lofit_fast as lf
from lofit_fast.checksums import SUMS_FILE
from lofit_fast.files import whole_folder
from lofit_fast.models.load import load_model
from lofit_fast.patching.export_targets import TARGETS
from lofit_fast.patching.verify import check_export
from tests.oracle import randomize
from tests.stopped_writes import WHOLE, stopped
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


def handle_on(model, seed=7):
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    randomize(handle, seed=seed)
    return handle


@pytest.mark.parametrize("target", TARGETS)
def test_no_name_stands_for_the_working_folder(target, tmp_path, monkeypatch):
    if target in ("peft", "llama.cpp"):
        pytest.importorskip({"peft": "peft", "llama.cpp": "gguf"}[target])
    model, how = tiny_model("llama"), {"target": target}
    if target == "llama.cpp":
        how["template"] = write_tiny_gguf(tmp_path / "base.gguf", model)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="expected the path of a file or folder, got ''"):
        lf.export(handle_on(model), "", **how)
    assert not list(Path.cwd().iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def by_a_link(base):
    base.with_name("link").symlink_to(base)
    return base.with_name("link")


# where the export is asked to go, and what it says
WAYS = {
    "itself": (lambda base: base, "is the folder of the base model"),
    "around": (lambda base: base / ".." / base.name, "is the folder of the base model"),
    "link": (by_a_link, "is the folder of the base model"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_base_of_a_model_is_not_replaced(way, base):
    to, message = WAYS[way]
    before = content(base)
    handle = handle_on(transformers.AutoModelForCausalLM.from_pretrained(base))
    with pytest.raises(ValueError, match=message):
        lf.export(handle, to(base))
    assert content(base) == before


def test_nor_one_that_does_not_say_where_it_comes_from(base, monkeypatch):
    before = content(base)
    nameless = transformers.AutoModelForCausalLM.from_pretrained(base)
    nameless.config._name_or_path = ""
    monkeypatch.chdir(base.parent)
    relative = transformers.AutoModelForCausalLM.from_pretrained("base")
    monkeypatch.chdir("/")
    for model in (nameless, relative, tiny_model("llama")):
        with pytest.raises(
            ValueError, match="holds weights of another model .model.safetensors., which lofit_fast.exp"
        ):
            lf.export(handle_on(model), base)
    assert content(base) == before


def test_a_base_whose_files_are_links_keeps_them(base, tmp_path):
    before = content(base)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").symlink_to(base / "config.json")
    lf.export(handle_on(transformers.AutoModelForCausalLM.from_pretrained(base)), folder)
    assert content(base) == before


@pytest.fixture
def exported(tmp_path):
    handle = handle_on(tiny_model("llama"))
    lf.export(handle, tmp_path / "plain", tiny_tokenizer())
    return handle, tmp_path / "plain"


def test_an_export_loads_and_is_exported_over(exported):
    handle, folder = exported
    lf.verify_export(handle, folder)
    load_model(str(folder), device="cpu")
    randomize(handle, seed=8)
    lf.export(handle, folder, tiny_tokenizer())
    lf.verify_export(handle, folder)


def test_nothing_of_an_earlier_tokenizer_is_left(exported):
    handle, folder = exported
    lf.export(handle, folder, tiny_tokenizer(chat=True))
    assert (folder / "chat_template.jinja").exists()
    (folder / "mine.txt").write_text("mine")
    lf.export(handle, folder, tiny_tokenizer())
    assert not (folder / "chat_template.jinja").exists() and (folder / "mine.txt").read_text() == "mine"
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None
    # without one the tokenizer that is there stays, and is known the next time
    lf.export(handle, folder, tiny_tokenizer(chat=True))
    lf.export(handle, folder)
    assert (folder / "chat_template.jinja").exists()
    lf.export(handle, folder, tiny_tokenizer())
    assert not (folder / "chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


def test_a_changed_byte_of_any_file_is_noticed_when_it_is_loaded(exported):
    _, folder = exported
    names = json.loads((folder / SUMS_FILE).read_text())["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names.keys()
    for name in names:
        path = folder / name
        raw = path.read_bytes()
        for at in (0, len(raw) // 2, len(raw) - 1):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
            with pytest.raises(ValueError, match=f"{path} is damaged: it is not as it was written"):
                load_model(str(folder), device="cpu")
        path.write_bytes(raw)
    load_model(str(folder), device="cpu")


def test_a_change_that_rounding_would_allow_is_noticed_when_it_is_verified(exported):
    handle, folder = exported
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.o_proj.bias"
    tensors[name][3] = torch.nextafter(tensors[name][3], torch.tensor(9.0))
    save_file(tensors, path, metadata={"format": "pt"})
    for proof in (check_export, lf.verify_export):
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            proof(handle, folder)


def test_an_export_that_is_killed_while_it_replaces_another_is_never_half_of_each(exported):
    _, folder = exported
    names = ("config.json", "model.safetensors", "generation_config.json")

    # stands in for the second export: its files, moved as `export` moves them
    def write():
        with whole_folder(folder, last="config.json", withdraw=True) as scratch:
            for name in names:
                (scratch / name).write_text("new")

    first = content(folder)
    for at in range(1, 40):
        shutil.rmtree(folder)
        folder.mkdir()
        for name, raw in first.items():
            (folder / name).write_bytes(raw)
        end = stopped(write, folder, at, "killed")
        if (folder / "config.json").exists():
            assert len({(folder / name).read_bytes() == b"new" for name in names}) == 1
        if end == WHOLE:
            break
    assert end == WHOLE and at > 5
