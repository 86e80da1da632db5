"""A few whole steps under torch.profiler: kernels launched, waits for the device, copies to the host, idle gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE
from benchmarks.speed.gpu.whole_steps import Scene, clocked, scene, why_not
from benchmarks.speed.step.rows import Row
from benchmarks.speed.step.workload import BATCH

# the call of the driver or runtime, by the beginning of its name -> what it counts as
CALLS = {
    "launches": (
        "cudaLaunchKernel",
        "cuLaunchKernel",
        "cudaLaunchCooperativeKernel",
        "hipLaunchKernel",
        "hipExtModule",
    ),
    "graph launches": ("cudaGraphLaunch", "hipGraphLaunch"),
    "synchronisations": (
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "hipStreamSynchronize",
        "hipDeviceSynchronize",
        "hipEventSynchronize",
    ),
    "allocations": ("cudaMalloc", "cudaFree", "hipMalloc", "hipFree"),
}
# on the device, by the beginning of its name
COPIES = {"copies to the host": "Memcpy DtoH", "copies to the device": "Memcpy HtoD"}
# operations that read a number off the device: they wait for it
_READS = ("aten::_local_scalar_dense", "aten::nonzero")
# gaps between kernels that are longer than this are idle time worth naming
_LONG_GAP_US = 5.0
_TOP = 12
# spans the steps: the clock's own waits are outside
_MARK = "lofit steps"
STEPS = 3


def rows_to_trace(step: str) -> list[Row]:
    """Ours in both settings, beside the floor in ours and the hook as it is run."""
    ours = [Row("ours", setting, step) for setting in (SAME_ENGINE, AS_RUN)]
    return [*ours, Row("hook", AS_RUN, step), Row("floor", SAME_ENGINE)]


def traced_steps(task: dict[str, Any]) -> dict[str, Any]:
    """STEPS warm steps of each row of the task's model and step, but those in "without", under the profiler."""
    place = scene(task["model"], task["device"], task.get("layers"))
    entries = []
    for row in rows_to_trace(task["step"]):
        if str(row) in task.get("without", {}):
            continue
        task["now"](str(row))
        entries.append({**asdict(row), **_traced(place, row)})
    return {"rows": entries, "of_steps": STEPS, **place.described()}


def _traced(place: Scene, row: Row) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.device == "cuda" else [])]
    with ExitStack() as scopes:
        try:
            one = scopes.enter_context(place.live(row))
            batches = one.batches(place.work.drawn(0, BATCH * STEPS), place.work.pad)
            for batch in batches * 2:
                one.update(batch)
            with profile(activities=activities) as seen, clocked(place.device) as seconds, record_function(_MARK):
                for batch in batches:
                    one.update(batch)
        except Exception as failure:
            return why_not(failure, place.device)
    return {"ms_per_step": 1e3 * seconds[0] / STEPS, **counted(seen.events(), len(batches))}


def counted(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """What a step does, from profiled events: torch.autograd.profiler_util.FunctionEvent, or what looks like one.

    Counts are per step, of what the host began while the event _MARK lasted. "idle": of the time from the first kernel
    to the end of the last. Without kernels (on a CPU) there is nothing to count but operations, and the counts of the
    device are None.
    """
    events = list(events)
    span = next(e.time_range for e in events if e.name == _MARK and e.device_type != DeviceType.CUDA)
    # annotations such as the mark have a shadow on the device that is no work
    device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    on_device = sorted((e.time_range.start, e.time_range.end, e.name) for e in device)
    host = [e for e in events if e.device_type != DeviceType.CUDA]
    names = Counter(e.name for e in host if span.start <= e.time_range.start < span.end)
    found: dict[str, Any] = {
        "operations": sum(count for name, count in names.items() if name.startswith("aten::")) / steps,
        "reads of a number": {name: names[name] / steps for name in _READS if names[name]},
    }
    if not on_device:
        return found | dict.fromkeys((*CALLS, *COPIES, "kernels", "idle"))
    for kind, beginnings in CALLS.items():
        found[kind] = sum(count for name, count in names.items() if name.startswith(beginnings)) / steps
    for kind, beginning in COPIES.items():
        found[kind] = sum(name.startswith(beginning) for *_, name in on_device) / steps
    kernels = [row for row in on_device if not row[2].startswith(("Memcpy", "Memset"))]
    return found | {
        "kernels": len(kernels) / steps,
        "idle": _idle(on_device, steps),
        "most time": _most(kernels, steps),
    }


def _idle(intervals: list[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """Of the device: milliseconds per step busy and idle, and how many gaps are long. intervals: sorted, in us."""
    busy_until, gaps = intervals[0][0], []
    for start, end, _ in intervals:
        if start > busy_until:
            gaps.append(start - busy_until)
        busy_until = max(busy_until, end)
    span = busy_until - intervals[0][0]
    return {
        "busy_ms": (span - sum(gaps)) / 1e3 / steps,
        "idle_ms": sum(gaps) / 1e3 / steps,
        "share": sum(gaps) / span if span else 0.0,
        "long_gaps": sum(gap > _LONG_GAP_US for gap in gaps) / steps,
        "longest_gap_ms": max(gaps, default=0.0) / 1e3,
    }


def _most(kernels: list[tuple[float, float, str]], steps: int) -> list[dict[str, Any]]:
    """The kernels that take most time."""
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for start, end, name in kernels:
        total[name] += end - start
        calls[name] += 1
    return [
        {"name": name[:160], "ms": micros / 1e3 / steps, "calls": calls[name] / steps}
        for name, micros in total.most_common(_TOP)
    ]
