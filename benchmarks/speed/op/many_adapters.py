"""Many adapters in one batch: whether its rows are right, what they cost over the base, and what switching takes.

    python -m benchmarks.speed.op.many_adapters [--model smollm2] [--adapters 100] [--tokens 4] [--json FILE]

Every row of a batch has an adapter of its own. Its logits are compared with those of the row alone, the adapter set
active, and of a few rows with an independent hook's. The cost is the CPU time of one thread, the base and the rows in
turns, of a prompt and of one more token per row; beside it the operations that torch runs, and the bytes that rows add,
are counted. Switching is timed by the same clock, and what a compiler has to do for it is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lofit_fast as lf
from benchmarks.speed.timing import machine
from lofit_fast.files import write_json
from lofit_fast.models.load import load_model

# of all heads, how many an adapter has; the size of its vectors; rows that are compared with a hook
_HEADS, _STD, _HOOKED = 0.03, 0.1, 3
_ROUNDS, _SWITCHES = 3, 200


class _Operations(TorchDispatchMode):
    """Counts what torch runs."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def with_adapters(model, count: int) -> tuple[lf.LofitHandle, list[str]]:
    """A handle with so many adapters beside its own, each of other random heads, and their names."""
    draw = Random(0)
    handle = lf.patch(model, lf.LofitConfig(offset=[(0, 0)]), name="own")
    heads = [(p.layer, head) for p in handle.projections for head in range(p.n_heads)]
    names = [f"adapter {number}" for number in range(count)]
    for number, name in enumerate(names):
        chosen = sorted(draw.sample(heads, max(1, round(_HEADS * len(heads)))))
        handle.add(name, lf.LofitConfig(offset=chosen, init_std=_STD, seed=number), trained=False)
    return handle, names


@torch.no_grad()
def apart(handle: lf.LofitHandle, names: Sequence[str], ids: Tensor) -> dict[str, float]:
    """Largest differences of logits, as shares of the largest logit: rows from one by one, from a hook, from the base.

    And those of the base alone from its own one by one, which is what the size of a batch does to rounding.
    ids: (B, S), a row for each name.
    """
    # of the last token: the first, at which all others look, is ill-conditioned in many models
    model, keep = handle.model, {"use_cache": False, "logits_to_keep": 1}
    with handle.rows(names):
        rows = model(ids, **keep).logits
    with handle.disabled():
        base = model(ids, **keep).logits
    alone, hooked, bases = [], [], []
    for number, name in enumerate(names):
        one = ids[number : number + 1]
        handle.set_active(name)
        alone.append(model(one, **keep).logits)
        handle.set_active(None)
        if number < _HOOKED:
            bases.append(model(one, **keep).logits)
            vectors = handle.other_vectors(name)
            listed = {
                (layer, "offset"): (handle.layers[layer].others.heads[handle._named(name).slot], rows)
                for layer, rows in vectors.items()
            }
            hooked.append(_hooked(model, listed, one))
    handle.set_active("own")
    scale = rows.abs().max()
    return {
        "one by one": ((rows - torch.cat(alone)).abs().max() / scale).item(),
        "hook": ((rows[:_HOOKED] - torch.cat(hooked)).abs().max() / scale).item(),
        "base": ((rows - base).abs().max() / scale).item(),
        "base one by one": ((base[:_HOOKED] - torch.cat(bases)).abs().max() / scale).item(),
    }


