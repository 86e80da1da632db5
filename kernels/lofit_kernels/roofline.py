"""What each path must do, counted, and how long it would then take on a device: a prediction, not a measurement.

A path is a list of steps, one kernel each. Counted per step: floating-point operations of its products, and the bytes
of every tensor of T x K, T x N or N x K numbers that it reads and writes, each once. Left out: the bytes of vectors and
partial sums, and whatever a cache saves or costs. A step takes

    max(operations / (peak * efficiency), bytes / bandwidth, launches * shortest kernel)

and a path the sum over its steps; the floor is the frozen projection's two products. What a patched model does once for
all layers is a share of a launch per layer. `hook` is LoFiT written in eager PyTorch with float32 vectors over all
heads; its counts are checked against what autograd really runs in tests/kernels/test_roofline.py. `compiled hook`
assumes one kernel forward, and backward one for both sums, a second stage of them, and one for dz.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

SWEEP, VENDOR, TRITON = "sweep", "vendor", "triton"
# rows that a column sum takes in one stage: `gpu.tiles.ONE_STAGE_ROWS`
ONE_STAGE_ROWS = 2048
# rows that Inductor sums in one stage: of more it makes parts, 32 numbers of 4 rows each, and adds them in a second
INDUCTOR_ROWS = 128
# of a size: products of three are counted, and divided as floating-point numbers
MOST = 2**40
# bytes of one number of a hook's vectors, and of what it computes with them
WIDE = 4


@dataclass(frozen=True)
class Device:
    """A GPU as a roofline sees it.

    arch: as in the tile table. tflops16, tflops32: dense peak of bf16 and of IEEE float32 in 10^12 operations per
    second. bandwidth: of its memory, in 10^12 bytes per second. The rest is assumed, the same for every device: the
    share of the peak that the vendor's GEMM reaches (gemm), what a Triton GEMM reaches of that (triton), the share of
    the bandwidth that a sweep reaches (memory), and the seconds that even the shortest kernel takes (launch).
    """

    name: str
    arch: str
    tflops16: float
    tflops32: float
    bandwidth: float
    gemm: float = 0.80
    triton: float = 0.90
    memory: float = 0.90
    launch: float = 3e-6

    def seconds(self, step: "Step", itemsize: int) -> float:
        """The predicted time of one step."""
        peak = (self.tflops32 if itemsize == WIDE else self.tflops16) * 1e12 * self.gemm
        rate = peak * self.triton if step.by == TRITON else peak
        moving = step.bytes / (self.bandwidth * 1e12 * self.memory)
        return max(step.flops / rate, moving, step.launches * self.launch)


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        row.name: row
        for row in (
            # NVIDIA, A100 Tensor Core GPU datasheet, 80 GB SXM
            Device("A100", "sm_80", 312, 19.5, 2.039),
            # NVIDIA, H100 Tensor Core GPU datasheet, SXM; dense, half of the figure with sparsity
            Device("H100", "sm_90", 989.4, 66.9, 3.35),
            # NVIDIA, H200 Tensor Core GPU datasheet, SXM
            Device("H200", "sm_90", 989.4, 66.9, 4.8),
            # NVIDIA, Blackwell datasheet, HGX B200, an eighth of the board
            Device("B200", "sm_100", 2250, 80, 8.0),
            # AMD, Instinct MI300X data sheet
            Device("MI300X", "gfx942", 1307.4, 163.4, 5.3),
            # NVIDIA, Ada GPU architecture whitepaper; bf16 with float32 accumulation, dense
            Device("RTX 4090", "sm_89", 165.2, 82.6, 1.008),
        )
    }
)


@dataclass(frozen=True)
class Shape:
    """One projection: T tokens, N outputs, H heads of D inputs, of which n_scale have a scale and n_offset an offset.

    itemsize: bytes of a number of z, W and y. layers: of the model that are folded together; 1 for a call of its own.
    """

    T: int
    N: int
    H: int
    D: int
    n_scale: int = 0
    n_offset: int = 0
    itemsize: int = 2
    layers: int = 1

    def __post_init__(self) -> None:
        sizes = (self.T, self.N, self.H, self.D, self.layers)
        if not all(type(size) is int and 1 <= size < MOST for size in sizes):
            raise ValueError(f"expected T, N, H, D and layers to be whole numbers from 1 below 2**40, got {sizes}")
        if not (0 <= self.n_scale <= self.H and 0 <= self.n_offset <= self.H):
            raise ValueError(f"expected at most {self.H} heads, got {self.n_scale} scaled and {self.n_offset} shifted")
        if self.itemsize not in (2, WIDE):
            raise ValueError(f"expected numbers of 2 or {WIDE} bytes, got {self.itemsize}")

    @property
    def K(self) -> int:
        """All inputs, H * D."""
        return self.H * self.D

    @property
    def z(self) -> int:
        """Bytes of z, G or dz."""
        return self.T * self.K * self.itemsize

    @property
    def z_wide(self) -> int:
        """Bytes of z in a hook's float32."""
        return self.T * self.K * WIDE

    @property
    def z_scaled(self) -> int:
        """Bytes of z's columns that are scaled."""
        return self.T * self.n_scale * self.D * self.itemsize

    @property
    def z_listed(self) -> int:
        """Bytes of z's columns that have a vector; the smaller set of heads is taken to be within the larger."""
        return self.T * max(self.n_scale, self.n_offset) * self.D * self.itemsize

    @property
    def y(self) -> int:
        """Bytes of y or dY."""
        return self.T * self.N * self.itemsize

    @property
    def weight(self) -> int:
        """Bytes of W."""
        return self.columns(self.H)

    def columns(self, heads: int) -> int:
        """Bytes of W's columns of some heads."""
        return self.N * heads * self.D * self.itemsize

    def product(self, columns: int) -> int:
        """Operations of a product of T x N outputs over some columns."""
        return 2 * self.T * self.N * columns


