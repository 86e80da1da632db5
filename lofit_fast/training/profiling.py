"""Where a training step's time goes: a trace of a few steps, and a table of it by kind of work."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lofit_fast.files import lasting_path, whole_folder, write_json, write_text
from lofit_fast.training.closed_callbacks import ClosedCallback
from lofit_fast.training.engine.device_queue import devices_of, wait_for

WARMUP, STEPS = 3, 3

# what an operation counts as, by the first pattern its name matches; it is looked for in what called it first
_WITHIN = (
    ("optimizer", re.compile(r"^Optimizer\.|clip_grad")),
    ("data", re.compile(r"DataLoader|^enumerate\(")),
)
_KINDS = (
    ("attention", re.compile(r"scaled_dot_product|flash_attention|softmax|::bmm|::baddbmm|flex_attention")),
    ("GEMM", re.compile(r"::mm$|::addmm|::matmul|linear|gemm|::_int_mm", re.IGNORECASE)),
    ("fused by the compiler", re.compile(r"fused|Torch-Compiled|Compiled(Function|FxGraph)|Inductor|^triton_|^cpp_")),
    ("elementwise and copies", re.compile(r"^aten::|^lofit")),
)
_OTHER = "Python, autograd and waiting"
# the formula of an operation's FLOPs, and which of its arguments' shapes it takes, in order
_FLOPS: dict[str, tuple[Callable[..., int], tuple[int, ...]]] = {
    "aten::mm": (flop_registry[torch.ops.aten.mm], (0, 1)),
    "aten::addmm": (flop_registry[torch.ops.aten.addmm], (0, 1, 2)),
    "aten::bmm": (flop_registry[torch.ops.aten.bmm], (0, 1)),
    "aten::baddbmm": (flop_registry[torch.ops.aten.baddbmm], (0, 1, 2)),
    **{
        f"aten::_scaled_dot_product_{kernel}": (sdpa_flop_count, (0, 1, 2))
        for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    },
    **{
        f"aten::_scaled_dot_product_{kernel}_backward": (sdpa_backward_flop_count, (0, 1, 2, 3))
        for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    },
}


class ProfileSteps(ClosedCallback):
    """Profiles a few steps of each stage of a run, once the first ones have warmed up.

    Writes into the folder, per stage ("select", "tune"): profile/<stage>.json.gz, a trace for chrome://tracing or
    Perfetto; <stage>.md, the table; <stage>-summary.json, the same as data. A stage of fewer steps than
    warmup + steps leaves nothing, and nor does one that fails before. The steps' seconds include what profiling costs:
    compare kinds, not speeds.
    """

    def __init__(self, folder: Path | str, *, warmup: int = WARMUP, steps: int = STEPS) -> None:
        if warmup < 0 or steps < 1:
            raise ValueError(f"expected warmup >= 0 and steps >= 1, got {warmup} and {steps}")
        self.folder, self.warmup, self.steps = lasting_path(folder) / "profile", warmup, steps
        self.profiler: profile | None = None
        self._seen = 0

    def on_train_begin(self, args, state, control, **_):
        """A stage begins: count its steps anew, whichever one a resumed run goes on with."""
        # torch has one profiler at a time, and a plain Trainer that failed has left it running
        self.close()
        self._seen = 0

    def on_step_begin(self, args, state, control, **_):
        """Start after the warm-up. Of the processes of a run the first one is looked at."""
        if self._seen == self.warmup and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()
            self._started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **_):
        """Stop after the last step that is profiled, and write."""
        self._seen += 1
        if self.profiler is not None and self._seen == self.warmup + self.steps:
            wait_for(devices_of(model))
            self._stop(Path(args.output_dir).name)

    def close(self) -> None:
        """A stage that ended early, or failed, leaves no profile, and no profiler running."""
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()

    def _stop(self, stage: str) -> None:
        seconds, profiler = time.perf_counter() - self._started, self.profiler
        self.close()
        summary = summarize(profiler.events(), seconds, self.steps)
        with whole_folder(self.folder) as scratch:
            profiler.export_chrome_trace(str(scratch / f"{stage}.json.gz"))
        write_json(self.folder / f"{stage}-summary.json", summary)
        write_text(self.folder / f"{stage}.md", as_markdown(summary, stage))


def summarize(events: Iterable, seconds: float, steps: int, top: int = 12) -> dict[str, object]:
    """Profiled events of `steps` steps that took `seconds` in all -> what a step spends, per kind and operation.

    Times are an operation's own, without those it calls: on the GPU where there is one, else on the CPU.
    flops: of matrix products and attention, by the formulas of torch.utils.flop_counter, exact where the shapes were
    recorded. launches: kernels on a GPU; on a CPU ("operations") calls of an ATen operation that calls no other.
    """
    events = list(events)
    on_gpu = any(event.device_type == DeviceType.CUDA for event in events)
    kinds: dict[str, float] = defaultdict(float)
    operations: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    flops = launches = 0
    for event in events:
        if event.device_type == DeviceType.CUDA:
            launches += 1
            continue
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / steps
        kinds[_kind(event)] += own
        operations[event.name] += own
        calls[event.name] += 1
        flops += _flops(event)
        if not on_gpu and event.name.startswith("aten::") and not event.cpu_children:
            launches += 1
    per_step = seconds / steps
    kinds[_OTHER] += max(0.0, per_step - sum(kinds.values()))
    order = sorted(operations, key=lambda name: -operations[name])[:top]
    return {
        "device": "cuda" if on_gpu else "cpu",
        "steps": steps,
        "seconds_per_step": per_step,
        "flops_per_step": flops // steps,
        ("launches_per_step" if on_gpu else "operations_per_step"): launches / steps,
        "kinds": {kind: kinds[kind] for kind in sorted(kinds, key=lambda kind: -kinds[kind])},
        "operations": [{"name": name, "seconds": operations[name], "calls": calls[name] / steps} for name in order],
    }


def as_markdown(summary: dict, title: str) -> str:
    """A summary as two tables: kinds of work, and the operations that take most."""
    whole = sum(summary["kinds"].values()) or 1.0
    counts = f"{summary['flops_per_step'] / 1e9:.3f} GFLOP"
    for key in ("launches_per_step", "operations_per_step"):
        if key in summary:
            counts += f", {summary[key]:.0f} {key.removesuffix('_per_step')}"
    lines = [
        f"# {title}: where a step's time goes",
        "",
        f"{summary['steps']} steps on {summary['device']}, {1e3 * summary['seconds_per_step']:.1f} ms each with the "
        f"profiler on; {counts} a step.",
        "",
        "| kind | ms | share |",
        "|---|---|---|",
        *(f"| {kind} | {1e3 * s:.2f} | {100 * s / whole:.1f} % |" for kind, s in summary["kinds"].items()),
        "",
        "| operation | ms | calls |",
        "|---|---|---|",
        *(f"| `{row['name']}` | {1e3 * row['seconds']:.2f} | {row['calls']:.0f} |" for row in summary["operations"]),
    ]
    return "\n".join(lines) + "\n"


def _kind(event) -> str:
    caller = event
    while caller is not None:
        for kind, pattern in _WITHIN:
            if pattern.search(caller.name):
                return kind
        caller = caller.cpu_parent
    return next((kind for kind, pattern in _KINDS if pattern.search(event.name)), _OTHER)


def _flops(event) -> int:
    formula, positions = _FLOPS.get(event.name, (None, ()))
    shapes = event.input_shapes or ()
    if formula is None or len(shapes) <= max(positions) or not all(shapes[i] for i in positions):
        return 0
    given = [shapes[i] for i in positions]
    if "attention" in event.name:
        # each head of keys and values counts once for every query head it serves; torch 2.11 takes no fewer of them
        batch, heads = given[-3][:2]
        given[-2:] = [[batch, heads, *shape[2:]] for shape in given[-2:]]
    return formula(*given)
