"""The choice of path, as data.

A path is a form (the algebra), a backend (who computes the elementwise and reduction parts) and a gemm (whose matrix
products). Forms:

    fold    y = z W^T + (b + W v)                       offset only: nothing of z is touched or saved
    pass    y = ((1 + a) z) W^T + (b + W v)             one elementwise pass before the GEMM
    delta   y = x W^T + r_S W_S^T + (b + W v)           x is (1 + a) z, rounded; r what that loses, added in fp32
    dither  y = ((1 + a) z + v) W^T + b                 16 bits: the pass, rounded up or down by a fixed pattern

In 16-bit dtypes, (1 + a) z rounds back to z for |a| < 2^-9 (bf16) or 2^-12 (fp16), so `pass` ignores small scales.
`delta` does not: only y itself is rounded. It costs the pass and h/H of a second forward GEMM. `dither` does not
either: what is too small for 16 bits moves as many numbers by a whole unit as it should on the average. It costs no
more than the pass, and adds noise of the size of the rounding.

`MANY` is where the cost of `delta` is no longer small: beyond it the 16-bit default is `pass`. Step 1, which scales
every head to rank them, chooses the same heads either way (docs/numerics.md); tuned scales on a few heads keep their
full effect. With Triton, where a sweep is one kernel, `dither` stands in for `delta`, and for a pass beside an offset,
which would otherwise read W again to fold it: of what loses no small scale or offset, it is predicted to be fastest on
every device (docs/kernels/roofline.md).

The default is a table. Answers measured by `autotune.py` on the present device replace it where they are as safe: a
measured answer may turn `pass` into `delta` or `dither`, never one of those into `pass`, however much faster that is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lofit_kernels import answers
from lofit_kernels.answers import BACKENDS, FORMS, GEMMS, Key, Path
from lofit_kernels.devices import unserved

# looked up, not imported
HAS_TRITON = find_spec("triton") is not None
# lose no small scale, whatever the dtype
KEEP_SMALL = ("delta", "dither")
# (form, whether the forward product is fused) -> what the forward is called; the fused pass is a prologue
FORWARD: Mapping[tuple[str, bool], str] = MappingProxyType(
    {
        ("fold", False): "fold",
        ("pass", False): "pass",
        ("delta", False): "delta",
        ("pass", True): "prologue",
        ("delta", True): "fused delta",
        ("dither", False): "dither",
    }
)
# (form, whether the backward product is fused) -> what the backward is called
BACKWARD: Mapping[tuple[str, bool], str] = MappingProxyType(
    {
        ("fold", False): "fold",
        **{(form, fused): name for form in ("pass", "delta") for fused, name in ((False, "pass"), (True, "epilogue"))},
        ("dither", False): "dither",
        ("dither", True): "dither epilogue",
    }
)
# every path by number: what a compiled graph can hand from a forward to a backward pass
NUMBERED_PATHS: tuple[Path, ...] = tuple(Path(*parts) for parts in product(FORMS, BACKENDS, GEMMS))
# the share of scaled heads beyond which a second product over them is too dear a default
MANY = 0.25
LOW_PRECISION = (torch.bfloat16, torch.float16)
# float64 exists for gradcheck and oracles; the kernels accumulate in float32
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what each form does to a scale: (form, dtype) -> words; see docs/numerics.md and tests/kernels/test_dead_zone.py
SMALL_SCALES: Mapping[tuple[str, torch.dtype], str] = MappingProxyType(
    {
        **{("fold", dtype): "no scale here" for dtype in (torch.float64, *TRITON_DTYPES)},
        ("pass", torch.bfloat16): "|a| < 2^-9 has no effect on y (its gradient is right)",
        ("pass", torch.float16): "|a| < 2^-12 has no effect on y (its gradient is right)",
        ("delta", torch.bfloat16): "every |a| acts; rounding y adds noise, no bias",
        ("delta", torch.float16): "every |a| acts; rounding y adds noise, no bias",
        ("dither", torch.bfloat16): "every |a| acts; rounding z and y adds noise, no bias",
        ("dither", torch.float16): "every |a| acts; rounding z and y adds noise, no bias",
        **{("dither", dtype): "only for 16 bits" for dtype in (torch.float32, torch.float64)},
        **{(form, dtype): "every |a| acts" for form in ("pass", "delta") for dtype in (torch.float32, torch.float64)},
    }
)


@dataclass(frozen=True)
class Plan:
    """How one projection is computed: `form` in FORMS, `backend` in BACKENDS, `gemm` in GEMMS, and why."""

    form: str
    backend: str
    gemm: str
    reason: str

    @property
    def path(self) -> Path:
        """(form, backend, gemm), without the reason."""
        return Path(self.form, self.backend, self.gemm)

    @property
    def fused_forward(self) -> bool:
        """Whether the forward product has the scale inside."""
        return GEMMS[self.gemm][0]

    @property
    def fused_backward(self) -> bool:
        """Whether the backward product has the reductions inside."""
        return GEMMS[self.gemm][1]

    @property
    def forward(self) -> str:
        """The forward's name: fold, pass, delta, prologue, fused delta or dither."""
        return FORWARD[self.form, self.fused_forward]

    @property
    def backward(self) -> str:
        """The backward's name: fold (column sum and thin product), pass or dither (one sweep after the product, without
        or with the offset's sum), epilogue or dither epilogue (inside the product)."""
        return BACKWARD[self.form, self.fused_backward]


