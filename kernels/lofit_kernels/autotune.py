"""Which path is fastest on the present device: every candidate checked against float64, then timed side by side.

A candidate is a path that keeps whatever small scales the default keeps. One call is a forward and a backward pass with
gradients of z and of the scale, as in step 1. Rounds are interleaved, so that a busy machine is busy for all; a
candidate replaces the default only where the median of its ratios to it, taken within rounds, is below MARGIN.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels import answers, reference
from lofit_kernels.answers import Key, Path
from lofit_kernels.devices import unserved
from lofit_kernels.dispatch import is_many, plan, valid_paths
from lofit_kernels.error_bound import allowed_error, largest_error, orders, projection_margins
from lofit_kernels.functional import head_affine_linear, head_index
from lofit_kernels.roofline import Shape

ROUNDS = 9
MARGIN = 0.97
# a round times a path for at least this long, or launches would be timed one by one
SECONDS_PER_ROUND = 2e-3


@dataclass(frozen=True)
class Answer:
    """What was found for one case.

    chosen: the path to take. seconds: path -> median of one call. ratios: path -> median over rounds of its time to the
    default's. refused: path -> what was wrong with its numbers, or the error it ended with; such a path is not timed.
    """

    case: Key
    default: Path
    chosen: Path
    seconds: dict[Path, float]
    ratios: dict[Path, float]
    refused: dict[Path, str]

    def evidence(self) -> dict[str, object]:
        """Plain data to be kept beside the choice."""
        return {
            "default": str(self.default),
            "milliseconds": {str(path): 1e3 * seconds for path, seconds in self.seconds.items()},
            "ratio_to_default": {str(path): ratio for path, ratio in self.ratios.items()},
            "refused": {str(path): reason for path, reason in self.refused.items()},
        }


def autotune(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backends: Sequence[str] | None = None,
    rounds: int = ROUNDS,
) -> Iterator[Answer]:
    """Measure every candidate for each shape with scaled heads, one answer at a time.

    backends: those to try, by default those that the device computes with; "triton" on a CPU needs its interpreter.
    Others are compared with the device's default path; with the default of the first of these where its backend is not
    among them.
    rounds: timed ones, after one that is thrown away.
    Raises ValueError for a shape without scaled heads (its one path is the fold), less than one round, no backend, or
    one that the device does not compute with; RuntimeError where the default path itself gives wrong numbers.
    """
    if rounds < 1:
        raise ValueError(f"expected at least 1 round, got {rounds}")
    if backends is not None and not backends:
        raise ValueError("expected at least one backend, or None for the device's own, got none")
    for shape in shapes:
        if not shape.n_scale:
            raise ValueError(f"expected scaled heads: without them there is one path; got {shape}")
        yield _measure(shape, dtype, device, backends, rounds)


def _measure(shape: Shape, dtype: torch.dtype, device: torch.device, backends, rounds: int) -> Answer:
    case = {"has_scale": True, "many_heads": is_many(shape.n_scale * shape.D, shape.K), "dtype": dtype}
    here = {"device_type": device.type, "refusal": unserved(device)}
    default = plan(**case, **here).path
    if backends is None:
        backends = tuple(dict.fromkeys((default.backend, "aten")))
    elif default.backend not in backends:
        default = plan(**case, **here, backend=backends[0]).path
    candidates = valid_paths(**case, backends=tuple(backends), safe_only=True)
    candidates = [default, *(path for path in candidates if path != default)]
    inputs = _Inputs(shape, dtype, device)
    refused = {path: reason for path in candidates if (reason := inputs.check(path)) is not None}
    if default in refused:
        raise RuntimeError(f"the default path {default} gives wrong numbers for {shape}: {refused[default]}")
    calls = {path: inputs.call(path) for path in candidates if path not in refused}
    rows = _interleaved(calls, rounds, device)
    ratios = {path: statistics.median(map(float.__truediv__, took, rows[default])) for path, took in rows.items()}
    best = min(ratios, key=ratios.__getitem__)
    return Answer(
        answers.key(dtype, shape.N, shape.K, shape.D, shape.n_scale, shape.T),
        default,
        best if ratios[best] < MARGIN else default,
        {path: statistics.median(took) for path, took in rows.items()},
        ratios,
        refused,
    )


class _Inputs:
    """One projection with scaled heads spread over all, the gradients it should have, and those an eager hook gives.

    `eager` holds (y,), (dz,) and da in several orders of its sum over tokens.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            # whatever the defaults of dtype and device are
            return torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu")

        self.z = draw(shape.T, shape.K).to(device, dtype).requires_grad_()
        self.weight = (draw(shape.N, shape.K) / shape.K**0.5).to(device, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.scale = (0.1 * draw(shape.n_scale, shape.D)).to(device, wide).requires_grad_()
        heads = [i * shape.H // shape.n_scale for i in range(shape.n_scale)]
        self.heads = head_index(heads, shape.H, device)
        self.dy = draw(shape.T, shape.N).to(device, dtype)
        exact = (self.z.detach().double(), self.weight.double(), None, self.scale.detach().double(), self.heads)
        grads = reference.affine_linear_backward(self.dy.double(), *exact)
        self.expected = (reference.affine_linear(*exact), grads.z, grads.scale)
        y, dz, da = self._hook(shape, self.z, self.weight, self.dy)
        shuffled = orders(shape.T, shape.N, device=device)[1:]
        others = (self._hook(shape, self.z[t], self.weight[n], self.dy[t][:, n])[2] for t, n in shuffled)
        self.eager = ((y,), (dz,), (da, *others))
        dense = self.scale.new_zeros(shape.H, shape.D).index_copy(0, self.heads, self.scale.detach()).flatten()
        self.margins = projection_margins(self.z, self.weight, self.dy, dense, None)

    def call(self, path: Path) -> Callable[[], tuple[Tensor, ...]]:
        """One forward and backward pass by a path."""
        vectors = {"scale": self.scale, "scale_heads": self.heads}
        return lambda: self._with_gradients(
            head_affine_linear(self.z, self.weight, **vectors, **path._asdict()), self.dy
        )

    def check(self, path: Path) -> str | None:
        """What is wrong with a path's numbers, or the error it ends with; None for nothing.

        The rule of the house: `error_bound.allowed_error`, against an eager hook, with the margin of float32's sums.
        """
        try:
            results = self.call(path)()
        # whatever a compiler, a driver or a launcher raises: this path is not for this device
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for name, got, expected, eager in zip(("y", "dz", "da"), results, self.expected, self.eager, strict=True):
            error = largest_error(got, expected)
            allowed = allowed_error(expected, *eager, margin=self.margins[name])
            if not error <= allowed:
                return f"error of {name} {error:.2e}, expected at most {allowed:.2e}"
        return None

    def _hook(self, shape: Shape, z: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        dense = self.scale.new_zeros(shape.H, shape.D).index_copy(0, self.heads, self.scale)
        x = (z.unflatten(-1, dense.shape) * (1 + dense)).flatten(-2).to(z.dtype)
        return self._with_gradients(linear(x, weight), dy)

    def _with_gradients(self, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return (y.detach(), *torch.autograd.grad(y, (self.z, self.scale), dy))


def _interleaved(calls: dict[Path, Callable[[], object]], rounds: int, device: torch.device) -> dict[Path, list[float]]:
    """Seconds per call of every path in every round; the order turns by one each round."""
    paths = list(calls)
    repeats = {path: max(1, round(SECONDS_PER_ROUND / _seconds(calls[path], 1, device))) for path in paths}
    rows: dict[Path, list[float]] = {path: [] for path in paths}
    for turn in range(rounds + 1):
        shift = turn % len(paths)
        for path in paths[shift:] + paths[:shift]:
            took = _seconds(calls[path], repeats[path], device)
            if turn:
                rows[path].append(took)
    return rows


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