class Step(NamedTuple):
    """One kernel: bytes read and written, operations of a product, who runs it (SWEEP, VENDOR, TRITON), launches."""

    name: str
    read: int
    written: int
    flops: int = 0
    by: str = SWEEP
    launches: float = 1.0

    @property
    def bytes(self) -> int:
        """Moved in all."""
        return self.read + self.written


Steps = list[Step]


def _product(s: Shape, by: str = VENDOR) -> Step:
    return Step("z W^T", s.z + s.weight, s.y, s.product(s.K), by)


def _product_bwd(s: Shape) -> Step:
    return Step("dY W", s.y + s.weight, s.z, s.product(s.K), VENDOR)


def _folded(s: Shape) -> Steps:
    if not s.n_offset:
        return []
    # of all layers together: the products, a copy that brings them together, and its cast to 16 bits
    return [Step("W v", s.columns(s.n_offset), 0, launches=(3 if s.itemsize < WIDE else 1) / s.layers)]


def _folded_bwd(s: Shape) -> Steps:
    if not s.n_offset:
        return []
    columns = s.columns(s.n_offset)
    own = [Step("sum dY", s.y, 0), *(_second_stage() if s.T > ONE_STAGE_ROWS else [])]
    # of all layers together: a copy that brings the sums together, the products, their second stage
    return [*own, Step("(sum dY) W_S", columns, 0, launches=3 / s.layers)]


def _second_stage() -> Steps:
    """The launch that adds up partial sums, whose bytes are left out."""
    return [Step("second stage", 0, 0)]


def _hook(s: Shape) -> Steps:
    steps, held = [], s.z
    for name, heads in (("z (1 + a)", s.n_scale), ("+ v", s.n_offset)):
        if heads:
            steps.append(Step(name, held, s.z_wide))
            held = s.z_wide
    return [*steps, *_cast("x to 16 bits", held, s), _product(s)]


def _hook_bwd(s: Shape) -> Steps:
    steps = [_product_bwd(s)]
    if s.itemsize < WIDE:
        steps.append(Step("G to float32", s.z, s.z_wide))
    if s.n_offset:
        steps.append(Step("sum G", s.z_wide, 0))
    if s.n_scale:
        steps.append(Step("G (1 + a)", s.z_wide, s.z_wide))
        steps += [Step("G z", s.z_wide + s.z, s.z_wide), Step("sum G z", s.z_wide, 0)]
    return steps + _cast("dz to 16 bits", s.z_wide, s)


def _cast(name: str, held: int, s: Shape) -> Steps:
    return [Step(name, held, s.z)] if s.itemsize < WIDE else []


def _compiled(s: Shape) -> Steps:
    return [Step("(1 + a) z + v", s.z, s.z), _product(s)]


def _compiled_bwd(s: Shape) -> Steps:
    read = s.z + (s.z if s.n_scale else 0)
    later = _second_stage() if s.T > INDUCTOR_ROWS else []
    return [_product_bwd(s), Step("sums", read, 0), *later, *([Step("G (1 + a)", s.z, s.z)] if s.n_scale else [])]


def _pass(s: Shape) -> Steps:
    return [*_folded(s), Step("(1 + a) z", s.z, s.z), _product(s)]


def _pass_bwd(s: Shape) -> Steps:
    # dz is written over G, on the scaled heads alone
    return [_product_bwd(s), Step("dz, da", 2 * s.z_scaled, s.z_scaled), *_second_stage(), *_folded_bwd(s)]


def _dither(s: Shape) -> Steps:
    return [Step("(1 + a) z + v", s.z, s.z), _product(s)]