class Constants(NamedTuple):
    """has_offset: on any head, folded or not. crowded: an offset that is not folded stands beside a bias, both of which
    16 bits cannot hold in one."""

    has_offset: bool
    crowded: bool


class _Case(NamedTuple):
    """What the rules look at.

    has_scale: on any head. low_precision: 16 bits. many_heads: the scale is on more than MANY of them. on_triton: the
    primitives are Triton's, and the forward product the vendor's. has_offset, crowded: see `Constants`.
    """

    has_scale: bool
    low_precision: bool
    many_heads: bool
    on_triton: bool
    has_offset: bool
    crowded: bool


_FOLD = "offset only: folded into the bias, no activation saved"
_DITHER = "rounded up or down by a fixed pattern: small scales and offsets act at the price of one elementwise pass"
# a case -> form, gemm, reason; first match wins, None matches both
_RULES: tuple[tuple[bool | str | None, ...], ...] = (
    (False, True, None, True, True, True, "dither", "vendor", f"16-bit offset beside a bias, {_DITHER}"),
    (False, None, None, None, None, None, "fold", "vendor", _FOLD),
    (True, True, None, True, True, None, "dither", "vendor", f"16-bit scale and offset, {_DITHER}"),
    (True, True, False, True, None, None, "dither", "vendor", f"16-bit scale on few heads, {_DITHER}"),
    (True, True, False, None, None, None, "delta", "vendor", "16-bit scale on few heads: keeps small scales alive"),
    (True, True, True, None, None, None, "pass", "vendor", "16-bit scale on many heads: one elementwise pass"),
    (True, False, None, None, None, None, "pass", "vendor", "scale in full precision: one elementwise pass"),
)


def plan(
    *,
    has_scale: bool,
    dtype: torch.dtype,
    device_type: str,
    many_heads: bool = False,
    has_offset: bool = False,
    crowded: bool = False,
    form: str = "auto",
    backend: str = "auto",
    gemm: str = "auto",
    answer: Path | None = None,
    refusal: str | None = None,
) -> Plan:
    """Choose the path for one projection.

    has_scale: whether any head has a scale. dtype: of z and W. device_type: "cpu", "cuda", ...
    many_heads: whether more than the share MANY of the heads has one. has_offset: whether any head has an offset,
    folded or not. crowded: whether it is not folded and stands beside a bias.
    form, backend, gemm: "auto", or one of FORMS / BACKENDS / GEMMS to insist on it. Without a scale every form is the
    fold, but for the dither of an offset that is not folded, and every gemm the vendor's.
    answer: what was measured to be fastest; ignored where it contradicts what is insisted on, does not run here, or
    would bring in a dead zone that the default does not have.
    refusal: why no Triton kernel serves this very device (`devices.unserved`); the default is then ATen.
    Raises ValueError for an unknown form, backend or gemm, a fold of a scale, a fused gemm on another backend than
    Triton, a dtype the backend does not compute in, or a device that it does not serve.
    """
    known = default_backends(device_type, dtype, refusal)
    # torch.compile would trace past the cache, with a warning
    choose = _choose if torch.compiler.is_compiling() else _choose_once
    sweeps = (known[0] if backend == "auto" else backend) == "triton" and gemm in ("auto", "vendor", "fused_backward")
    case = _Case(has_scale, dtype in LOW_PRECISION, many_heads, sweeps, has_offset, crowded)
    return choose(case, dtype, Path(form, backend, gemm), answer, known, refusal)


def default_backends(device_type: str, dtype: torch.dtype, refusal: str | None = None) -> tuple[str, ...]:
    """The backends that may be chosen where none was asked for, the default one first. Arguments as of `plan`."""
    on_triton = device_type == "cuda" and dtype in TRITON_DTYPES and HAS_TRITON and refusal is None
    return ("triton", "aten") if on_triton else ("aten",)


def plan_on(device: torch.device, dtype: torch.dtype, backend: str) -> Plan:
    """`plan` for what has no scale, on the device that it is about to run on."""
    plans = _plan_on if torch.compiler.is_compiling() else _plan_on_once
    return plans(device, dtype, backend)


