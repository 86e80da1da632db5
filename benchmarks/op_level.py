"""Op level: the suites on pytest-benchmark, run as one cell."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.cells import Options, run_python


def measure(options: Options) -> dict:
    """Every op-level benchmark's group, name, parameters and statistics in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ops.json"
        run_python("-m", "pytest", "benchmarks", "-q", "--benchmark-only", f"--benchmark-json={path}")
        report = json.loads(path.read_text())
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
        ]
    }
