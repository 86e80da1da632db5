"""What the op would do for a whole model and what that should cost: for `plan` and `autotune`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path

import torch

from lofit_fast.config import HeadSet
from lofit_fast.files import writable_folder, write_json
from lofit_fast.locks import alone
from lofit_fast.models.device import best_device
from lofit_fast.models.load import auto_classes, naming_broken_files, resolve
from lofit_fast.patching.architectures import find_projections, outputs_of
from lofit_fast.patching.storage import read_adapter
from lofit_kernels import answers, roofline
from lofit_kernels.autotune import ROUNDS, Answer, autotune
from lofit_kernels.devices import unserved
from lofit_kernels.dispatch import SMALL_SCALES, Plan, answers_for, is_many, plan, use_answers
from lofit_kernels.roofline import DEVICES, Device, Shape
from lofit_kernels.shapes import SHAPES

EVIDENCE = "prediction (roofline), not a measurement"
PRESENT = "present"


@dataclass(frozen=True)
class Layer:
    """One output projection: N outputs, H heads of D inputs."""

    layer: int
    H: int
    D: int
    N: int


def layers_of(name: str) -> list[Layer]:
    """The output projections of a model: a name in `SHAPES`, an alias, a folder, a .gguf file, or a hub id.

    Only the config is read; no weights are (an alias or a GGUF file is converted on first use, as everywhere).
    Raises ValueError for a model without such projections or a broken config, OSError for one that is not there.
    """
    if name in SHAPES:
        shape = SHAPES[name]
        return [Layer(layer, shape.H, shape.D, shape.N) for layer in range(shape.layers)]
    from transformers import AutoConfig

    with naming_broken_files(name):
        # a conversion makes weights
        folder = resolve(name)
    with naming_broken_files(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = auto_classes(config)[0].from_config(config)
    return [Layer(p.layer, p.n_heads, p.head_dim, outputs_of(p.module)) for p in find_projections(model)]


def adapter_heads(folder: Path, layers: Sequence[Layer]) -> tuple[list[int], list[int]]:
    """How many heads of each layer an adapter scales, and how many it shifts.

    Raises what `read_adapter` raises, and ValueError for an adapter of a model of another shape, or for answers alone.
    """
    adapter = read_adapter(folder)
    if adapter.config.positions != "all":
        raise ValueError(
            f"{folder} acts on answers alone, whose prompts and answers are computed in two ways: there is no "
            "single path to tell, expected an adapter of all positions"
        )
    got = adapter.fingerprint
    columns = ([layer.H for layer in layers], [layer.D for layer in layers], [layer.N for layer in layers])
    # as a fingerprint has them: one number where all layers have the same
    sizes = (column[0] if len(set(column)) == 1 else tuple(column) for column in columns)
    shape, expected = (got.layers, got.heads, got.head_dim, got.hidden), (len(layers), *sizes)
    if shape != expected:
        raise ValueError(f"{folder} is for another model: (layers, heads, head_dim, hidden) {shape}, not {expected}")
    return tuple(_listed(heads, layers) for heads in (adapter.config.scale, adapter.config.offset))


def _listed(heads: HeadSet, layers: Sequence[Layer]) -> list[int]:
    if heads == "all":
        return [layer.H for layer in layers]
    numbers = [number for number, _ in heads or ()]
    return [numbers.count(layer.layer) for layer in layers]


def spread_heads(top: str | int | float | None, layers: Sequence[Layer]) -> list[int]:
    """How many heads of each layer have a vector when "all" have, or a count or fraction of them spread evenly.

    Raises ValueError for a count or fraction out of range.
    """
    total = sum(layer.H for layer in layers)
    if top is None:
        return [0] * len(layers)
    # nan and inf are no count
    fraction = isinstance(top, float) and (round(top * total) if math.isfinite(top) else 0)
    count = total if top == "all" else fraction if isinstance(top, float) else top
    if not 0 < count <= total:
        raise ValueError(f"expected 'all', a count up to {total} or a fraction in (0, 1], got {top}")
    ends = [count * heads // total for heads in accumulate(layer.H for layer in layers)]
    return [end - start for start, end in pairwise((0, *ends))]


def plan_layers(
    layers: Sequence[Layer],
    n_scale: Sequence[int],
    n_offset: Sequence[int],
    *,
    tokens: int,
    dtype: torch.dtype,
    device: str = PRESENT,
) -> list[dict]:
    """Per layer: the path, why, what it does to small scales, and its predicted cost.

    device: "present", with what was measured on it, or a name in `roofline.DEVICES`. No cost is predicted for a device
    that is not there, or in float64. Raises ValueError for an unknown device.
    """
    name, kind, model, refusal = _device(device)
    here = {"device_type": kind, "refusal": refusal}
    return [
        _layer_row(layer, scaled, shifted, tokens, dtype, here, model, {} if name is None else answers_for(name))
        for layer, scaled, shifted in zip(layers, n_scale, n_offset, strict=True)
    ]


def _layer_row(
    layer: Layer, scaled: int, shifted: int, tokens: int, dtype: torch.dtype, here: dict, model: Device | None, known
) -> dict:
    row = {**asdict(layer), "scaled": scaled, "shifted": shifted}
    if not scaled and not shifted:
        return {**row, "forward": "base", "backward": "base", "why": "no heads here: the base layer itself"}
    answer = None
    if scaled:
        answer = known.get(answers.key(dtype, layer.N, layer.H * layer.D, layer.D, scaled, tokens))
    many = is_many(scaled, layer.H)
    case = {"has_scale": scaled > 0, "many_heads": many, "has_offset": shifted > 0}
    chosen = plan(**case, **here, dtype=dtype, answer=answer)
    row |= {"forward": chosen.forward, "backward": chosen.backward, "backend": chosen.backend, "gemm": chosen.gemm}
    row |= {"why": chosen.reason, "small_scales": SMALL_SCALES[chosen.form, dtype]}
    return row | _cost(layer, scaled, shifted, tokens, dtype, model, chosen)


def _cost(layer: Layer, scaled: int, shifted: int, tokens, dtype, model: Device | None, chosen: Plan) -> dict:
    if model is None or dtype == torch.float64:
        return {}
    shape = Shape(tokens, layer.N, layer.H, layer.D, scaled, shifted, dtype.itemsize)
    return {**asdict(roofline.predict((chosen.forward, chosen.backward), shape, model)), "evidence": EVIDENCE}


def _device(name: str) -> tuple[str | None, str, Device | None, str | None]:
    """(name that answers are filed under, torch's kind of device, its roofline, why no Triton kernel serves it)."""
    if name == PRESENT:
        device = best_device()
        filed = answers.device_name(device)
        return filed, device.type, roofline.device_like(filed), unserved(device)
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: expected {PRESENT!r} or one of {', '.join(DEVICES)}")
    return None, "cuda", DEVICES[name], None


def measure_paths(
    layers: Sequence[Layer],
    tops: Sequence[str | int | float],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backends: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    tell=lambda answer: None,
) -> tuple[list[Answer], Path]:
    """Measure the paths for every shape in `layers`, share of heads and number of tokens; write and use the answers.

    One process measures on a device at a time; others wait, since each would slow the other down.
    tell: called with each answer as it comes. Returns the answers and the file they were written to, together with
    those it already held. Raises what `autotune` raises, and OSError where the cache folder cannot be written.
    """
    name = answers.device_name(device)
    # where nothing can be kept, nothing is measured
    file = answers.answers_file(name)
    shapes: dict[answers.Key, Shape] = {}
    for layer in {(row.H, row.D, row.N): row for row in layers}.values():
        for top, T in product(tops, tokens):
            n_scale = max(1, *spread_heads(top, [layer]))
            shape = Shape(T, layer.N, layer.H, layer.D, n_scale, itemsize=dtype.itemsize)
            shapes[answers.key(dtype, shape.N, shape.K, shape.D, n_scale, T)] = shape
    with alone(writable_folder(file.parent) / f"{file.name}.lock", f"measure on {name}", wait=True):
        found = []
        for answer in autotune(list(shapes.values()), dtype, device, backends=backends, rounds=rounds):
            tell(answer)
            found.append(answer)
        kept = {answer.case: (answer.chosen, answer.evidence()) for answer in found}
        write_json(file, answers.answers_content(name, kept))
    use_answers(name, answers.read_answers(name))
    return found, file
