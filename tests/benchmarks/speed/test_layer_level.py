"""Op and layer level beside each other: who is timed, who is absent and why, and LoRA's product."""

import pytest
import torch

from benchmarks.peers.table import PEERS
from benchmarks.speed.cells import Options
from benchmarks.speed.op import layer_level
from benchmarks.speed.op.operators import EVERYONE, OPERATORS, OTHERS, projection, step
from lofit_kernels.shapes import SHAPES


def test_everyone_is_timed_or_absent_with_a_reason(monkeypatch):
    monkeypatch.setattr(layer_level, "TIMED_LAYERS", ("toy",))
    monkeypatch.setattr(layer_level, "T", 16)
    # what needs a compiler takes seconds here
    few = {name: one for name, one in EVERYONE.items() if one.needs is None}
    monkeypatch.setattr(layer_level, "EVERYONE", few)
    report = layer_level.layer_milliseconds(Options(None, 2, 8))
    assert [(g["level"], g["setting"]) for g in report["groups"]] == [
        (level, step) for level in ("projection", "layer") for step in ("step 1", "step 2")
    ]
    absent = {(row["peer"], row["step"]) for row in report["rows"]}
    for group in report["groups"]:
        where = f"{group['level']} of toy, {group['setting']}"
        timed = {name for name, one in group["peers"].items() if one["ms"] > 0 and one["vs_floor"]["median"] > 0}
        assert {"floor", "ours", "hook", "original", "lora_all"} <= timed
        assert timed - {"the projection alone"} | {name for name in few if (name, where) in absent} == set(few)
    reasons = {row["absent"] for row in report["rows"] if row["peer"] == "ia3"}
    assert reasons == {"adapts other projections than this one: see the step level"}


def test_lora_is_pefts():
    peft = pytest.importorskip("peft")
    p = projection("step 1", SHAPES["toy"], 9, torch.bfloat16, "cpu")
    model = torch.nn.Sequential(torch.nn.Linear(p.shape.K, p.shape.N, bias=False)).bfloat16()
    model[0].weight.data.copy_(p.weight)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    adapted = peft.get_peft_model(model, config)
    layer = adapted.base_model.model[0]
    for matrix, rows in zip((layer.lora_A, layer.lora_B), p.low_rank, strict=True):
        matrix["default"].weight.data.copy_(rows)
    y = adapted(p.z)
    wanted = (p.z, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    expected = (y, *torch.autograd.grad(y, wanted, p.grad))
    for got, right in zip(step(OTHERS["lora_all"], p), expected, strict=True):
        assert got.dtype == right.dtype
        torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_the_floor_trains_nothing():
    p = projection("step 2", SHAPES["toy"], 9, torch.float32, "cpu")
    assert len(step(OPERATORS["floor"], p)) == 2
    assert len(step(OPERATORS["hook"], p)) == 3


def test_an_offset_alone_has_a_dither_of_its_own():
    p = projection("step 2", SHAPES["toy"], 9, torch.bfloat16, "cpu")
    assert OPERATORS["dither aten"].refusal(p) is None
    assert OPERATORS["pass aten"].refusal(p) == "without a scale this is the fold"
    dithered, folded = (OPERATORS[name].forward(p.z, p) for name in ("dither aten", "fold aten"))
    assert not torch.equal(dithered, folded)
    alone = projection("step 2", SHAPES["toy"], 9, torch.float32, "cpu")
    assert "rounds to 16 bits" in OPERATORS["dither aten"].refusal(alone)


def test_an_operator_is_a_path_of_ours_or_has_its_peers_name():
    assert {name for name, row in EVERYONE.items() if not row.ours} <= PEERS.keys()
    assert EVERYONE.keys() & {"floor", "ours", "hook", "original", "fold_eager", "lora_all"} <= PEERS.keys()
