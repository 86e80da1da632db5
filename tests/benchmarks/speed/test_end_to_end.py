"""The cells that the summary is made of, on a tiny model, from the plan to the report page."""

import json

import pytest

from benchmarks.speed import cell_plan
from benchmarks.speed.__main__ import measured_cell, run_cells
from benchmarks.speed.cells import Options, Store
from benchmarks.speed.ratios import write_summary
from benchmarks.speed.report import write_report
from benchmarks.speed.step import packaged_models, peak_memory, row_process, step_level
from lofit_fast.files import write_json
from lofit_fast.training.engine import Engine
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer

MODEL = "SmolLM2-135M"
NAMES = ("/steps", "/memory hook", "/memory ours", "/whole run lora_all")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The first model of the benchmark replaced by a tiny one, in an engine that does not compile, in this process."""
    folder = tmp_path / "model"
    tiny_model("llama", max_position_embeddings=512, initializer_range=0.2).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    monkeypatch.setitem(packaged_models.MODELS, MODEL, str(folder))
    monkeypatch.setattr(cell_plan, "apart", lambda load, job: row_process.here(load(), job))
    for module in (cell_plan, step_level, peak_memory):
        monkeypatch.setattr(
            module, "settled_engine", lambda *_, **__: Engine(attention="eager", compile=False, packing=False)
        )


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_from_the_plan_to_the_page(tmp_path):
    pytest.importorskip("peft")
    options = Options(rounds=3, examples=8)
    cells = [cell for cell in cell_plan.plan(full=True, models=[MODEL]) if any(name in cell.name for name in NAMES)]
    assert len(cells) == 6
    store = Store.here(tmp_path / "results", options)

    def run(cell, into):
        write_json(into, measured_cell(cell, options))
        return True

    assert run_cells(cells, store, run, float("inf")) == []
    summary = json.loads(write_summary(tmp_path / "results", store).read_text())
    measured = summary[MODEL]
    for key in ("vs_hook_as_run", "vs_hook_same_engine", "vs_lora_all_as_run", "vs_floor"):
        low, high = measured[f"{key}_interval"]
        assert 0 < low <= measured[key] <= high
        assert list(measured[f"{key}_rows"]) == ["step 1", "step 2"]
    assert measured["peak_memory_vs_hook"] > 0
    absent = ("prefix cache", "scoring", "answer only", "fast run")
    assert measured["absent"] == dict.fromkeys(absent, "not measured")
    page = write_report(tmp_path / "results", tmp_path / "report").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "kinship examples" in page
