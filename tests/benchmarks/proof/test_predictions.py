"""The predicted costs of real models' projections: what is printed and what is refused."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.proof.predictions import EVIDENCE, PREDICTED, main, roofline_rows
from benchmarks.speed.step import packaged_models
from lofit_fast.models.load import ALIASES
from lofit_fast.models.op_paths import layers_of
from lofit_kernels.dispatch import plan
from lofit_kernels.shapes import SHAPES

# what step 1 takes in bfloat16 where nothing was measured
DEFAULT = plan(has_scale=True, many_heads=True, dtype=torch.bfloat16, device_type="cuda")


def call(*arguments, columns=80):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})


def test_the_rows_as_json():
    report = json.loads(call("--device", "H100", "--device", "MI300X", "--json").stdout)
    assert report["evidence"] == EVIDENCE == "prediction (roofline), not a measurement"
    assert set(report["devices"]) == {"H100", "MI300X"}
    assert {row["model"] for row in report["rows"]} == set(PREDICTED) == set(SHAPES) - {"toy"}
    for row in report["rows"]:
        assert row["ratio"] == 1 if row["path"] == "floor" else row["ratio"] > 1
    chosen = {(row["step"], row["path"]) for row in report["rows"] if row["chosen"]}
    assert chosen == {("select", DEFAULT.forward), ("tune", "fold")}
    # the counts are the shape's, whatever the device
    seen = {}
    for row in report["rows"]:
        counts = (row["forward_bytes"], row["backward_bytes"], row["flops"])
        assert seen.setdefault((row["model"], row["step"], row["path"]), counts) == counts


def test_the_tables_fit_into_80_columns():
    text = call("--device", "B200").stdout
    assert "B200, step 1" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text
    assert "Llama-3-70B" in text
    assert "not a measurement" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments, message", [(("--device", "T4"), "unknown device 'T4'"), (("--top", "2"), "share of heads in (0, 1]")]
)
def test_what_cannot_be_predicted_is_refused(arguments, message):
    done = call(*arguments, columns=1000)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_rows_refuse_what_the_command_refuses():
    with pytest.raises(ValueError, match="unknown device 'TPU': expected one of A100"):
        roofline_rows(["TPU"], tokens=1)
    with pytest.raises(ValueError, match=r"share of heads in \(0, 1\], got 0"):
        roofline_rows(["A100"], tokens=1, top=0)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("row", packaged_models.MODELS)
def test_the_shapes_agree_with_the_packaged_models(row):
    alias = packaged_models.MODELS[row]
    if ALIASES[alias].locate() is None:
        pytest.skip(f"not installed: {ALIASES[alias].install}")
    shape = SHAPES[row]
    assert [(x.H, x.D, x.N) for x in layers_of(alias)] == [shape.projection] * shape.layers
