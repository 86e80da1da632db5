"""Where the time of one of our steps goes, by kind of work."""

from __future__ import annotations

import re

from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.settings import Row, live, settled_engine
from benchmarks.workload import Workload
from lofit_fast.training.engine import Engine

# kind -> what its operators and kernels are called; the first that matches has it
KINDS = {
    "optimizer and clipping": r"adam|clip|_foreach|linalg_vector_norm|optimizer",
    "attention products": r"bmm|baddbmm|attention|softmax",
    "GEMM": r"::(add)?mm|linear|gemm|matmul|nvjet",
    "loss": r"nll_loss|log_softmax|cross_entropy",
    "elementwise": r"fused|::(mul|add|sub|div|pow|rsqrt|silu|gelu|neg|cat|mean|sum|copy_|_to_copy|to|clone|where)",
}
OTHER = "other"
BATCHES = 4


def measure(base: nn.Module, work: Workload, row: Row, engine: Engine | None = None) -> dict:
    """Microseconds of every kind over a few warm steps, the share of each, and the ten longest operators."""
    engine = engine or settled_engine(base, work)
    on_gpu = next(base.parameters()).device.type == "cuda"
    with live(base, row, engine) as one:
        batches = one.batches(work.rows[: 8 * BATCHES], work.pad)
        for batch in batches:
            one.step(batch)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as seen:
            for batch in batches:
                one.step(batch)
    events = seen.key_averages()
    taken = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    kinds: dict[str, float] = dict.fromkeys([*KINDS, OTHER], 0.0)
    for key, microseconds in taken.items():
        kinds[kind_of(key)] += microseconds
    total = sum(kinds.values())
    longest = sorted(taken.items(), key=lambda item: -item[1])[:10]
    return {
        "row": str(row),
        "microseconds": kinds,
        "share": {kind: microseconds / total for kind, microseconds in kinds.items()},
        "longest": [{"operator": key[:80], "kind": kind_of(key), "share": us / total} for key, us in longest],
        "evidence": "GPU clock, kernels" if on_gpu else "CPU clock, operators' own time",
    }


def kind_of(operator: str) -> str:
    """The kind of work an operator is, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operator, re.IGNORECASE)), OTHER)
