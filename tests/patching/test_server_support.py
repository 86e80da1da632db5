"""Which servers keep the offsets: the table, the page that shows it, and what export refuses."""

from pathlib import Path

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.export_targets import TARGETS
from lofit_fast.patching.server_support import SERVERS, check_served
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
FOLDERS = [name for name in SERVERS if name != "llama.cpp"]


def table() -> list[str]:
    """The rows of the page: a class, and what each server does with its bias."""
    classes = sorted({name for server in SERVERS.values() for name in (*server.keeps, *server.drops)})
    said = {True: "keeps", False: "-"}
    cells = [
        [said[name in server.keeps] if name not in server.drops else "**drops**" for server in SERVERS.values()]
        for name in classes
    ]
    return [f"| {name} | {' | '.join(row)} |" for name, row in zip(classes, cells, strict=True)]


def test_the_page_shows_the_table():
    page = PAGE.read_text()
    assert f"| class | {' | '.join(SERVERS)} |" in page
    assert [row for row in page.splitlines() if row.startswith("| ") and "For" in row or "LMHead" in row] == table()
    for name, server in SERVERS.items():
        assert f"{server.source}, {server.date}" in page, name


def test_no_class_is_kept_and_dropped():
    for name, server in SERVERS.items():
        assert not server.keeps.keys() & server.drops.keys(), name


def patched(family, config=None):
    handle = lf.patch(tiny_model(family), config or lf.LofitConfig(offset="all"))
    randomize(handle)
    return handle


# family -> the servers that get a folder of it
KEPT = {
    "llama": ("vllm", "sglang", "tgi"),
    "mistral": ("vllm", "sglang", "tgi"),
    "qwen2": ("vllm", "sglang", "tgi"),
    "qwen3": ("sglang",),
    "gemma": (),
    "gemma3": ("vllm", "sglang"),
}


@pytest.mark.parametrize(
    "family", [f if f in ("qwen2", "qwen3", "gemma") else pytest.param(f, marks=pytest.mark.slow) for f in KEPT]
)
def test_folders_are_written_where_the_bias_is_kept_and_refused_elsewhere(tmp_path, family):
    handle = patched(family)
    for server in FOLDERS:
        folder = tmp_path / server
        if server in KEPT[family]:
            lf.export(handle, folder, target=server)
        else:
            with pytest.raises(ValueError, match=f"cannot export a .*ForCausalLM for {server}: "):
                lf.export(handle, folder, target=server)
            assert not folder.exists()
    if KEPT[family]:
        assert lf.verify_export(handle, tmp_path / KEPT[family][0]).difference < 1e-5


def test_a_refusal_says_where_it_was_read_and_what_to_do():
    class Qwen3ForCausalLM:
        pass

    class NobodysForCausalLM:
        pass

    with pytest.raises(
        ValueError, match="vllm 0.33.0, 2026-11-01: qwen3.py.*without a word.*--model-impl transformers"
    ):
        check_served("vllm", Qwen3ForCausalLM, True)
    with pytest.raises(ValueError, match="was not read in its sources.*Known to keep it: .*LlamaForCausalLM"):
        check_served("tgi", NobodysForCausalLM, True)
    check_served("vllm", Qwen3ForCausalLM, False)


def test_scales_are_for_every_server(tmp_path):
    handle = patched("gemma", lf.LofitConfig(scale="all"))
    lf.export(handle, tmp_path, target="vllm")
    assert lf.verify_export(handle, tmp_path).difference < 1e-5


def test_an_unknown_target(tmp_path):
    with pytest.raises(ValueError, match=f"target to be one of {', '.join(TARGETS)}, got 'onnx'"):
        lf.export(patched("llama"), tmp_path / "out", target="onnx")
    with pytest.raises(ValueError, match="template is for target='llama.cpp', got target='vllm'"):
        lf.export(patched("llama"), tmp_path / "out", target="vllm", template="base.gguf")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_export_is_for_transformers_unless_said(tmp_path):
    from transformers import AutoModelForCausalLM

    handle = patched("qwen3")
    lf.export(handle, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(tokens()).logits, handle.model(tokens()).logits, rtol=0, atol=1e-5)
