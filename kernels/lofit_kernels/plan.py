"""The choice of path, as data.

A path is a form (the algebra) on a backend (who computes the elementwise and reduction parts; GEMMs are the
vendor's). Forms:

    fold    y = z W^T + (b + W v)                       offset only: nothing of z is touched or saved
    pass    y = ((1 + a) z) W^T + (b + W v)             one elementwise pass before the GEMM
    delta   y = z W^T + (a z_S) W_S^T + (b + W v)       the middle term is the addend of the GEMM's fp32 accumulator

In 16-bit dtypes, (1 + a) z rounds back to z for |a| < 2^-9 (bf16) or 2^-12 (fp16), so `pass` ignores small scales.
`delta` does not: only y itself is rounded. It costs h/H of a second forward GEMM.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

BACKENDS = ("aten", "triton")
# looked up, not imported
HAS_TRITON = find_spec("triton") is not None
FORMS = ("fold", "pass", "delta")
LOW_PRECISION = (torch.bfloat16, torch.float16)
# float64 exists for gradcheck and oracles; the kernels accumulate in float32
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """How one projection is computed: `form` in FORMS, `backend` in BACKENDS, and why."""

    form: str
    backend: str
    reason: str


# (has a scale, 16-bit dtype) -> form, reason; first match wins, None matches both
_FORM_RULES: tuple[tuple[bool, bool | None, str, str], ...] = (
    (False, None, "fold", "offset only: folded into the bias, no activation saved"),
    (True, True, "delta", "16-bit scale: the delta form keeps small scales alive"),
    (True, False, "pass", "scale in full precision: one elementwise pass, then the vendor GEMM"),
)


def plan(*, has_scale: bool, dtype: torch.dtype, device_type: str, form: str = "auto", backend: str = "auto") -> Plan:
    """Choose the path for one projection.

    has_scale: whether any head has a scale. dtype: of z and W. device_type: "cpu", "cuda", ...
    form, backend: "auto", or one of FORMS / BACKENDS to insist on it. Without a scale every form is the fold.
    Raises ValueError for an unknown form or backend, a fold of a scale, or a dtype the backend does not compute in.
    """
    chosen, reason = _choose_form(has_scale, dtype) if form == "auto" else (form, "asked for")
    if chosen not in FORMS:
        raise ValueError(f"unknown form {form!r}: expected 'auto' or one of {FORMS}")
    if has_scale and chosen == "fold":
        raise ValueError("form 'fold' cannot express a scale: expected 'pass' or 'delta'")
    if backend == "auto":
        backend = "triton" if device_type == "cuda" and dtype in TRITON_DTYPES and HAS_TRITON else "aten"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected 'auto' or one of {BACKENDS}")
    if backend == "triton" and dtype not in TRITON_DTYPES:
        raise ValueError(f"backend 'triton' computes in {TRITON_DTYPES}, got {dtype}")
    return Plan(chosen if has_scale else "fold", backend, reason)


def _choose_form(has_scale: bool, dtype: torch.dtype) -> tuple[str, str]:
    low = dtype in LOW_PRECISION
    return next((form, why) for scale, is_low, form, why in _FORM_RULES if scale == has_scale and is_low in (None, low))
