"""Op level: the suites on pytest-benchmark, run as one cell."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.speed.cells import Options, run_python


def operator_seconds(options: Options) -> dict:
    """Every op-level benchmark's group, name, parameters and statistics in seconds; rows: what is absent, and why."""
    with tempfile.TemporaryDirectory() as folder:
        timings, outcomes = Path(folder) / "ops.json", Path(folder) / "ops.xml"
        reports = (f"--benchmark-json={timings}", f"--junitxml={outcomes}")
        run_python("-m", "pytest", "benchmarks", "-q", "--benchmark-only", "--benchmark-max-time=0.3", *reports)
        report, cases = json.loads(timings.read_text()), ElementTree.parse(outcomes).iter("testcase")
        skipped = {case.get("name"): case.find("skipped") for case in cases}
    kept = ("median", "q1", "q3", "rounds")
    return {
        "benchmarks": [
            {
                "group": one["group"],
                "name": one["name"],
                "seconds": {key: one["stats"][key] for key in kept},
                "extra": one.get("extra_info", {}),
            }
            for one in report["benchmarks"]
        ],
        "rows": [{"peer": name, "absent": why.get("message")} for name, why in skipped.items() if why is not None],
    }
