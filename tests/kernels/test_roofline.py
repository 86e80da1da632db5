"""The counts of every path, by hand, by what autograd runs, and by what ours runs; the predictions, by known ratios."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lofit_kernels import head_affine_linear, roofline
from lofit_kernels.dispatch import plan
from lofit_kernels.gpu.tiles import ONE_STAGE_ROWS
from lofit_kernels.roofline import (
    BACKWARD,
    DEVICES,
    FORWARD,
    PATHS,
    TRITON,
    VENDOR,
    Device,
    Shape,
    device_like,
    predict,
    steps_of,
)

# an H100 as in the table of ratios below: what it reaches, instead of its peaks
REACHED = Device("reached", "sm_90", 790, 60, 3.0, gemm=1.0, triton=0.9, memory=1.0, launch=0.0)


def square(N: int, T: int = 8192, **heads) -> Shape:
    return Shape(T, N, N // 128, 128, **heads)


def per_element(path: str, shape: Shape) -> tuple[float, float]:
    """Bytes per element of z beyond the floor's, forward and backward."""
    found, floor = steps_of(PATHS[path], shape), steps_of(PATHS["floor"], shape)
    return tuple(
        (sum(step.bytes for step in ours) - sum(step.bytes for step in theirs)) / (shape.T * shape.K)
        for ours, theirs in zip(found, floor, strict=True)
    )


@pytest.mark.parametrize(
    ("path", "heads", "expected"),
    [
        ("hook", {"n_scale": 16, "n_offset": 16}, (20, 38)),
        ("hook", {"n_scale": 16}, (12, 34)),
        ("hook", {"n_offset": 16}, (12, 16)),
        ("compiled hook", {"n_scale": 16, "n_offset": 16}, (4, 8)),
        ("pass", {"n_scale": 16}, (4, 6)),
        ("dither", {"n_scale": 16, "n_offset": 16}, (4, 6)),
        ("dither", {"n_scale": 4, "n_offset": 4}, (4, 1.5)),
        ("dither", {"n_offset": 4}, (4, 0.5)),
        ("pass", {"n_scale": 4}, (4, 1.5)),
        ("prologue", {"n_scale": 16}, (0, 2)),
        ("fused delta", {"n_scale": 16}, (0, 2)),
        ("fused delta", {"n_scale": 4}, (0, 0.5)),
    ],
)
def test_bytes_per_element(path, heads, expected):
    assert per_element(path, square(2048, **heads)) == expected


# N = K: ratios to the two products of a hook with a and v, one with v, a pass each way, and v folded on a tenth
@pytest.mark.parametrize(
    ("N", "hook", "offsets", "one_pass", "fold"),
    [(2048, 2.86, 1.90, 1.32, 1.07), (4096, 1.93, 1.45, 1.16, 1.04), (8192, 1.47, 1.23, 1.08, 1.02)],
)
def test_known_ratios(N, hook, offsets, one_pass, fold):
    H = N // 128
    cases = [
        ("hook", {"n_scale": H, "n_offset": H}, hook),
        ("hook", {"n_offset": H}, offsets),
        ("pass", {"n_scale": H}, one_pass),
        ("fold", {"n_offset": round(0.1 * H)}, fold),
    ]
    for path, heads, ratio in cases:
        assert predict(PATHS[path], square(N, **heads), REACHED).ratio == pytest.approx(ratio, abs=0.0051), path


@pytest.mark.parametrize(("efficiency", "ratio"), [(0.95, 1.05), (0.90, 1.11), (0.85, 1.18)])
def test_fused_products_cost_their_efficiency(efficiency, ratio):
    device = replace(REACHED, triton=efficiency)
    seen = predict(PATHS["prologue"], square(4096, n_scale=32), device)
    assert seen.ratio == pytest.approx(ratio, abs=0.0051)


def test_delta_by_hand():
    """T = 8, N = 4, 2 of 3 heads of 2 scaled, 2-byte numbers."""
    shape = Shape(T=8, N=4, H=3, D=2, n_scale=2)
    forward, backward = steps_of(PATHS["delta"], shape)
    assert [tuple(step)[:4] for step in forward] == [
        ("what x loses", 64, 64, 0),
        ("x = (1 + a) z", 96, 96, 0),
        ("gather W_S", 32, 32, 0),
        ("r_S W_S^T", 64 + 32, 64, 2 * 8 * 4 * 4),
        ("z W^T", 96 + 48 + 64, 64, 2 * 8 * 4 * 6),
    ]
    assert [tuple(step)[:4] for step in backward] == [
        ("dY W", 64 + 48, 96, 2 * 8 * 4 * 6),
        ("dz, da", 128, 64, 0),
        ("second stage", 0, 0, 0),
    ]


