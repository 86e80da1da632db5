"""The process that touches the GPU: reads tasks, one JSON line each, and answers each with one line.

A task's "now" is called with what it is about to do, so that the parent knows who was at work when this process died.

It is expendable: a kernel that reads where it must not takes this process with it, not the report.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

# mark an answer among whatever libraries print, and what the process is about to do
MARK, NOW = "@lofit ", "@now "
BROKEN = 3


def machine(task: dict[str, Any]) -> dict[str, Any]:
    """Device, driver, versions, commit, and what nvidia-smi says of clocks and power now."""
    import torch

    from benchmarks.speed.timing import machine as described

    if task["device"] == "cuda" and not torch.cuda.is_available():
        return {"error": "torch sees no GPU here; --device cpu rehearses without one"}
    found = {**described(), "float32_matmul_precision": torch.get_float32_matmul_precision()}
    if task["device"] == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda or torch.version.hip,
            "nvidia_smi": nvidia_smi(str(getattr(properties, "uuid", ""))),
        }
    else:
        found["device"] = "cpu"
    return found


_QUERY = (
    "name,driver_version,pstate,compute_mode,persistence_mode,temperature.gpu,utilization.gpu,power.draw,power.limit,"
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
)


def nvidia_smi(uuid: str) -> dict[str, str] | str:
    """One GPU's state as nvidia-smi tells it, or why there is none."""
    select = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", *select]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return f"nvidia-smi: {type(failure).__name__}"
    values = done.stdout.strip().splitlines()[:1]
    if done.returncode or not values:
        return f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"
    return dict(zip(_QUERY.split(","), (value.strip() for value in values[0].split(",")), strict=False))


# kind of task -> where the function is that answers it; the last three need transformers
_KINDS = {
    "machine": ("benchmarks.speed.gpu.worker", "machine"),
    "check": ("benchmarks.speed.gpu.path_checks", "check"),
    "projection": ("benchmarks.speed.op.row_times", "time_projection"),
    "layer": ("benchmarks.speed.op.row_times", "time_layer"),
    "answers": ("benchmarks.speed.gpu.device_answers", "measured_answers"),
    "steps": ("benchmarks.speed.gpu.whole_steps", "time_steps"),
    "trace": ("benchmarks.speed.gpu.step_trace", "traced_steps"),
}


def _function(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, name = _KINDS[kind]
    return getattr(importlib.import_module(module), name)


def _answer(task: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The answer, and whether this process can go on."""
    import torch

    if task["device"] == "cpu":
        # toy shapes gain nothing from threads
        torch.set_num_threads(1)
    try:
        result = _function(task["kind"])(task)
    except Exception as failure:
        result = {"error": f"{type(failure).__name__}: {str(failure).strip()[:400]}"}
        traceback.print_exc()
    if task["device"] != "cuda" or not torch.cuda.is_initialized():
        return result, True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as failure:
        return result | {"broken": str(failure).strip()[:200]}, False
    return result, "broken_by" not in result


def main() -> int:
    """Answers until there is nothing more to answer."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")

    def say(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    # whatever else is printed must not look like an answer
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        result, alive = _answer(json.loads(line) | {"now": lambda what: say(NOW + what)})
        say(MARK + json.dumps(result))
        if not alive:
            # a normal exit would wait for the broken device
            os._exit(BROKEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