def _plan_on(device: torch.device, dtype: torch.dtype, backend: str) -> Plan:
    refusal = unserved(device)
    return plan(has_scale=False, dtype=dtype, device_type=device.type, backend=backend, refusal=refusal)


_plan_on_once = lru_cache(maxsize=1024)(_plan_on)


def _choose(
    case: "_Case",
    dtype: torch.dtype,
    asked: Path,
    answer: Path | None,
    known: tuple[str, ...],
    unable: str | None = None,
) -> Plan:
    """`plan`, on a device whose backends are `known`, the default one first; unable: why it runs no Triton kernel."""
    has_scale = case.has_scale
    default_form, default_gemm, reason = _default(case)
    default = Path(default_form, known[0], default_gemm)
    if has_scale and answer is not None and _applies(answer, asked, default, known, dtype):
        return Plan(*answer, "measured fastest here of what keeps the default's precision")
    chosen = Path(*(part if wish == "auto" else wish for wish, part in zip(asked, default, strict=True)))
    refusal = _unknown(chosen)
    if not has_scale:
        chosen = Path("dither" if chosen.form == "dither" and case.has_offset else "fold", chosen.backend, "vendor")
    elif asked.form != "auto" or asked.gemm != "auto":
        reason = "asked for"
    refusal = refusal or _refusal(chosen, has_scale, dtype) or (unable if chosen.backend == "triton" else None)
    if refusal is not None:
        raise ValueError(refusal)
    return Plan(*chosen, reason)


_choose_once = lru_cache(maxsize=1024)(_choose)


def plan_for(
    T: int,
    weight: Tensor,
    scale: Tensor | None,
    form: str,
    backend: str,
    gemm: str,
    has_offset: bool = False,
    crowded: bool = False,
) -> Plan:
    """`plan` for a projection of T rows as it is about to run, with the answers measured for its device and shape.

    weight: (N, K); scale: (h, D) or None; has_offset, crowded: as for `plan`. Remembered by everything but the exact T,
    of which only the power of four below it counts.
    """
    return _remembered(*_sizes(T, weight, scale), weight.dtype, weight.device, form, backend, gemm, has_offset, crowded)


def path_for(
    T: int,
    weight: Tensor,
    scale: Tensor | None,
    form: str,
    backend: str,
    gemm: str,
    has_offset: bool = False,
    crowded: bool = False,
) -> Path:
    """The path of `plan_for`, remembered by itself: Dynamo traces no `cached_property`, and a property is made anew."""
    sizes = _sizes(T, weight, scale)
    return _remembered_path(*sizes, weight.dtype, weight.device, form, backend, gemm, has_offset, crowded)


def _sizes(T: int, weight: Tensor, scale: Tensor | None) -> tuple[int, int, int, torch.Size | None]:
    """(tokens, N, K, shape of the scale) as far as a choice depends on them; nothing is measured for a fold."""
    return (0, 0, 0, None) if scale is None else (answers.tokens_bucket(T), *weight.shape, scale.shape)


def added(bias: Tensor | None, offset: Tensor | None, folded: Tensor | None) -> Constants:
    """What `plan` is to know of a projection's constants, each of which may be absent."""
    unfolded = offset is not None and folded is None
    return Constants(unfolded or folded is not None, unfolded and bias is not None)