def test_dither_by_hand():
    """T = 8, N = 4, 2 of 3 heads of 2 scaled and all of them shifted, 2-byte numbers."""
    shape = Shape(T=8, N=4, H=3, D=2, n_scale=2, n_offset=3)
    forward, backward = steps_of(PATHS["dither"], shape)
    assert [(step.name, step.read, step.written) for step in forward] == [
        ("(1 + a) z + v", 96, 96),
        ("z W^T", 96 + 48, 64),
    ]
    assert [(step.name, step.read, step.written) for step in backward] == [
        ("dY W", 64 + 48, 96),
        ("dz, da, dv", 96 + 64, 64),
        ("second stage", 0, 0),
    ]


@pytest.mark.parametrize("T, stages", [(128, 0), (129, 1)])
def test_the_compiled_hook_sums_many_rows_in_two_stages(T, stages):
    for heads, sweeps in (({"n_scale": 16}, 2), ({"n_offset": 16}, 1)):
        _, backward = steps_of(PATHS["compiled hook"], square(2048, T=T, **heads))
        assert sum(step.by != VENDOR for step in backward) == sweeps + stages


@pytest.mark.parametrize("T, stages", [(ONE_STAGE_ROWS, 0), (ONE_STAGE_ROWS + 1, 1)])
def test_the_fold_sums_few_rows_in_one_launch(T, stages):
    _, backward = steps_of(PATHS["fold"], square(2048, T=T, n_offset=2))
    assert sum(step.name == "second stage" for step in backward) == stages
    assert roofline.ONE_STAGE_ROWS == ONE_STAGE_ROWS


def test_a_launch_for_all_layers_is_shared():
    device = replace(REACHED, bandwidth=1e6, launch=1.0)
    times = [predict(PATHS["fold"], square(2048, T=512, n_offset=1, layers=layers), device) for layers in (1, 32)]
    alone, shared = (seen.seconds - 2 for seen in times)
    # sum dY is the layer's own, the three of the fold and the three of its gradient are not
    assert (alone, shared) == pytest.approx((1 + 6, 1 + 6 / 32))


def test_fold_by_hand():
    shape = Shape(T=8, N=4, H=3, D=2, n_offset=1)
    forward, backward = steps_of(PATHS["fold"], shape)
    assert [(step.name, step.bytes) for step in forward] == [("W v", 16), ("z W^T", 96 + 48 + 64)]
    assert [(step.name, step.bytes) for step in backward] == [("dY W", 208), ("sum dY", 64), ("(sum dY) W_S", 16)]


