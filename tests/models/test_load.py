"""Loading base models: names that lead somewhere, names that do not, and GGUF files converted once."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.models import load
from lofit_fast.training.engine.attention_choice import best_attention
from tests.tiny_families import tiny_config, tiny_family
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama with its tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", list(load.ALIASES))
@pytest.mark.parametrize("found", [None, Path("/no/such/file.gguf")])
def test_a_packaged_model_that_is_not_installed(monkeypatch, name, found):
    row = load.ALIASES[name]
    monkeypatch.setitem(load.ALIASES, name, replace(row, locate=lambda: found))
    with pytest.raises(FileNotFoundError) as error:
        load.load_model(name)
    assert name in str(error.value)
    assert row.install in str(error.value)
    assert row.install.startswith("pip install")


def test_aliases_are_looked_for_without_importing_them(monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda package: None)
    assert load.smollm2_file() is None
    assert load.gemma3_file() is None


@pytest.mark.parametrize("family", ["llava", "gemma3", "emu3", "mllama"])
def test_models_of_images_and_text_are_loaded(family, tmp_path):
    saved = tiny_family(family)
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load.load_model(str(tmp_path), dtype="float32", device="cpu")
    # of mllama the text part
    assert type(model) is type(saved) or family == "mllama"
    with torch.no_grad():
        assert model(tokens()).logits.equal(saved(tokens()).logits)


def test_a_folder_without_some_of_the_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a LlamaForCausalLM, model\.layers\.1\.mlp\.up_proj"):
        load.load_model(str(folder), device="cpu")


def cut(folder, name):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: len(raw) // 2])


BROKEN = {
    "cut weights": lambda folder: cut(folder, "model.safetensors"),
    "cut config": lambda folder: cut(folder, "config.json"),
    "cut tokenizer": lambda folder: cut(folder, "tokenizer.json"),
    "deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000),
    "a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "Latin": lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "\xe4"}'),
    "text for a size": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": "x"')
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_names_itself(case, folder):
    BROKEN[case](folder)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        load.load_model(str(folder), device="cpu")


def test_a_packaged_model_that_was_put_together_by_halves(tmp_path, monkeypatch):
    whole = b"GGUF and the rest"

    class Package:
        EXPECTED_SHA256 = hashlib.sha256(whole).hexdigest()

        @staticmethod
        def assemble(path):
            # as the package does
            if path.exists():
                raise FileExistsError(path)
            path.write_bytes(whole)

    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(load, "_installed", lambda package: tmp_path)
    monkeypatch.setattr(load, "import_module", lambda name: Package)
    for left in (None, b"GGUF and"):
        if left is not None:
            (tmp_path / "gemma-3-270m-q4_k_m.gguf").write_bytes(left)
        assert load.gemma3_file().read_bytes() == whole
    assert load.gemma3_file() == tmp_path / "gemma-3-270m-q4_k_m.gguf"


def test_a_config_of_no_language_model(tmp_path):
    tiny_config("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'vit' is no language model.*expected one that AutoModelForCausalLM"):
        load.load_model(str(tmp_path), device="cpu")


def test_an_unknown_dtype(folder):
    with pytest.raises(ValueError, match=r"unknown dtype 'float8'.*float32, bfloat16, float16"):
        load.load_model(str(folder), dtype="float8")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "~no.body/m", "a/b/c"])
def test_a_missing_folder(name):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load.load_model(name)


def test_a_gguf_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"")
    assert load.gguf_file("~/a.gguf") == tmp_path / "a.gguf"
    with pytest.raises(FileNotFoundError, match="no such GGUF file: ~/b.gguf"):
        load.gguf_file("~/b.gguf")


@pytest.mark.parametrize("name", ["missing.gguf", "/no/such/file.gguf"])
def test_a_missing_gguf_file(name):
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        load.load_model(name)


def test_a_hub_id_that_cannot_be_resolved():
    # transformers' own words: offline they do not name it
    with pytest.raises(OSError):
        load.load_model("nobody/nothing")


def test_loading_a_folder(folder):
    model, tokenizer = load.load_model(str(folder), dtype="float32", device="cpu")
    expected = tiny_model("llama")
    with torch.no_grad():
        assert model(tokens()).logits.equal(expected(tokens()).logits)
    assert not model.training
    assert tokenizer("ab=")["input_ids"] == tiny_tokenizer()("ab=")["input_ids"]


def test_loading_a_folder_from_where_it_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("model", "./model", "~/model"):
        model, _ = load.load_model(name, dtype="bfloat16", device="cpu")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_loading_gives_a_padding_token(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    _, loaded = load.load_model(str(folder))
    assert loaded.pad_token == loaded.eos_token == "</s>"


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [("float32", "eager", "eager"), ("float32", "auto", "sdpa"), ("bfloat16", "auto", "sdpa")],
)
def test_attention_is_passed_on(folder, dtype, asked, expected):
    model, _ = load.load_model(str(folder), dtype=dtype, device="cpu", attention=asked)
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize("name", ["flash_attention_2", "unheard_of"])
def test_an_attention_that_is_not_here_is_refused(folder, name):
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded with attention '{name}': "):
        load.load_model(str(folder), dtype="float32", device="cpu", attention=name)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_family_without_sdpa_loads_for_a_gpu(family, tmp_path, monkeypatch):
    tiny_family(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    moved = []
    monkeypatch.setattr(load, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(load, "best_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, device: moved.append(device.type) or self)
    model, _ = load.load_model(str(tmp_path))
    assert (moved, model.dtype) == (["cuda"], torch.bfloat16)
    # nobody asks by name for what transformers would refuse, and what is chosen for CUDA runs
    assert model.config._attn_implementation == best_attention(model, torch.device("cuda"))
    assert model(tokens()).logits.isfinite().all()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LOFIT_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert load.cache_folder() == Path.home() / ".cache" / "lofit-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load.cache_folder() == tmp_path / "xdg" / "lofit-fast"
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "mine"))
    assert load.cache_folder() == tmp_path / "mine"


# tests/test_real.py loads it too
@pytest.mark.slow
@pytest.mark.real
def test_smollm2(monkeypatch):
    model, tokenizer = load.load_model("smollm2", dtype="float32", device="cpu")
    assert model.config.num_hidden_layers == 30
    text = "The capital of France is Paris."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.isfinite().all()
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    (answer,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=6)
    assert "Paris" in answer
    assert tokenizer.pad_token_id is not None

    # a second load finds the converted folder, and does not open the GGUF file's tensors
    opened = []
    original = transformers.AutoModelForCausalLM.from_pretrained

    def watching(*args, **options):
        opened.append((args, options))
        return original(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watching)
    again, _ = load.load_model("smollm2", dtype="float32", device="cpu")
    assert len(opened) == 1
    assert "gguf_file" not in opened[0][1]
    assert os.path.isfile(Path(opened[0][0][0]) / "conversion.json")
    with torch.no_grad():
        assert again(torch.tensor([ids])).logits.equal(logits)
