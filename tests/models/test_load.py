"""Loading base models: names that lead somewhere, names that do not, and GGUF files converted once."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from lofit_fast.cpu.attention import GROUPED
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.models import load
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama with its tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A file that transformers reads as a tiny Llama, and the list of the times it did."""
    read = []

    def model(*args, gguf_file=None, **options):
        if gguf_file is None:
            return original(*args, **options)
        read.append((Path(options["pretrained_model_name_or_path"]) / gguf_file, options["dtype"]))
        return tiny_model("llama")

    original = transformers.AutoModelForCausalLM.from_pretrained
    original_tokenizer = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda *args, gguf_file=None, **options: (
            original_tokenizer(*args, **options) if gguf_file is None else tiny_tokenizer()
        ),
    )
    path = tmp_path / "some-model.Q4_1.gguf"
    path.write_bytes(b"GGUF and so on")
    return path, read


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
    assert load._smollm2() is None
    assert load._gemma3() is None


def test_an_unknown_dtype(folder):
    with pytest.raises(ValueError, match=r"unknown dtype 'float8'.*float32, bfloat16, float16"):
        load.load_model(str(folder), dtype="float8")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "a/b/c"])
def test_a_missing_folder(name):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load.load_model(name)


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
    ("given", "expected"), [("float16", torch.float16), ("float32", torch.float32), (torch.float64, torch.float64)]
)
def test_as_dtype(given, expected):
    assert load.as_dtype(given) is expected


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "AuthenticAMD", torch.bfloat16),
        # reports the instructions, and takes twice float32's time with them
        (False, True, "GenuineIntel", torch.float32),
        (False, True, "", torch.float32),
        (False, False, "AuthenticAMD", torch.float32),
        (False, False, "", torch.float32),
    ],
)
def test_best_dtype_on_a_cpu_is_a_rule(monkeypatch, amx, avx512_bf16, vendor, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(load, "_vendor", lambda: vendor)
    assert load.best_dtype(torch.device("cpu")) is expected


def test_best_dtype_asks_no_clock(monkeypatch):
    def asked(*args):
        raise AssertionError("the choice of a dtype took the time of something")

    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, asked)
    assert load.best_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_best_dtype_on_a_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert load.best_dtype(torch.device("cuda")) is (torch.bfloat16 if native else torch.float32)


def test_best_dtype_elsewhere():
    assert load.best_dtype(torch.device("xpu")) is torch.bfloat16
    assert load.best_dtype(torch.device("mps")) is torch.float32


@pytest.mark.parametrize(("accelerator", "expected"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), (None, "cpu")])
def test_best_device(monkeypatch, accelerator, expected):
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    assert load.best_device().type == expected


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "sdpa"),
        ("cpu", torch.bfloat16, GROUPED),
        ("cpu", torch.float16, GROUPED),
        ("cuda", torch.bfloat16, "sdpa"),
        ("cuda", torch.float32, "sdpa"),
    ],
)
def test_best_attention(device, dtype, expected):
    assert load.best_attention(torch.device(device), dtype) == expected


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [("float32", "eager", "eager"), ("float32", "auto", "sdpa"), ("bfloat16", "auto", GROUPED)],
)
def test_attention_is_passed_on(folder, dtype, asked, expected):
    model, _ = load.load_model(str(folder), dtype=dtype, device="cpu", attention=asked)
    assert model.config._attn_implementation == expected


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LOFIT_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert load.cache_folder() == Path.home() / ".cache" / "lofit-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load.cache_folder() == tmp_path / "xdg" / "lofit-fast"
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "mine"))
    assert load.cache_folder() == tmp_path / "mine"


def test_a_gguf_file_is_converted_once(cache, gguf):
    path, read = gguf
    model, tokenizer = load.load_model(str(path), dtype="float32", device="cpu")
    # by its own checksum, in float32 whatever it is loaded as
    assert read == [(path, torch.float32)]
    (folder,) = cache.iterdir()
    checksum = load._sha256(path)
    assert folder.name == f"some-model.Q4_1-{checksum[:12]}"
    notes = json.loads((folder / "conversion.json").read_text())
    assert (notes["source"], notes["sha256"]) == (path.name, checksum)
    assert notes["sizes"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    again, _ = load.load_model(str(path), dtype="float32", device="cpu")
    assert len(read) == 1
    with torch.no_grad():
        assert again(tokens()).logits.equal(model(tokens()).logits)
    assert tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


def test_another_file_of_the_same_name_is_converted_again(cache, gguf):
    path, read = gguf
    first = load.converted(path)
    path.write_bytes(b"GGUF of another model")
    assert load.converted(path) != first
    assert len(read) == 2


@pytest.mark.parametrize("fails", ["model", "tokenizer", "notes"])
def test_an_interrupted_conversion_is_not_taken_for_a_whole_one(cache, gguf, monkeypatch, fails):
    path, read = gguf

    def failing(*args, **options):
        raise KeyboardInterrupt

    owner, name = {
        "model": (transformers.PreTrainedModel, "save_pretrained"),
        "tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained"),
        "notes": (load, "write_json"),
    }[fails]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, failing)
        load.converted(path)
    assert not list(cache.rglob("conversion.json"))
    assert not list(cache.rglob(".lofit-*"))
    folder = load.converted(path)
    assert len(read) == 2
    assert (folder / "conversion.json").is_file()
    assert load.converted(path) == folder
    assert len(read) == 2


def test_a_truncated_note_is_not_taken_for_a_whole_conversion(cache, gguf):
    path, read = gguf
    note = load.converted(path) / "conversion.json"
    note.write_text(note.read_text()[:20])
    load.converted(path)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written(gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write"):
        load.converted(gguf[0])


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