def _dither_bwd(s: Shape) -> Steps:
    return [_product_bwd(s), Step("dz, da, dv", s.z_listed + s.z_scaled, s.z_scaled), *_second_stage()]


def _delta(s: Shape) -> Steps:
    steps = [*_folded(s), Step("what x loses", s.z_scaled, s.z_scaled), Step("x = (1 + a) z", s.z, s.z)]
    columns = s.columns(s.n_scale)
    if s.n_scale < s.H:
        steps.append(Step("gather W_S", columns, columns))
    if s.n_offset and s.itemsize < WIDE:
        steps.append(Step("constants as columns", s.z + s.weight, s.z + s.weight))
    steps.append(Step("r_S W_S^T", s.z_scaled + columns, s.y, s.product(s.n_scale * s.D), VENDOR))
    # accumulated where the addend already is
    return [*steps, _product(s)._replace(read=s.z + s.weight + s.y)]


def _prologue(s: Shape) -> Steps:
    return [*_folded(s), _product(s, TRITON)]


def _fused_delta(s: Shape) -> Steps:
    return [*_folded(s), _product(s, TRITON)._replace(flops=s.product(s.K + s.n_scale * s.D))]


def _epilogue_bwd(s: Shape) -> Steps:
    return [*_dither_epilogue_bwd(s), *_folded_bwd(s)]


def _dither_epilogue_bwd(s: Shape) -> Steps:
    return [_product_bwd(s)._replace(read=s.y + s.weight + s.z_scaled, by=TRITON), *_second_stage()]


# the names of `dispatch.Plan.forward` and `dispatch.Plan.backward`, and the peers'
FORWARD: Mapping[str, Callable[[Shape], Steps]] = MappingProxyType(
    {
        "floor": lambda s: [_product(s)],
        "hook": _hook,
        "compiled hook": _compiled,
        "pass": _pass,
        "delta": _delta,
        "fused delta": _fused_delta,
        "prologue": _prologue,
        "dither": _dither,
        "fold": lambda s: [*_folded(s), _product(s)],
    }
)
BACKWARD: Mapping[str, Callable[[Shape], Steps]] = MappingProxyType(
    {
        "floor": lambda s: [_product_bwd(s)],
        "hook": _hook_bwd,
        "compiled hook": _compiled_bwd,
        "pass": _pass_bwd,
        "epilogue": _epilogue_bwd,
        "dither": _dither_bwd,
        "dither epilogue": _dither_epilogue_bwd,
        "fold": lambda s: [_product_bwd(s), *_folded_bwd(s)],
    }
)
# name -> (forward, backward)
PATHS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "floor": ("floor", "floor"),
        "hook": ("hook", "hook"),
        "compiled hook": ("compiled hook", "compiled hook"),
        "pass": ("pass", "pass"),
        "delta": ("delta", "pass"),
        "fused delta": ("fused delta", "epilogue"),
        "prologue": ("prologue", "epilogue"),
        "dither": ("dither", "dither"),
        "fold": ("fold", "fold"),
    }
)


@dataclass(frozen=True)
class Prediction:
    """Counts of a path, and the seconds and the ratio to the floor that a device would need for them."""

    forward_bytes: int
    backward_bytes: int
    flops: int
    kernels: int
    seconds: float
    ratio: float


def steps_of(path: tuple[str, str], shape: Shape) -> tuple[Steps, Steps]:
    """The steps of (forward, backward), names in FORWARD and BACKWARD.

    Raises ValueError for an unknown name, and for a fold or a floor asked to compute a scale.
    """
    forward, backward = path
    if forward not in FORWARD or backward not in BACKWARD:
        raise ValueError(f"expected a path of one of {tuple(FORWARD)} and one of {tuple(BACKWARD)}, got {path}")
    if forward == "fold" and shape.n_scale:
        raise ValueError(f"a fold computes no scale, got {shape.n_scale} scaled heads")
    return FORWARD[forward](shape), BACKWARD[backward](shape)


def predict(path: tuple[str, str], shape: Shape, device: Device) -> Prediction:
    """The counts of (forward, backward) for a shape, exact, and their time on a device, predicted."""
    forward, backward = steps_of(path, shape)
    steps = forward + backward
    seconds = sum(device.seconds(step, shape.itemsize) for step in steps)
    floor = sum(device.seconds(step, shape.itemsize) for part in steps_of(PATHS["floor"], shape) for step in part)
    return Prediction(
        sum(step.bytes for step in forward),
        sum(step.bytes for step in backward),
        sum(step.flops for step in steps),
        len(steps),
        seconds,
        seconds / floor,
    )


def device_like(name: str) -> Device | None:
    """The row of a device by its own name or one that contains it ("NVIDIA H100 80GB HBM3"), or None."""
    words = name.upper().replace("-", " ").split()
    return next((row for row in DEVICES.values() if set(row.name.upper().split()) <= set(words)), None)
