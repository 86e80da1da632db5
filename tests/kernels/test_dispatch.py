"""Dispatch is a table: every row of it, and every refusal."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from lofit_kernels import answers, dispatch, head_affine_linear, ops, usual_projections
from lofit_kernels.answers import Path
from lofit_kernels.dispatch import (
    BACKENDS,
    FORMS,
    GEMMS,
    NUMBERED_PATHS,
    SMALL_SCALES,
    added,
    folds_beforehand,
    plan,
    plan_for,
    use_answers,
    valid_paths,
)
from lofit_kernels.projection import affine_linear_bwd

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# (has a scale, dtype, many heads) -> form
FORM_TABLE = [
    (False, F64, False, "fold"),
    (False, F32, False, "fold"),
    (False, F16, False, "fold"),
    (False, BF16, False, "fold"),
    (True, F64, False, "pass"),
    (True, F32, False, "pass"),
    (True, F16, False, "delta"),
    (True, BF16, False, "delta"),
    (True, F32, True, "pass"),
    (True, F16, True, "pass"),
    (True, BF16, True, "pass"),
]

# with Triton: (has a scale, on many heads, has an offset, crowded), dtype, gemm -> form
SWEEP_TABLE = [
    ((True, False, False, False), BF16, "auto", "dither"),
    ((True, False, True, False), F16, "auto", "dither"),
    ((True, True, True, False), BF16, "auto", "dither"),
    ((True, True, True, True), F16, "fused_backward", "dither"),
    ((True, True, False, False), BF16, "auto", "pass"),
    ((True, False, True, False), BF16, "fused", "delta"),
    ((True, True, True, False), BF16, "fused_forward", "pass"),
    ((True, False, True, True), F32, "auto", "pass"),
    ((False, False, True, False), BF16, "auto", "fold"),
    ((False, False, True, True), BF16, "auto", "dither"),
    ((False, False, True, True), F32, "auto", "fold"),
]

# (device, dtype, Triton installed) -> backend
BACKEND_TABLE = [
    ("cpu", F32, True, "aten"),
    ("cpu", BF16, True, "aten"),
    ("cuda", F32, True, "triton"),
    ("cuda", F16, True, "triton"),
    ("cuda", BF16, True, "triton"),
    ("cuda", F64, True, "aten"),
    ("cuda", BF16, False, "aten"),
    ("mps", F16, True, "aten"),
]

REFUSALS = [
    ({"form": "prologue"}, "unknown form 'prologue'.*'fold', 'pass', 'delta'"),
    ({"form": "fold", "has_scale": True}, "'fold' cannot express a scale"),
    ({"backend": "cutlass"}, "unknown backend 'cutlass'.*'aten', 'triton'"),
    ({"backend": "triton", "dtype": F64}, "'triton' computes in .*float64"),
    ({"form": "dither", "has_scale": True}, "'dither' rounds to 16 bits: expected .*float32"),
    (
        {"form": "dither", "has_scale": True, "dtype": F16, "backend": "triton", "gemm": "fused"},
        "'vendor' or 'fused_backward', got 'fused'",
    ),
    ({"gemm": "cublas"}, "unknown gemm 'cublas'.*'vendor', 'fused_forward', 'fused_backward', 'fused'"),
    ({"gemm": "cublas", "has_scale": True}, "unknown gemm 'cublas'"),
    ({"gemm": "fused", "has_scale": True}, "'fused' is a Triton kernel: expected backend 'triton', got 'aten'"),
    ({"gemm": "fused_backward", "has_scale": True, "backend": "aten"}, "'fused_backward' is a Triton kernel"),
    ({"gemm": "fused", "has_scale": True, "backend": "triton", "dtype": F64}, "'triton' computes in .*float64"),
    ({"gemm": "fused", "has_scale": True, "device_type": "cuda", "dtype": F64}, "expected backend 'triton'"),
]

# (form, gemm) asked for -> names of forward and backward
NAMES = [
    ("pass", "vendor", "pass", "pass"),
    ("delta", "vendor", "delta", "pass"),
    ("pass", "fused", "prologue", "epilogue"),
    ("delta", "fused", "fused delta", "epilogue"),
    ("pass", "fused_forward", "prologue", "pass"),
    ("delta", "fused_backward", "delta", "epilogue"),
    ("dither", "vendor", "dither", "dither"),
    ("dither", "fused_backward", "dither", "dither epilogue"),
]

# dtype, measured answer, what is taken: an answer may add precision, never a dead zone
ANSWERS = [
    (F32, Path("delta", "triton", "fused"), True),
    (F32, Path("pass", "triton", "fused"), True),
    (F32, Path("pass", "aten", "vendor"), True),
    (BF16, Path("delta", "triton", "fused_backward"), True),
    (F16, Path("delta", "aten", "vendor"), True),
    (BF16, Path("pass", "triton", "fused"), False),
    (F16, Path("pass", "triton", "vendor"), False),
]


def choose(**changes):
    return plan(**{"has_scale": False, "dtype": F32, "device_type": "cpu", **changes})


@pytest.fixture
def triton_installed(monkeypatch):
    return lambda present: monkeypatch.setattr(dispatch, "HAS_TRITON", present)


@pytest.mark.parametrize("has_scale, dtype, many_heads, form", FORM_TABLE)
def test_plan_form(has_scale, dtype, many_heads, form):
    chosen = choose(has_scale=has_scale, dtype=dtype, many_heads=many_heads)
    assert chosen.form == form
    assert chosen.reason


@pytest.mark.parametrize("case, dtype, gemm, form", SWEEP_TABLE)
def test_plan_form_where_a_sweep_is_one_kernel(case, dtype, gemm, form, triton_installed):
    triton_installed(True)
    names = ("has_scale", "many_heads", "has_offset", "crowded")
    given = {**dict(zip(names, case, strict=True)), "dtype": dtype, "gemm": gemm}
    chosen = choose(**given, device_type="cuda")
    assert (chosen.form, chosen.backend) == (form, "triton")
    # insisting on the backend is enough, and ATen keeps the forms of the table above
    assert choose(**given, backend="triton").form == form
    if gemm == "auto":
        aten = choose(**given, device_type="cuda", backend="aten")
        assert aten.form == choose(**given).form != "dither"


@pytest.mark.parametrize(
    "given, expected",
    [
        ((None, None, None), (False, False)),
        (("b", None, None), (False, False)),
        (("b", "v", None), (True, True)),
        ((None, "v", None), (True, False)),
        (("b", "v", "W v"), (True, False)),
        (("b", None, "W v"), (True, False)),
    ],
)
def test_added_says_what_the_constants_are(given, expected):
    tensors = [None if name is None else torch.empty(0) for name in given]
    assert added(*tensors) == expected


def test_folds_beforehand_but_for_the_dither(triton_installed):
    triton_installed(True)
    few, many, bias = torch.empty(1, 8, device="meta"), torch.empty(4, 8, device="meta"), torch.empty(24, device="meta")
    assert folds_beforehand(torch.empty(24, 32, dtype=BF16), few, bias)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    weight = torch.empty(24, 32, dtype=BF16, device="meta").as_subclass(OnGpu)
    assert folds_beforehand(weight, None, None)
    assert not any(folds_beforehand(weight, scale, None) for scale in (few, many))
    assert not folds_beforehand(weight, None, bias)
    assert folds_beforehand(weight.float(), few, bias)


@pytest.mark.parametrize("device_type, dtype, installed, backend", BACKEND_TABLE)
def test_plan_backend(device_type, dtype, installed, backend, triton_installed):
    triton_installed(installed)
    assert choose(device_type=device_type, dtype=dtype).backend == backend


@pytest.mark.parametrize("form", ["pass", "delta"])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_plan_takes_the_form_asked_for(form, dtype):
    chosen = choose(has_scale=True, dtype=dtype, form=form)
    assert (chosen.form, chosen.reason) == (form, "asked for")


@pytest.mark.parametrize("form", FORMS)
def test_plan_offset_alone_is_always_a_fold(form):
    assert choose(has_scale=False, form=form).form == "fold"


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_takes_the_backend_asked_for(backend):
    assert choose(backend=backend).backend == backend


@pytest.mark.parametrize("changes, message", REFUSALS)
def test_plan_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        choose(**changes)


def test_plan_is_frozen():
    with pytest.raises(FrozenInstanceError):
        choose().form = "pass"


@pytest.mark.parametrize("form, gemm, forward, backward", NAMES)
def test_plan_takes_the_gemm_asked_for(form, gemm, forward, backward):
    chosen = choose(has_scale=True, dtype=F16, form=form, gemm=gemm, backend="triton")
    assert (chosen.path, chosen.reason) == ((form, "triton", gemm), "asked for")
    assert (chosen.forward, chosen.backward) == (forward, backward)


@pytest.mark.parametrize("gemm", GEMMS)
def test_plan_offset_alone_always_takes_the_vendors_gemm(gemm):
    chosen = choose(has_scale=False, gemm=gemm)
    assert (chosen.gemm, chosen.forward, chosen.backward) == ("vendor", "fold", "fold")


@pytest.mark.parametrize("dtype, answer, taken", ANSWERS)
def test_plan_takes_an_answer_that_keeps_small_scales(dtype, answer, taken, triton_installed):
    triton_installed(True)
    default = choose(has_scale=True, dtype=dtype, device_type="cuda")
    chosen = choose(has_scale=True, dtype=dtype, device_type="cuda", answer=answer)
    assert chosen.path == (answer if taken else default.path)
    assert ("measured" in chosen.reason) == taken


@pytest.mark.parametrize(
    "asked", [{"form": "pass"}, {"backend": "triton"}, {"gemm": "vendor"}], ids=lambda asked: next(iter(asked))
)
def test_plan_insisting_beats_an_answer(asked, triton_installed):
    triton_installed(True)
    answer = Path("delta", "aten", "fused")
    chosen = choose(has_scale=True, device_type="cuda", answer=answer, **asked)
    assert chosen.path == choose(has_scale=True, device_type="cuda", **asked).path


def test_plan_ignores_an_answer_that_does_not_run_here():
    assert choose(has_scale=True, answer=Path("delta", "triton", "fused")).path == ("pass", "aten", "vendor")


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_valid_paths_are_just_those_that_are_not_refused(dtype):
    found = valid_paths(has_scale=True, dtype=dtype)
    accepted = set()
    for form in ("pass", "delta", "dither"):
        for backend in BACKENDS:
            for gemm in GEMMS:
                try:
                    accepted.add(choose(has_scale=True, dtype=dtype, form=form, backend=backend, gemm=gemm).path)
                except ValueError:
                    continue
    assert set(found) == accepted
    assert len(found) == len(accepted) == {F64: 2, F32: 10}.get(dtype, 13)
    assert found[0].form == choose(has_scale=True, dtype=dtype).form
    assert valid_paths(has_scale=False, dtype=dtype, backends=("aten",)) == [("fold", "aten", "vendor")]


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_valid_paths_that_are_safe_bring_no_dead_zone(dtype):
    safe = {path.form for path in valid_paths(has_scale=True, dtype=dtype, safe_only=True)}
    assert safe == ({"delta", "dither"} if dtype in (F16, BF16) else {"pass", "delta"})


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_every_form_says_what_it_does_to_small_scales(dtype):
    assert all(SMALL_SCALES[form, dtype] for form in FORMS)


@pytest.fixture
def answered():
    """answered(answers): what was measured on the CPU, until the test ends."""
    yield lambda answers: use_answers("cpu", answers)
    use_answers("cpu", {})


def test_plan_for_counts_the_scaled_heads():
    weight = torch.empty(24, 64, dtype=BF16)
    forms = {heads: plan_for(16, weight, torch.empty(heads, 8), "auto", "auto", "auto").form for heads in (1, 2, 3, 8)}
    assert forms == {1: "delta", 2: "delta", 3: "pass", 8: "pass"}


def test_plan_for_looks_up_device_shape_and_tokens(answered):
    weight, scale = torch.empty(24, 32), torch.empty(2, 8)
    delta = Path("delta", "aten", "vendor")
    answered({answers.key(F32, 24, 32, 8, 2, 64): delta})
    assert plan_for(64, weight, scale, "auto", "auto", "auto").path == delta
    # the same power of four, another, another share of heads, another dtype, another width
    assert plan_for(255, weight, scale, "auto", "auto", "auto").path == delta
    default = ("pass", "aten", "vendor")
    assert plan_for(256, weight, scale, "auto", "auto", "auto").path == default
    assert plan_for(64, weight, torch.empty(4, 8), "auto", "auto", "auto").path == default
    assert plan_for(64, weight.double(), scale.double(), "auto", "auto", "auto").path == default
    assert plan_for(64, weight[:16], scale, "auto", "auto", "auto").path == default
    assert plan_for(64, weight, None, "auto", "auto", "auto").path == ("fold", "aten", "vendor")
    answered({})
    assert plan_for(64, weight, scale, "auto", "auto", "auto").path == default


def test_head_affine_linear_follows_an_answer(answered):
    z, weight, scale = torch.randn(16, 32), torch.randn(24, 32), torch.randn(2, 8)
    run = {"scale": scale, "scale_heads": [1, 3]}
    by_form = {form: head_affine_linear(z, weight, **run, form=form) for form in ("pass", "delta")}
    assert not torch.equal(*by_form.values())
    assert torch.equal(head_affine_linear(z, weight, **run), by_form["pass"])
    answered({answers.key(F32, 24, 32, 8, 2, 16): Path("delta", "aten", "vendor")})
    assert torch.equal(head_affine_linear(z, weight, **run), by_form["delta"])
    assert torch.equal(head_affine_linear(z, weight, **run, form="pass"), by_form["pass"])


@pytest.fixture
def taken(monkeypatch):
    """The paths that backward passes take, in order."""
    paths = []

    def spied(grad, arguments, needs):
        paths.append(arguments.path)
        return affine_linear_bwd(grad, arguments, needs)

    # the usual eager case has a node, and so a backward, of its own
    def spied_pass(grad, z, scale, weight, heads, backend, needs):
        paths.append(Path("pass", backend, "vendor"))
        return pass_gradients(grad, z, scale, weight, heads, backend, needs)

    pass_gradients = usual_projections._pass_gradients
    monkeypatch.setattr(ops, "affine_linear_bwd", spied)
    monkeypatch.setattr(usual_projections, "_pass_gradients", spied_pass)
    return paths


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("before, after", [("delta", "pass"), ("pass", "delta")])
def test_backward_takes_the_path_of_its_forward(answered, taken, dynamo, backend, before, after):
    weight, scale = torch.randn(24, 32), torch.randn(2, 8, requires_grad=True)
    # another shape has an answer, too, so that a graph compiled now leaves the choice to its run
    elsewhere = {answers.key(F32, 24, 32, 8, 2, 4): Path("delta", "aten", "vendor")}
    case = answers.key(F32, 24, 32, 8, 2, 16)

    def run(z):
        return head_affine_linear(z, weight, scale=scale, scale_heads=[1, 3])

    answered({**elsewhere, case: Path(before, "aten", "vendor")})
    if backend is not None:
        run = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for T in (16, 20):
        answered({**elsewhere, case: Path(before, "aten", "vendor")})
        z = torch.randn(T, 32, requires_grad=True)
        y = run(z)
        answered({**elsewhere, case: Path(after, "aten", "vendor")})
        assert torch.equal(y, head_affine_linear(z, weight, scale=scale, scale_heads=[1, 3], form=before))
        torch.autograd.grad(y.sum(), (z, scale))
    assert taken == [(before, "aten", "vendor")] * 2


@pytest.mark.parametrize("measured", [False, True])
def test_compiled_graph_leaves_the_choice_to_its_run_only_where_something_was_measured(answered, dynamo, measured):
    weight, scale = torch.randn(24, 64).bfloat16(), torch.randn(1, 8)
    answered({answers.key(F32, 24, 32, 8, 2, 4): Path("delta", "aten", "vendor")} if measured else {})
    graphs = []

    def keep(graph, inputs):
        graphs.extend(node for node in graph.graph.nodes if "lofit.affine_linear" in str(node.target))
        return graph

    def run(z):
        return head_affine_linear(z, weight, scale=scale, scale_heads=[1])

    torch.compile(run, fullgraph=True, backend=keep)(torch.randn(5, 64).bfloat16())
    (node,) = graphs
    # an unknown number in a graph keeps it from becoming a CUDA graph
    assert node.args[-3:] == (("auto", "auto", "auto") if measured else ("delta", "aten", "vendor"))


@pytest.mark.parametrize("path", NUMBERED_PATHS)
def test_numbers_of_paths_stand_for_one_path_each(path):
    assert NUMBERED_PATHS.count(path) == 1
    assert path.form in FORMS and path.backend in BACKENDS and path.gemm in GEMMS


def test_compiled_follows_an_answer_without_compiling_for_each_number_of_tokens(answered, dynamo):
    weight, scale = torch.randn(24, 32), torch.randn(2, 8, requires_grad=True)

    def run(z):
        return head_affine_linear(z, weight, scale=scale, scale_heads=[1, 3])

    fast = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    answered({answers.key(F32, 24, 32, 8, 2, 16): Path("delta", "aten", "vendor")})
    # below, in and above the bucket that was measured
    for index, T in enumerate((5, 20, 70)):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            z = torch.randn(T, 32, requires_grad=True)
            y = fast(z)
        form = "delta" if T == 20 else "pass"
        assert torch.equal(y, head_affine_linear(z, weight, scale=scale, scale_heads=[1, 3], form=form))
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (z, scale)))