def folds_beforehand(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the default path of a projection with an offset takes it folded: what `fold_offsets` can do early."""
    # the most frequent case first: no rule has another form for it
    if scale is None and bias is None:
        return True
    many = scale is not None and is_many(scale.numel(), weight.shape[1])
    case = {"has_scale": scale is not None, "many_heads": many, "has_offset": True, "crowded": bias is not None}
    kind = {"dtype": weight.dtype, "device_type": weight.device.type, "refusal": unserved(weight.device)}
    return plan(**case, **kind).form != "dither"


def is_many(scaled: int, of: int) -> bool:
    """Whether `scaled` of so many heads (or columns of z) are many."""
    # symbolic sizes compare to a symbol, which no rule matches: `not` asks for its value
    return not scaled <= MANY * of


def use_answers(device_name: str, answers: Mapping[Key, Path]) -> None:
    """Let this process use these answers for a device (see `answers.device_name`) instead of those in its file."""
    _ANSWERS[device_name] = answers
    forget_plans()


def forget_plans() -> None:
    """Choose anew for every shape: what the choice rests on has changed."""
    for remembered in (_remembered, _remembered_path, _plan_on_once):
        remembered.cache_clear()


def answers_for(device_name: str) -> Mapping[Key, Path]:
    """The answers measured on a device: those given to `use_answers`, or its file's, read once on first use."""
    if device_name not in _ANSWERS:
        _ANSWERS[device_name] = answers.read_answers(device_name)
    return _ANSWERS[device_name]


def has_answers(device: torch.device) -> bool:
    """Whether anything was measured on a device; in a compiled graph, when it was traced."""
    return bool(answers_for(answers.device_name(device)))


# torch.compiler.assume_constant_result, which would import the compiler together with this package
has_answers._dynamo_marked_constant = True


def valid_paths(
    *,
    has_scale: bool,
    dtype: torch.dtype,
    many_heads: bool = False,
    backends: tuple[str, ...] = BACKENDS,
    safe_only: bool = False,
) -> list[Path]:
    """Every (form, backend, gemm) that `head_affine_linear` computes such a case by, the default's form first.

    backends: those to consider. safe_only: leave out forms with a dead zone where the default has none.
    """
    default, _, _ = _default(_Case(has_scale, dtype in LOW_PRECISION, many_heads, False, False, False))
    forms = ("fold",) if not has_scale else sorted(FORMS[1:], key=lambda form: form != default)
    allowed = [form for form in forms if not safe_only or _as_safe(form, default)]
    paths = (Path(form, backend, gemm) for form in allowed for backend in backends for gemm in GEMMS)
    return [path for path in paths if _refusal(path, has_scale, dtype) is None and (has_scale or path.gemm == "vendor")]


# device name -> what was measured on it
_ANSWERS: dict[str, Mapping[Key, Path]] = {}


@lru_cache(maxsize=4096)
def _remembered(
    tokens: int,
    N: int,
    K: int,
    vectors: torch.Size | None,
    dtype: torch.dtype,
    device: torch.device,
    form: str,
    backend: str,
    gemm: str,
    has_offset: bool,
    crowded: bool,
) -> Plan:
    answer = None
    if vectors is not None and "auto" in (form, backend, gemm):
        key = answers.key(dtype, N, K, vectors[1], vectors[0], tokens)
        answer = answers_for(answers.device_name(device)).get(key)
    many = vectors is not None and is_many(vectors[0] * vectors[1], K)
    wishes = {"many_heads": many, "has_offset": has_offset, "crowded": crowded, "refusal": unserved(device)}
    wishes |= {"form": form, "backend": backend, "gemm": gemm}
    return plan(has_scale=vectors is not None, dtype=dtype, device_type=device.type, answer=answer, **wishes)


@lru_cache(maxsize=4096)
def _remembered_path(*of: Any) -> Path:
    return _remembered(*of).path


def _default(case: _Case) -> tuple[str, str, str]:
    matches = (rule for rule in _RULES if all(want in (None, is_) for want, is_ in zip(rule, case, strict=False)))
    return next(matches)[len(case) :]


def _as_safe(form: str, default: str) -> bool:
    """Whether a form loses no small scale that the default form keeps."""
    return form in (default, *KEEP_SMALL)


def _applies(answer: Path, asked: Path, default: Path, backends: tuple[str, ...], dtype: torch.dtype) -> bool:
    agrees = all(wish in ("auto", part) for wish, part in zip(asked, answer, strict=True))
    runs = _unknown(answer) is None and _refusal(answer, True, dtype) is None
    return agrees and runs and _as_safe(answer.form, default.form) and answer.backend in backends


def _unknown(path: Path) -> str | None:
    """Which part of a path has a name nobody knows, or None."""
    for name, got, known in zip(Path._fields, path, (FORMS, BACKENDS, tuple(GEMMS)), strict=True):
        if got not in known:
            return f"unknown {name} {got!r}: expected 'auto' or one of {known}"
    return None


def _refusal(path: Path, has_scale: bool, dtype: torch.dtype) -> str | None:
    """Why nothing computes this path, or None."""
    reasons = (
        (has_scale and path.form == "fold", "form 'fold' cannot express a scale: expected 'pass' or 'delta'"),
        (
            path.gemm != "vendor" and path.backend != "triton",
            f"gemm {path.gemm!r} is a Triton kernel: expected backend 'triton', got {path.backend!r}",
        ),
        (
            path.form == "dither" and dtype not in LOW_PRECISION,
            f"form 'dither' rounds to 16 bits: expected {LOW_PRECISION}, got {dtype}",
        ),
        (
            path.form == "dither" and GEMMS[path.gemm][0],
            f"no product rounds with form 'dither': expected gemm 'vendor' or 'fused_backward', got {path.gemm!r}",
        ),
        (
            path.backend == "triton" and dtype not in TRITON_DTYPES,
            f"backend 'triton' computes in {TRITON_DTYPES}, got {dtype}",
        ),
    )
    return next((reason for impossible, reason in reasons if impossible), None)
