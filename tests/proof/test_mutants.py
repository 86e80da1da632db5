"""The mutant run: its operators, its table of reasons, and a small sample of the run itself."""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.proof.bodies import ROOT, Module, modules, mutants, mutants_of_body, suites
from tests.proof.mutants import SAMPLE, SURVIVED, Outcome, Report, reasons, select
from tests.proof.mutation_operators import OPERATORS


def variants(operator: str, text: str) -> list[str]:
    """What `operator` makes of the kernel body `text`."""
    source = f"@triton.jit\ndef f(x, T, N, stride_x, stride_y, ACC):\n    {text}\n"
    module = Module.__new__(Module)
    module.tree = ast.parse(source)
    return [m.becomes for m in mutants_of_body(module, module.tree.body[0], ("any",)) if m.operator == operator]


@pytest.mark.parametrize(
    "operator, text, expected",
    [
        ("sign", "y = x + 1", ["y = x - 1"]),
        ("sign", "x -= T", ["x += T"]),
        ("sign", "y = -T", ["y = T"]),
        ("mask", "y = (x < T) & (x < N)", ["y = x < T", "y = x < N", "y = (x <= T) & (x < N)"]),
        ("mask", "y = tl.load(x, mask=T, other=0.0)", ["y = tl.load(x)"]),
        ("mask", "y = tl.where(T, x, N)", ["y = x", "y = N"]),
        ("mask", "if x is None:\n        y = T", []),
        ("stride", "y = T * stride_x", ["y = T", "y = stride_x", "y = T * stride_y"]),
        ("index", "y = x[:, None]", ["y = x[None, :]"]),
        ("index", "y = x // T", ["y = x % T", "y = x // N"]),
        ("index", "for i in range(0, x, 8):\n        y = i", ["for i in range(0 + 8, x, 8):"]),
        ("dtype", "y = x.to(tl.int64)", ["y = x", "y = x.to(tl.int32)"]),
        ("dtype", "y = tl.zeros((8,), ACC)", ["y = tl.zeros((8,), tl.float16)"]),
        ("accumulate", "x += T", ["x = T", "pass"]),
        ("accumulate", "x = dot(T, N, x)", ["x = dot(T, N, x * 0)"]),
        ("accumulate", "tl.store(x, T)", ["pass"]),
    ],
)
def test_operators(operator, text, expected):
    found = variants(operator, text)
    assert set(expected) <= set(found) and bool(found) == bool(expected)


@pytest.fixture(scope="module")
def everything():
    """All mutants, listed once."""
    return mutants()


def test_every_operator_reaches_every_family_with_thirty_mutants(everything):
    for family in suites():
        own = [mutant for mutant in everything if family in mutant.families]
        assert len(own) >= 30 and {mutant.operator for mutant in own} == set(OPERATORS)
        assert len(select(everything, [family], 30)) == 30
        # every operator on every body that it has something to change in
        places = {(mutant.kernel, mutant.operator) for mutant in own}
        assert {(m.kernel, m.operator) for m in select(everything, [family], SAMPLE)} == places
    bodies = {(module.name, body.name) for module in modules().values() for body in module.bodies}
    assert {(mutant.module.name, mutant.kernel) for mutant in everything} == bodies
    # the same every time
    assert [m.key for m in everything] == [m.key for m in mutants()]


@pytest.mark.slow
def test_mutants_change_one_statement_and_compile(everything):
    for mutant in everything[::40]:
        before = ast.unparse(mutant.module.tree).splitlines()
        after = mutant.source().splitlines()
        compile(mutant.source(), mutant.module.name, "exec")
        assert sum(x != y for x, y in zip(before, after, strict=False)) >= 1
        assert ast.unparse(mutant.module.tree).splitlines() == before


def test_every_reason_has_its_mutant(everything):
    gone = set(reasons()) - {mutant.key for mutant in everything}
    assert gone == set()


def test_report_tells_explained_from_unexplained_and_stale(everything):
    first, second, third = everything[:3]
    outcomes = [Outcome(first, SURVIVED), Outcome(second, SURVIVED), Outcome(third, "numbers", "a case")]
    known = {first.key: "equivalent", third.key: "was thought to survive", ("gone", "sign", "a", "b"): "old"}
    report = Report(outcomes, known, everything)
    assert [o.mutant for o in report.unexplained] == [second]
    assert report.stale == [third.key, ("gone", "sign", "a", "b")]
    counts = {"mutants": len(everything), "run": 3, "killed": 1, "survived": 2}
    assert report.to_json()["distinct"] == counts
    assert report.rows()[0].items() >= {"run": 3, "killed": 1, "survived": 2, "unexplained": 1}.items()


@pytest.mark.parametrize("content", ["twice", "empty"])
def test_reasons_are_refused(tmp_path, content):
    row = '["sign", "a", "b"]'
    path = tmp_path / "table.toml"
    rows, reason = (f"{row}, {row}", "why") if content == "twice" else (row, " ")
    path.write_text(f'[[survivors]]\nkernel = "k"\nreason = "{reason}"\nmutants = [{rows}]\n')
    with pytest.raises(ValueError, match="listed twice or has no reason"):
        reasons(path)


@pytest.mark.slow
def test_a_sample_of_the_run(tmp_path):
    pytest.importorskip("triton")
    report = tmp_path / "run.json"
    command = ["--family", "offset", "--kernel", "_column_sum_kernel", "--limit", "40", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.proof.mutants", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (row,) = json.loads(report.read_text())["families"]
    assert row["family"] == "offset" and row["killed"] >= 5 and set(row["by"]) <= {"numbers", "memory", "crash"}
