"""The measurement of many adapters in one batch, on a tiny model."""

from benchmarks.speed.op.many_adapters import measured
from tests.patched_models import snapshot
from tests.tiny_models import tiny_model


def test_many_adapters_are_measured_once_they_are_right(dynamo):
    model = tiny_model("llama")
    before = snapshot(model)
    found = measured(model, adapters=5, tokens=3)
    assert snapshot(model) == before
    apart, cost, switched = found["apart"], found["cost"], found["switching"]
    assert max(apart["one by one"], apart["hook"]) < 1e-5 < 1e-2 < apart["base"]
    assert switched["graphs_before"] == switched["graphs_after"] == 1
    added = cost["token"]["operations"]["rows"] - cost["token"]["operations"]["base"]
    # per layer the rows are looked up, shaped and added; and the names become an index once
    assert 3 * 2 <= added <= 3 * 4 + 4