class Moved(TorchDispatchMode):
    """Bytes of large tensors in and out of every operation that moves data."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.bytes, self.operations = smallest, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = function.is_view or "unsafe_view" in function.name()
        if not views and "detach" not in function.name():
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            large = [x.numel() * x.element_size() for x in tensors if x.numel() >= self.smallest]
            self.bytes += sum(large)
            self.operations += bool(large)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n_scale", "n_offset"), [(3, 3), (3, 0), (0, 3)])
def test_hook_moves_what_is_counted(dtype, n_scale, n_offset):
    shape = Shape(T=64, N=24, H=3, D=8, n_scale=n_scale, n_offset=n_offset, itemsize=dtype.itemsize)
    z = torch.randn(shape.T, shape.K).to(dtype).requires_grad_()
    weight = torch.randn(shape.N, shape.K).to(dtype)
    a = torch.randn(shape.K, requires_grad=True) if n_scale else None
    v = torch.randn(shape.K, requires_grad=True) if n_offset else None
    forward, backward = Moved(shape.T * shape.K), Moved(shape.T * shape.K)
    with forward:
        x = z if a is None else z * (1 + a)
        y = linear((x if v is None else x + v).to(dtype), weight)
    dy = torch.randn_like(y)
    with backward:
        torch.autograd.grad(y, [leaf for leaf in (z, a, v) if leaf is not None], dy)
    for seen, steps in zip((forward, backward), steps_of(PATHS["hook"], shape), strict=True):
        products = sum(step.by == VENDOR for step in steps)
        assert seen.operations == len(steps)
        # the weight is smaller than what is watched
        assert seen.bytes == sum(step.bytes for step in steps) - products * shape.weight


@pytest.mark.parametrize(("n_scale", "n_offset"), [(4, 0), (1, 0), (0, 2), (2, 3)])
@pytest.mark.parametrize("form", ["pass", "delta", "dither"])
def test_products_are_what_is_counted(form, n_scale, n_offset):
    shape = Shape(T=16, N=24, H=4, D=8, n_scale=n_scale, n_offset=n_offset)
    z = torch.randn(shape.T, shape.K, dtype=torch.bfloat16, requires_grad=True)
    vectors = {
        name: torch.randn(heads, shape.D, requires_grad=True)
        for name, heads in (("scale", n_scale), ("offset", n_offset))
        if heads
    }
    heads = {f"{name}_heads": range(len(rows)) for name, rows in vectors.items()}
    chosen = plan(has_scale=n_scale > 0, dtype=z.dtype, device_type="cpu", form=form)
    weight = torch.randn(shape.N, shape.K, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        head_affine_linear(z, weight, **vectors, **heads, form=form).sum().backward()
    counted = predict((chosen.forward, chosen.backward), shape, DEVICES["H100"]).flops
    # ours besides: the eight columns of constants, and the thin products over the offsets, with no T in them
    columns = 2 * shape.T * shape.N * 8 if chosen.forward == "delta" and n_offset else 0
    thin = 4 * shape.N * n_offset * shape.D
    assert counted <= counter.get_total_flops() <= counted + columns + thin


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_faster_than_the_floor(path, device):
    heads = {"n_offset": 4} if path == "fold" else {"n_scale": 32}
    seen = predict(PATHS[path], square(4096, **heads), device)
    assert seen.ratio == 1 if path == "floor" else seen.ratio > 1
    assert seen.seconds > 0
    assert seen.kernels >= 2


def test_few_tokens_are_bound_by_the_shortest_kernel():
    seen = predict(PATHS["hook"], square(2048, T=1, n_scale=16), DEVICES["H100"])
    slow = [
        step for part in steps_of(PATHS["hook"], square(2048, T=1, n_scale=16)) for step in part if step.by != VENDOR
    ]
    assert seen.seconds >= len(slow) * DEVICES["H100"].launch


def test_every_plan_has_a_prediction():
    for form in ("pass", "delta", "dither"):
        for gemm in ("vendor", "fused_forward", "fused_backward", "fused"):
            if form == "dither" and gemm in ("fused_forward", "fused"):
                continue
            chosen = plan(
                has_scale=True, dtype=torch.bfloat16, device_type="cuda", form=form, gemm=gemm, backend="triton"
            )
            forward, backward = steps_of((chosen.forward, chosen.backward), square(2048, n_scale=16))
            assert (forward[-1].by, backward[0].by) == (
                TRITON if chosen.fused_forward else VENDOR,
                TRITON if chosen.fused_backward else VENDOR,
            )
    assert {"fold"} <= FORWARD.keys() & BACKWARD.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, "whole numbers from 1"),
        ({"T": 2**40}, r"below 2\*\*40"),
        ({"T": 8.0}, "whole numbers"),
        ({"T": float("nan")}, "whole numbers"),
        ({"n_scale": 5}, "at most 4 heads, got 5 scaled"),
        ({"n_offset": -1}, "at most 4 heads"),
        ({"itemsize": 8}, "2 or 4 bytes, got 8"),
        ({"layers": 0}, "layers to be whole numbers from 1"),
    ],
)
def test_shape_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shape(**{"T": 8, "N": 8, "H": 4, "D": 2, **arguments})


def test_steps_refuse():
    with pytest.raises(ValueError, match="'magic'"):
        steps_of(("magic", "pass"), square(2048))
    with pytest.raises(ValueError, match="computes no scale, got 3"):
        steps_of(PATHS["fold"], square(2048, n_scale=3))


def test_device_like():
    assert device_like("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_like("NVIDIA A100-SXM4-80GB") is DEVICES["A100"]
    assert device_like("AMD Instinct MI300X") is DEVICES["MI300X"]
    assert device_like("NVIDIA GeForce RTX 4090") is DEVICES["RTX 4090"]
    assert device_like("NVIDIA GeForce RTX 3090") is None
    assert device_like("cpu") is None
