"""The GPU script's checks: no right path is called wrong, over many draws, and every kind of fault is, in any dtype."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed.gpu import gpu_rows, path_checks
from benchmarks.speed.op.operators import OPERATORS, projection, step
from lofit_kernels.shapes import SHAPES
from tests.ordinary_sample import crossed

# what has no Triton in it, and so can be checked hundreds of times
ATEN = ("ours", "pass aten", "delta aten", "fold aten", "fold_eager", "original")


def reds(seeds, cases, settings=gpu_rows.SETTINGS, names=ATEN):
    """What the checks call wrong among paths that are right."""
    tasks = {"cases": [vars(case) | {"settings": settings} for case in cases], "planted": False, "device": "cpu"}
    found = []
    for name in names:
        result = path_checks.check(tasks | {"peer": name, "seeds": seeds, "now": lambda where: None})
        assert result["checked"]
        found += result["problems"]
    return found


def test_right_paths_pass_for_a_few_draws():
    assert reds(2, gpu_rows.CHECKS["cpu"], ("step 2", "both")) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_right_paths_pass_for_200_draws():
    assert reds(200, gpu_rows.CHECKS["cpu"]) == []


def edit(name, change):
    """A fault in one of the results: name -> result -> the wrong one."""
    return lambda results, p: {**results, name: change(results[name], p)}


def without_last_token(name):
    """A sum over tokens that never sees the last one: a row dropped."""

    def wrong(results, p):
        fewer = projection_without(p, slice(0, len(p.z) - 1))
        return {**results, name: named(fewer)[name]}

    return wrong


def without_a_partial_sum(name):
    """Of a sum over tokens in blocks of a quarter, the second block is not added."""

    def wrong(results, p):
        quarter = max(1, len(p.z) // 4)
        kept = torch.cat([torch.arange(quarter), torch.arange(2 * quarter, len(p.z))])
        return {**results, name: named(projection_without(p, kept))[name]}

    return wrong


def projection_without(p, kept):
    return replace(p, z=p.z.detach()[kept].requires_grad_(), grad=p.grad[kept])


def named(p):
    return dict(zip(path_checks._names(p), step(OPERATORS["ours"], p), strict=True))


def changed_vectors(name, change):
    """One result computed with other vectors, as a kernel that reads the wrong ones does."""

    def wrong(results, p):
        scale = p.scale.detach().clone()
        change(scale)
        return {**results, name: named(replace(p, scale=scale.requires_grad_()))[name]}

    return wrong


def swap(scale):
    scale[[0, 1]] = scale[[1, 0]]


def unmasked(name):
    """The tail of the last block of tokens is read again and added."""

    def wrong(results, p):
        kept = torch.cat([torch.arange(len(p.z)), torch.tensor([len(p.z) - 1])])
        return {**results, name: named(projection_without(p, kept))[name]}

    return wrong


def rounded(x, p):
    return x.bfloat16().to(x.dtype)


# fault -> (what is wrong then, how)
FAULTS = {
    "y 1 % off": ("y", edit("y", lambda y, p: 1.01 * y)),
    "dz 1 % off": ("dz", edit("dz", lambda dz, p: 1.01 * dz)),
    "da without a row": ("da", without_last_token("da")),
    "dv without a row": ("dv", without_last_token("dv")),
    "da without a partial sum": ("da", without_a_partial_sum("da")),
    "dv without a partial sum": ("dv", without_a_partial_sum("dv")),
    "da of the wrong head": ("da", edit("da", lambda da, p: da.roll(1, 0))),
    "dv of the wrong head": ("dv", edit("dv", lambda dv, p: dv.roll(1, 0))),
    "y with two heads' scales exchanged": ("y", changed_vectors("y", swap)),
    "dz with two heads' scales exchanged": ("dz", changed_vectors("dz", swap)),
    "y without the scale": ("y", changed_vectors("y", lambda scale: scale.zero_())),
    "dz without the scale": ("dz", changed_vectors("dz", lambda scale: scale.zero_())),
    "da with an unmasked tail": ("da", unmasked("da")),
    "dv with an unmasked tail": ("dv", unmasked("dv")),
}


def problems_with(monkeypatch, change, p):
    """What the checks find where the results of our op are changed."""

    def tampered(operator, given):
        results = step(operator, given)
        if operator.name != "ours":
            return results
        return tuple(change(dict(zip(path_checks._names(given), results, strict=True)), given).values())

    monkeypatch.setattr(path_checks, "step", tampered)
    return path_checks.problems(OPERATORS["ours"], p)


CASES = [("toy", 5, "float32"), ("toy", 21, "bfloat16"), ("SmolLM2-135M", 77, "float32")]


# in the ordinary run each fault in one case; slow: in every one
@pytest.mark.parametrize("fault, model, T, dtype", crossed(list(FAULTS), CASES))
def test_a_fault_is_red(monkeypatch, fault, model, T, dtype):
    name, change = FAULTS[fault]
    p = projection("both", SHAPES[model], T, getattr(torch, dtype), "cpu")
    found = problems_with(monkeypatch, change, p)
    assert any(problem.startswith(f"{name}: error") for problem in found), found


@pytest.mark.parametrize("name", ["y", "dz", "da", "dv"])
def test_16_bits_where_float32_is_due_is_red(monkeypatch, name):
    p = projection("both", SHAPES["SmolLM2-135M"], 77, torch.float32, "cpu")
    found = problems_with(monkeypatch, edit(name, rounded), p)
    assert any(problem.startswith(f"{name}: error") for problem in found), found


def test_an_unchanged_result_is_right(monkeypatch):
    p = projection("both", SHAPES["toy"], 21, torch.bfloat16, "cpu")
    assert problems_with(monkeypatch, lambda results, p: results, p) == []
