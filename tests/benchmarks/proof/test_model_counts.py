"""What a patched model launches beyond its base: exact, by layer, and less than a hook."""

import pytest

pytest.importorskip("triton")

from benchmarks.proof import model_counts
from benchmarks.speed.op.operators import SETTINGS
from lofit_kernels import dispatch

TOKENS = 40


@pytest.fixture(scope="module")
def base():
    return {layers: model_counts.launches(model_counts.llama(layers), TOKENS) for layers in (1, 3)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_ours_adds_a_few_launches_to_each_layer(base, setting):
    added = {layers: model_counts.of_ours(setting, layers, TOKENS) - base[layers] for layers in base}
    for layers, found in added.items():
        if setting == "step 2":
            # a column sum; of all layers the fold, its rounding's copy and cast, and its gradient's copy and two
            assert found == layers + 6
        else:
            # a sweep forward, and one backward with at most a second stage of its sums
            assert 2 * layers <= found <= 3 * layers


@pytest.mark.parametrize("setting, a_layer", [("step 1", 8), ("step 2", 9), ("both", 10)])
def test_the_hook_adds_many(base, setting, a_layer):
    assert model_counts.of_hook(setting, 3, TOKENS) - base[3] == 3 * a_layer


def test_as_on_gpu_ends():
    with model_counts.as_on_gpu():
        assert dispatch.default_backends("cpu", None) == ("triton", "aten")
    assert dispatch.default_backends("cpu", None) == ("aten",)


def test_the_table_goes_between_its_markers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_counts, "rows", lambda layers, tokens: [("step 1", 9, 8, 4.0, 6, 3.0)])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{model_counts.START}old\n{model_counts.END} after\n")
    assert model_counts.main(["--layers", "2", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "| step 1 | 9 | 8 | 4.0 | 6 | 3.0 |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith(" after\n")
    assert "2 layers, 512 tokens:" in capsys.readouterr().out
