"""The report is made of JSON alone, needs nothing else to be read, and says what was missed and what is missing."""

import json
import re

import pytest

from benchmarks.speed import elsewhere
from benchmarks.speed.report import main, markdown_table, write_report
from benchmarks.speed.results import BenchResults

STAMP = {"code": "c", "data": "CLUTRR"}
META = {
    "device": "cpu",
    "processor": "A Processor",
    "threads": 2,
    "versions": {"torch": "2.13.0", "peft": None},
    "commit": "0123456789abcdef",
    "dirty": False,
    "evidence": "CPU clock",
    "data": "CLUTRR",
    "results": "a-processor-2-threads",
    "stamp": STAMP,
    "planned": ["SmolLM2-135M/profile", "SmolLM2-135M/generation"],
}


def timed(peer, setting, step, median):
    interval = {"median": median, "low": median - 0.1, "high": median + 0.1}
    return {"peer": peer, "setting": setting, "step": step, "vs_floor": interval, "warm_seconds": 3.0}


@pytest.fixture
def results(tmp_path):
    """A folder as make bench leaves it, with one cell of other code in it."""
    smol = {"vs_hook_as_run": 4.2, "vs_hook_as_run_interval": [4.0, 4.4], "vs_hook_as_run_rounds": 5}
    smol |= {"vs_lora_all_as_run": 5.4, "vs_lora_all_as_run_interval": [5.2, 5.45], "vs_lora_all_as_run_rounds": 7}
    smol |= {"vs_hook_same_engine": 0.97, "vs_hook_same_engine_interval": [0.96, 0.98]}
    smol |= {"vs_hook_same_engine_rounds": 2, "vs_floor": 1.02, "vs_floor_interval": [1.01, 1.06], "vs_floor_rounds": 5}
    smol |= {"peak_memory_vs_hook": 0.5, "peak_memory_vs_hook_interval": None}
    cells = {
        "SmolLM2-135M/peers as run": {
            "rows": [timed("floor", "as run", "", 1.0), timed("hook", "as run", "step 1", 1.1)]
            + [{"peer": "beft", "setting": "as run", "step": "", "absent": "not <installed>"}]
        },
        "SmolLM2-135M/peers same engine": {"rows": [timed("ours", "same engine", "step 2", 1.02)]},
        "SmolLM2-135M/memory ours step 1": {"peer": "ours", "step": "step 1", "first_peak": 4e8, "steady_peak": 5e8},
        "SmolLM2-135M/whole run hook": {"peer": "hook", "seconds": 50.0},
        "SmolLM2-135M/profile": {"steps": [{"row": "ours, step 1", "kinds": {"GEMM": 0.06, "other": 0.04}}]},
        "SmolLM2-135M/losses float32": {
            "dtype": "float32",
            "losses": {"ours": [2.0], "hook": [2.0]},
            "difference": 0.0,
            "order_difference": 0.02,
        },
        "SmolLM2-135M/sweep": {"absent": "no sweep"},
        "layers": {
            "groups": [
                {"level": "layer", "model": "Llama-3-8B", "setting": "step 1", "T": 256, "dtype": "bfloat16"}
                | {
                    "peers": {
                        "lora_all": {"ms": 3.0, "rounds": 7, "vs_floor": {"median": 1.5, "low": 1.4, "high": 1.6}}
                    }
                }
            ]
        },
        "ops": {"benchmarks": [{"group": "g", "name": "op", "seconds": {"median": 0.001}}]},
    }
    folder = tmp_path / "results"
    (folder / META["results"] / "cells").mkdir(parents=True)
    for number, (name, content) in enumerate(cells.items()):
        path = folder / META["results"] / "cells" / f"{number}.json"
        path.write_text(json.dumps({"cell": name, "stamp": STAMP, **content}))
    stale = {"cell": "SmolLM2-135M/whole run ours", "stamp": {}, "peer": "ours", "seconds": 1.0}
    (folder / META["results"] / "cells" / "stale.json").write_text(json.dumps(stale))
    summary = {"SmolLM2-135M": smol, "Gemma-3-270M": {}, "meta": META}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_page_needs_nothing_else(results, tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report(results, tmp_path / "report").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert {p.suffix for p in (tmp_path / "report").iterdir()} == {".html", ".md", ".png"}
    assert "http" not in page


def test_the_page_says_what_where_and_what_not(results, tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report(results, tmp_path).read_text()
    for words in (
        "CPU clock",
        "A Processor, 2 threads",
        "0123456789ab",
        "GEMM 60%",
        "no sweep",
        "not &lt;installed&gt;",
        "layer of Llama-3-8B, step 1, T = 256, bfloat16</td><td>PEFT LoRA, all-linear</td><td>3.00 ms</td>"
        "<td>1.50 (1.40 to 1.60)",
        "SmolLM2-135M/generation</td><td>not run with this code yet",
    ):
        assert words in page
    assert "SmolLM2-135M/profile</td><td>not run" not in page
    assert "<installed>" not in page


def test_targets_are_judged(results):
    read = BenchResults.read(results)
    judged = {(t.model, t.key): t.verdict for t in read.targets()}
    assert judged["SmolLM2-135M", "vs_hook_as_run"] == "met"
    assert judged["SmolLM2-135M", "vs_lora_all_as_run"] == "missed"
    assert judged["SmolLM2-135M", "vs_hook_same_engine"] == "no target"
    # the median holds, and the bracket reaches over the bound
    assert judged["SmolLM2-135M", "vs_floor"] == "not decided"
    assert judged["SmolLM2-135M", "peak_memory_vs_hook"] == "missed"
    assert judged["Gemma-3-270M", "vs_hook_as_run"] == "not measured"
    assert "SmolLM2-135M/whole run ours" not in read.cells


def test_the_table_is_markdown(results):
    table = markdown_table(BenchResults.read(results)).splitlines()
    assert table[0] == "| | SmolLM2-135M | Gemma-3-270M | target |"
    assert any("4.20 (4.00 to 4.40, range of 5) | not measured | 4 or more / 7 or more" in line for line in table)
    assert "hook LoFiT in our engine / ours | 0.97 (0.96 to 0.98, range of 2) | not measured | - / - |" in table[3]
    assert any("runs per hour | not measured | - |" in line for line in table)
    assert "CPU clock" in table[-1]


def test_what_a_machine_lacks_is_anothers_and_says_so(results):
    int8 = {"int8_speedup": 1.4, "int8_speedup_interval": [1.3, 1.5], "int8_speedup_rounds": 3}
    other = {"SmolLM2-135M": {**int8, "vs_hook_as_run": 9.0}}
    (results / "slow").mkdir()
    (results / "slow" / "summary.json").write_text(json.dumps({**other, "meta": {**META, "commit": "f" * 40}}))
    for _ in range(2):
        elsewhere.main(results)
    read = BenchResults.read(results)
    found = {t.key: (t.value, t.elsewhere) for t in read.targets() if t.model == "SmolLM2-135M"}
    assert found["int8_speedup"] == (1.4, "slow") and found["vs_hook_as_run"] == (4.2, None)
    assert read.summary["SmolLM2-135M"]["elsewhere"] == {"int8_speedup": "slow"}
    table = markdown_table(read)
    assert "1.40 (1.30 to 1.50, range of 3) [slow]" in table and "[slow]: CPU clock, one machine" in table
    (results / "slow" / "summary.json").unlink()
    elsewhere.main(results)
    assert BenchResults.read(results).summary["SmolLM2-135M"]["int8_speedup"] is None


def test_the_command(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main(results, tmp_path / "r")
    assert str(tmp_path / "r" / "index.html") in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="make bench"):
        main(tmp_path / "nowhere", tmp_path / "r")


def test_broken_results_are_refused(results, tmp_path):
    (results / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        write_report(results, tmp_path)
    (results / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="no benchmark summary"):
        write_report(results, tmp_path)
