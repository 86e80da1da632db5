"""GGUF files, converted once."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from lofit_fast.models import file_digest, load
from lofit_fast.models import gguf as conversion
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A file that transformers reads as a tiny Llama, and the list of the times it did."""
    read = []

    def model(*args, gguf_file=None, **options):
        if gguf_file is None:
            return original(*args, **options)
        read.append((Path(options["pretrained_model_name_or_path"]) / gguf_file, options["dtype"]))
        return tiny_model("llama"), {"missing_keys": set(), "unexpected_keys": set()}

    class Everything:
        """The contents of a file of which transformers leaves out nothing; see test_gguf_contents.py."""

        def completed(self, config, model_class):
            return config

        def check_loaded(self, model, missing, unexpected):
            pass

    def config(*args, gguf_file=None, **options):
        return original_config(*args, **options) if gguf_file is None else tiny_model("llama").config

    original_config = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(conversion, "contents_of", lambda path: Everything())

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


def test_a_gguf_file_is_converted_once(cache, gguf):
    path, read = gguf
    model, tokenizer = load.load_model(str(path), dtype="float32", device="cpu")
    # by its own checksum, in float32 whatever it is loaded as
    assert read == [(path, torch.float32)]
    (folder,) = cache.glob("some-model*")
    checksum = file_digest.sha256_of(path)
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
    first = conversion.converted(path)
    path.write_bytes(b"GGUF of another model")
    assert conversion.converted(path) != first
    assert len(read) == 2


@pytest.mark.parametrize("fails", ["model", "tokenizer", "notes"])
def test_an_interrupted_conversion_is_not_taken_for_a_whole_one(cache, gguf, monkeypatch, fails):
    path, read = gguf

    def failing(*args, **options):
        raise KeyboardInterrupt

    owner, name = {
        "model": (transformers.PreTrainedModel, "save_pretrained"),
        "tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained"),
        "notes": (conversion, "write_json"),
    }[fails]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, failing)
        conversion.converted(path)
    assert not list(cache.rglob("conversion.json"))
    assert not list(cache.rglob(".lofit-*"))
    folder = conversion.converted(path)
    assert len(read) == 2
    assert (folder / "conversion.json").is_file()
    assert conversion.converted(path) == folder
    assert len(read) == 2


def test_a_truncated_note_is_not_taken_for_a_whole_conversion(cache, gguf):
    path, read = gguf
    note = conversion.converted(path) / "conversion.json"
    note.write_text(note.read_text()[:20])
    conversion.converted(path)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written(gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write"):
        conversion.converted(gguf[0])


def test_a_changed_byte_in_a_converted_folder_is_converted_again(cache, gguf):
    path, read = gguf
    folder = conversion.converted(path)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= whole.keys()
    for name, raw in whole.items():
        times, at = len(read), len(raw) // 2
        (folder / name).write_bytes(raw[:at] + bytes([raw[at] ^ 2]) + raw[at + 1 :])
        assert conversion.converted(path) == folder
        # of the notes, what nobody reads may change
        assert len(read) == times + 1 or name == "conversion.json"
        for other in whole.keys() - {"conversion.json"}:
            assert (folder / other).read_bytes() == whole[other]


@pytest.mark.parametrize("name", ["adapter_config.json", "more/model.safetensors"])
def test_what_somebody_has_put_into_a_converted_folder_goes(name, cache, gguf):
    path, read = gguf
    folder = conversion.converted(path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    conversion.converted(path)
    assert len(read) == 2
    assert not (folder / name).exists()


def test_a_conversion_of_an_earlier_release_is_made_again(cache, gguf):
    path, read = gguf
    note = conversion.converted(path) / "conversion.json"
    whole = json.loads(note.read_text())
    # without checksums, or without the biases that transformers leaves out
    for number, lacking in enumerate(("files", "format"), start=2):
        note.write_text(json.dumps({name: value for name, value in whole.items() if name != lacking}))
        conversion.converted(path)
        conversion.converted(path)
        assert len(read) == number


def test_who_waits_for_a_conversion_finds_it(cache, gguf, monkeypatch):
    path, read = gguf
    convert, seen = conversion._convert, []

    def meanwhile(*args):
        # another process holds the lock; this one looks again once it has it
        seen.append(args)
        convert(*args)

    def whole_at_the_second_look(folder, checksum):
        looks.append(folder)
        if len(looks) == 1:
            convert(path, folder, checksum)
            return False
        return is_whole(folder, checksum)

    looks, is_whole = [], conversion._is_whole
    monkeypatch.setattr(conversion, "_convert", meanwhile)
    monkeypatch.setattr(conversion, "_is_whole", whole_at_the_second_look)
    conversion.converted(path)
    assert (len(read), seen) == (1, [])