def _hooked(model, vectors: dict, ids: Tensor) -> Tensor:
    # the projection inside of ours, so that the hook sees what it is called with
    inner = {layer: model.model.layers[layer].self_attn.o_proj.inner for layer, _ in vectors}
    hooks = []
    for (layer, _), (heads, rows) in vectors.items():
        dense = rows.new_zeros(inner[layer].in_features // rows.shape[1], rows.shape[1])
        dense[heads] = rows
        spread = dense.flatten()
        hooks.append(inner[layer].register_forward_pre_hook(lambda module, args, v=spread: (args[0] + v,)))
    try:
        return model(ids, use_cache=False, logits_to_keep=1).logits
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def cost(handle: lf.LofitHandle, names: Sequence[str], ids: Tensor) -> dict[str, dict]:
    """CPU seconds of one thread and counted operations, of the base and of rows, by what is run."""
    model = handle.model
    prompt = {"input_ids": ids, "logits_to_keep": 1}
    kinds = {"prompt": prompt, "token": {"input_ids": ids[:, :1], "logits_to_keep": 1}}
    found = {}
    for kind, inputs in kinds.items():

        def base(inputs=inputs) -> None:
            with handle.disabled():
                model(**inputs, use_cache=False)

        def rows(inputs=inputs) -> None:
            with handle.rows(names):
                model(**inputs, use_cache=False)

        def one(inputs=inputs) -> None:
            model(**inputs, use_cache=False)

        runs = {"base": base, "rows": rows, "one adapter": one}
        handle.set_active(names[0])
        seconds = _in_turns(runs)
        operations = {name: _operations(run) for name, run in runs.items()}
        handle.set_active("own")
        ratios = [r / b for r, b in zip(seconds["rows"], seconds["base"], strict=True)]
        found[kind] = {
            "tokens": inputs["input_ids"].numel(),
            "cpu_seconds": {name: median(times) for name, times in seconds.items()},
            "rows_over_base": median(ratios),
            "operations": operations,
            "bytes_added": _bytes_added(handle, inputs["input_ids"]),
        }
    return found


def _in_turns(runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_ROUNDS + 1):
        for name, run in runs.items():
            started = time.thread_time()
            run()
            if turn:
                seconds[name].append(time.thread_time() - started)
    return seconds


def _operations(run: Callable[[], None]) -> int:
    with _Operations() as counted:
        run()
    return counted.count


def _bytes_added(handle: lf.LofitHandle, ids: Tensor) -> int:
    """Read and written beyond the base's forward: the gathered rows, twice, and y once more each way."""
    B, tokens = ids.shape[0], ids.numel()
    layers = [layer for layer in handle.layers.values() if layer.others is not None]
    return sum(layer.out_features * (3 * 4 * B + 2 * 4 * tokens) for layer in layers)


@torch.no_grad()
def switching(handle: lf.LofitHandle, names: Sequence[str]) -> dict[str, float]:
    """Microseconds of a switch, and the graphs that a compiler made before the switches and after."""
    layer = handle.layers[max(handle.layers)]
    z = torch.randn(2, 3, layer.in_features)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="eager", fullgraph=True)
    counted = torch._dynamo.utils.counters["stats"]
    handle.set_active(names[0])
    run(z)
    before, times = counted["unique_graphs"], []
    for number in range(_SWITCHES):
        name = names[number % len(names)]
        started = time.thread_time()
        handle.set_active(name)
        times.append(time.thread_time() - started)
        got = run(z)
        if not torch.allclose(got, layer(z), atol=1e-4):
            raise ValueError(f"the compiled layer does not compute with {name}")
    handle.set_active("own")
    return {
        "microseconds": 1e6 * median(times),
        "switches": _SWITCHES,
        "graphs_before": before,
        "graphs_after": counted["unique_graphs"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 where rows are not what they are one by one, or a switch made a compiler work."""
    parser = argparse.ArgumentParser(prog="benchmarks.speed.op.many_adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="an alias, a folder or a hub id (default: smollm2)")
    parser.add_argument("--adapters", type=int, default=100, help="in one batch, a row each (default: 100)")
    parser.add_argument("--tokens", type=int, default=4, help="of each row's prompt (default: 4)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, _ = load_model(options.model, dtype="float32", device="cpu")
    found = measured(model.eval(), options.adapters, options.tokens)
    found = {"machine": machine(), **found}
    print(json.dumps(found, indent=2))
    if options.json:
        write_json(options.json, found)
    right = max(found["apart"]["one by one"], found["apart"]["hook"]) < 1e-5 < found["apart"]["base"]
    switched = found["switching"]
    return 0 if right and switched["graphs_before"] == switched["graphs_after"] else 1


def measured(model, adapters: int, tokens: int) -> dict[str, object]:
    """All of it, as plain data; the model comes back as it was."""
    handle, names = with_adapters(model, adapters)
    try:
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, model.config.vocab_size, (adapters, tokens), generator=draw)
        tables = [layer.others for layer in handle.layers.values() if layer.others is not None]
        found: dict[str, object] = {"adapters": adapters, "table_bytes": sum(table.folded.nbytes for table in tables)}
        for part, measure in {"switching": switching, "apart": apart, "cost": cost}.items():
            found[part] = measure(handle, names, *([] if part == "switching" else [ids]))
            print(f"{part}: {json.dumps(found[part])}", file=sys.stderr, flush=True)
        return found
    finally:
        handle.unpatch()


if __name__ == "__main__":
    sys.exit(main())
