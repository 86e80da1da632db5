"""What several tests of processes stand on."""

import json

import pytest

from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twenty examples of unequal lengths, two of which are held out."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{a * (1 + i % 5)}=", "completion": a * 2} for i, a in enumerate("abcdefghijklmnopqrst")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True, scope="package")
def cache(tmp_path_factory):
    """What is kept between runs stays among the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOFIT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
