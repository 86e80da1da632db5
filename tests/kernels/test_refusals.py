"""What the public functions refuse, each with an error that names what was got and what was expected."""

import pytest
import torch
from torch.autograd import forward_ad

from lofit_kernels import fold_offset, head_affine, head_affine_linear, usual_projections
from lofit_kernels.usual_projections import FoldedLinear

Z, W = torch.zeros(3, 8), torch.zeros(5, 8)
ROWS = torch.zeros(4, 2)

REFUSALS = {
    "narrow_z": ((torch.zeros(3, 6), W), {}, ValueError, r"got z \(3, 6\) and weight \(5, 8\)"),
    "scalar_z": ((torch.tensor(1.0), W), {}, ValueError, r"expected z \(\.\.\., K\) and weight \(N, K\)"),
    "flat_weight": ((Z, torch.zeros(8)), {}, ValueError, r"weight \(8,\)"),
    "mixed_dtypes": ((Z, W.bfloat16()), {}, TypeError, "one floating dtype, got torch.float32 and torch.bfloat16"),
    "integers": ((Z.long(), W.long()), {}, TypeError, "one floating dtype, got torch.int64"),
    "short_bias": ((Z, W, torch.zeros(4)), {}, ValueError, r"bias of shape \(5,\), got \(4,\)"),
    "wide_bias": ((Z, W, torch.zeros(5).double()), {}, TypeError, "bias in torch.float32.*got torch.float64"),
    "narrow_bias": (
        (Z, W, torch.zeros(5).half()),
        {"offset": ROWS},
        TypeError,
        "bias in torch.float32.*got torch.float16",
    ),
    "bias_elsewhere": (
        (Z, W, torch.zeros(5, device="meta")),
        {"offset": ROWS},
        ValueError,
        "weight and bias on one device, got cpu and meta",
    ),
    "heads_alone": ((Z, W), {"scale_heads": [0]}, ValueError, "scale_heads were given without scale"),
    "offset_heads_alone": ((Z, W), {"offset_heads": [0]}, ValueError, "offset_heads were given without offset"),
    "narrow_vectors": ((Z, W), {"offset": ROWS.bfloat16()}, TypeError, "offset in torch.float32 .* got torch.bfloat16"),
    "wide_vectors": ((Z, W), {"scale": ROWS.double()}, TypeError, "scale in torch.float32 .* got torch.float64"),
    "single_in_double": (
        (Z.double(), W.double()),
        {"scale": ROWS},
        TypeError,
        "scale in torch.float64 .* got torch.float32",
    ),
    "flat_vectors": ((Z, W), {"scale": torch.zeros(8)}, ValueError, r"scale of shape \(h, D\).* got \(8,\)"),
    "odd_head_dim": ((Z, W), {"offset": torch.zeros(2, 3)}, ValueError, r"D dividing K = 8, got \(2, 3\)"),
    "no_head_dim": ((Z, W), {"offset": torch.zeros(2, 0)}, ValueError, r"D dividing K = 8, got \(2, 0\)"),
    "descending": ((Z, W), {"scale": ROWS[:2], "scale_heads": [2, 0]}, ValueError, r"ascending.*got \[2, 0\]"),
    "twice": ((Z, W), {"scale": ROWS[:2], "scale_heads": [1, 1]}, ValueError, r"strictly ascending.*got \[1, 1\]"),
    "beyond": ((Z, W), {"scale": ROWS[:1], "scale_heads": [4]}, ValueError, r"\[0, 4\), got \[4\]"),
    "negative": ((Z, W), {"scale": ROWS[:1], "scale_heads": [-1]}, ValueError, r"\[0, 4\), got \[-1\]"),
    "fractional": ((Z, W), {"scale": ROWS[:1], "scale_heads": [1.5]}, ValueError, r"integers.*got \[1\.5\]"),
    "too_few_heads": ((Z, W), {"scale": ROWS[:2], "scale_heads": [1]}, ValueError, r"one per row of scale \(2\)"),
    "too_few_rows": ((Z, W), {"offset": ROWS[:2]}, ValueError, r"one per row of offset \(2\)"),
    "narrow_index": (
        (Z, W),
        {"scale": ROWS[:1], "scale_heads": torch.tensor([1], dtype=torch.int32)},
        ValueError,
        "scale_heads to be int64.*got torch.int32",
    ),
    "square_index": (
        (Z, W),
        {"scale": ROWS[:1], "scale_heads": torch.tensor([[1]])},
        ValueError,
        r"got torch.int64 of shape \(1, 1\)",
    ),
    "too_many": (
        (Z, W),
        {"scale": torch.zeros(5, 2), "scale_heads": torch.arange(5)},
        ValueError,
        "at most 4",
    ),
    "unknown_form": ((Z, W), {"scale": ROWS, "form": "prologue"}, ValueError, "unknown form 'prologue'"),
    "fold_of_a_scale": ((Z, W), {"scale": ROWS, "form": "fold"}, ValueError, "'fold' cannot express a scale"),
    "unknown_backend": ((Z, W), {"scale": ROWS, "backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    "triton_in_double": (
        (Z.double(), W.double()),
        {"scale": ROWS.double(), "backend": "triton"},
        ValueError,
        "'triton' computes in .*got torch.float64",
    ),
    "short_folded": (
        (Z, W),
        {"offset": ROWS, "folded": torch.zeros(1)},
        ValueError,
        r"folded of shape \(5,\), got \(1,\)",
    ),
}
SHARED = [k for k, (args, kwargs, *_) in REFUSALS.items() if len(args) == 2 and args[1] is W and "form" not in kwargs]
SHARED = [k for k in SHARED if k not in ("narrow_z", "scalar_z", "short_folded")]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_affine_linear_refuses(refusal):
    args, kwargs, error, message = REFUSALS[refusal]
    with pytest.raises(error, match=message):
        head_affine_linear(*args, **kwargs)


@pytest.mark.parametrize("refusal", SHARED)
def test_affine_refuses(refusal):
    (z, _), kwargs, error, message = REFUSALS[refusal]
    with pytest.raises(error, match=message):
        head_affine(z, **kwargs)


@pytest.mark.parametrize("given", [{"scale": ROWS}, {"offset": ROWS}, {}])
def test_affine_refuses_what_is_no_row_of_floats(given):
    with pytest.raises(TypeError, match="z of a floating dtype, got torch.int64"):
        head_affine(Z.long(), **given)
    with pytest.raises(ValueError, match=r"expected z \(\.\.\., K\), got z \(\)"):
        head_affine(torch.tensor(1.0), **given)


@pytest.mark.parametrize("function", [head_affine, head_affine_linear])
def test_affine_refuses_two_head_dims(function):
    args = (Z,) if function is head_affine else (Z, W)
    with pytest.raises(ValueError, match="D"):
        function(*args, scale=torch.zeros(4, 2), offset=torch.zeros(2, 4))


@pytest.mark.parametrize(
    "offset, heads, error, message",
    [
        (ROWS.bfloat16(), None, TypeError, "offset in torch.float32"),
        (torch.zeros(2, 3), None, ValueError, r"D dividing K = 8"),
        (ROWS[:2], None, ValueError, r"one per row of offset \(2\)"),
        (ROWS[:2], [3, 1], ValueError, "strictly ascending"),
    ],
)
def test_fold_offset_refuses(offset, heads, error, message):
    with pytest.raises(error, match=message):
        fold_offset(W, offset, heads)


@pytest.mark.parametrize(
    "weight, bias, error, message",
    [
        (W, torch.zeros(1), ValueError, r"bias of shape \(5,\), got \(1,\)"),
        (W, torch.tensor(0.0), ValueError, r"bias of shape \(5,\), got \(\)"),
        (W, torch.zeros(5, 1), ValueError, r"bias of shape \(5,\), got \(5, 1\)"),
        (W, torch.zeros(5, dtype=torch.int64), TypeError, "floating bias .* torch.float32, got torch.int64"),
        (W, torch.zeros(5).double(), TypeError, "no wider than the offset's torch.float32, got torch.float64"),
        (W, torch.zeros(5, device="meta"), ValueError, "one device, got cpu and meta"),
        (W.to(torch.uint8), None, ValueError, r"floating weights \(N, K\), got torch.uint8 of shape \(5, 8\)"),
        (W.flatten(), None, ValueError, r"got torch.float32 of shape \(40,\)"),
        (W[None], None, ValueError, r"got torch.float32 of shape \(1, 5, 8\)"),
    ],
)
def test_fold_offset_refuses_weights_and_biases(weight, bias, error, message):
    with pytest.raises(error, match=message):
        fold_offset(weight, ROWS, None, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_offset_takes_a_bias_as_narrow_as_the_weight_or_as_wide_as_the_offset(dtype):
    got = fold_offset(torch.ones(5, 8).bfloat16(), ROWS + 1, None, torch.ones(5, dtype=dtype))
    assert got.dtype == torch.float32 and torch.equal(got, torch.full((5,), 9.0))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("given", ["folded", "scale"])
def test_a_weights_tangent_is_refused(given, grad):
    vectors = {"folded": torch.zeros(5), "scale": ROWS}
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        weight = forward_ad.make_dual(W, torch.ones_like(W))
        with pytest.raises(NotImplementedError, match="jvp"):
            head_affine_linear(Z, weight, **{given: vectors[given]})


def test_a_torch_with_other_names_applies_a_function_as_usual(monkeypatch):
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert usual_projections._applied(FoldedLinear) == FoldedLinear.apply
