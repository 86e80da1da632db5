"""What the tests of the server as a process stand on."""

import pytest

from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a tiny model with room for long answers, and two adapters."""
    # skips where the server's packages are not installed
    from tests.serving.tiny_server import adapter_folders

    folder = tmp_path_factory.mktemp("served")
    # no answer ends by itself
    tiny_model("llama", max_position_embeddings=100_000, eos_token_id=None).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "model")
    named = {name: path for name, path in adapter_folders(folder).items() if name in ("moved", "scaled")}
    adapters = [word for name, path in named.items() for word in ("--adapter", f"{name}={path}")]
    return ["--model", folder / "model", *adapters, "--dtype", "float32", "--device", "cpu"]
