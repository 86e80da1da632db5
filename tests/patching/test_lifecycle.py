"""What a handle does when the model around it is unusual, changed by others, or no longer its own."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lofit_fast as lf
from benchmarks.peers.hook import vectors_of
from tests.oracle import randomize
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model, tokens

CONFIG = lf.LofitConfig(scale=[(1, 0)], offset=[(0, 1), (2, 3)])
OFFSETS = lf.LofitConfig(offset=[(0, 1), (2, 3)], init_std=0.5)


def test_heads_of_a_hybrid_are_named_by_their_layer():
    # attention in layers 1 and 2 alone
    model = tiny_family("qwen3_next")
    handle = lf.patch(model, lf.LofitConfig(scale="all"))
    assert list(handle.layers) == [1, 2]
    with torch.no_grad():
        handle.layers[2].scale[3] = 5.0
    (best,) = lf.select_heads(lf.head_scores(handle), top=1)
    assert best == (2, 3)
    handle.unpatch()
    assert list(lf.patch(model, lf.LofitConfig(offset=[best])).layers) == [2]


@pytest.mark.parametrize("end", ["unpatch", "merge"])
def test_an_ended_handle_says_so(llama, tmp_path, end):
    handle = lf.patch(llama, CONFIG)
    getattr(handle, end)()
    uses = [handle.unpatch, handle.merge, lambda: lf.export(handle, tmp_path), lambda: lf.verify_export(handle, "")]
    for use in (*uses, handle.disabled().__enter__, handle.folded().__enter__):
        with pytest.raises(ValueError, match="has ended"):
            use()


def test_a_merged_handle_writes_no_adapter(llama, tmp_path):
    handle = lf.patch(llama, OFFSETS)
    handle.add("other", lf.LofitConfig(offset=[(1, 2)]))
    handle.merge()
    options = {"folder": tmp_path / "push", "dry_run": True}
    writes = [lambda: handle.push_to_hub("user/name", **options), lambda: lf.export(handle, tmp_path / "plain")]
    for write in (*writes, handle.adapter, lambda: handle.adapter("other"), lambda: handle.save(tmp_path / "adapter")):
        with pytest.raises(ValueError, match="has ended.*merge"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_merge_that_fails_midway_writes_no_adapter_either(llama, tmp_path, monkeypatch):
    handle = lf.patch(llama, OFFSETS)

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lofit_fast.patching.handle.merge_into_base", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        handle.merge()
    with pytest.raises(ValueError, match="has ended: merge"):
        handle.save(tmp_path / "adapter")


def test_an_unpatched_handle_saves_for_the_base_as_it_is(llama, tmp_path):
    handle = lf.patch(llama, CONFIG)
    randomize(handle)
    expected = llama(tokens()).logits
    handle.unpatch()
    handle.save(tmp_path)
    lf.load(llama, tmp_path, strict=True)
    assert torch.equal(llama(tokens()).logits, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_merging_what_cannot_be_saved_warns(family):
    handle = lf.patch(tiny_model(family), CONFIG)
    with pytest.warns(UserWarning, match="lofit_fast.export"):
        handle.merge()


def test_unpatch_keeps_what_was_put_around_the_base_since(llama):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    handle = lf.patch(llama, CONFIG)
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["inner"], r=2, init_lora_weights=False)).eval()
    with handle.disabled(), torch.no_grad():
        expected = wrapped(tokens()).logits
    handle.unpatch()
    assert torch.equal(wrapped(tokens()).logits, expected)


def test_unpatch_under_somebody_elses_wrapper_is_refused(llama):
    handle = lf.patch(llama, CONFIG)
    attention = llama.model.layers[1].self_attn
    attention.o_proj = torch.nn.Sequential(attention.o_proj)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj has been replaced"):
        handle.unpatch()
    assert lf.handle_of(llama) is handle


def test_offloaded_weights_are_patched_where_they_compute(llama):
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload

    plain = lf.patch(tiny_model("llama"), CONFIG)
    randomize(plain)
    cpu_offload(llama, execution_device=torch.device("cpu"))
    handle = lf.patch(llama, CONFIG)
    assert {p.device.type for p in handle.parameters()} == {"cpu"}
    randomize(handle)
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens()).logits, plain.model(tokens()).logits)


def test_weights_that_are_nowhere_are_refused():
    with pytest.raises(ValueError, match="meta device"):
        lf.patch(tiny_model("llama").to("meta"), CONFIG)


def test_heads_and_flags_survive_new_parameters(llama):
    handle = lf.patch(llama, CONFIG)
    before = {key: heads for key, (heads, _) in vectors_of(handle).items()}
    llama.to_empty(device="cpu")
    assert {key: heads for key, (heads, _) in vectors_of(handle).items()} == before
    assert all(layer.offset_heads is None or layer.offset_heads.max() < 4 for layer in handle.layers.values())
    handle.unpatch()
    assert all(p.requires_grad for p in llama.parameters())


def test_nested_folds_compute_once(llama, monkeypatch):
    handle, folds = lf.patch(llama, CONFIG), []
    import lofit_fast.patching.layer as layer

    fold = layer.fold_offset
    monkeypatch.setattr(layer, "fold_offset", lambda *a, **k: folds.append(1) or fold(*a, **k))
    with handle.folded():
        with handle.folded():
            pass
        assert all(at.here.kept is not None for at in handle.layers.values() if at.offset is not None)
    assert len(folds) == 2
    assert all(at.here.kept is None for at in handle.layers.values())


def test_export_into_an_adapter_folder_is_refused(llama, tmp_path):
    handle = lf.patch(llama, CONFIG)
    handle.save(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter"):
        lf.export(handle, tmp_path)


class Halved(nn.Module):
    def forward(self, vectors):
        return vectors / 2

    def right_inverse(self, vectors):
        return 2 * vectors


def is_parametrized(layer):
    parametrize.register_parametrization(layer, "offset", Halved())


def is_normed(layer):
    parametrizations.weight_norm(layer, "offset")


def is_pruned(layer):
    prune.random_unstructured(layer, "offset", 0.5)


# kind -> (how an offset is computed from then on, the paths of what it is computed from)
COMPUTED = {
    "parametrized": (is_parametrized, ["parametrizations.offset.original"]),
    "weight_norm": (is_normed, ["parametrizations.offset.original0", "parametrizations.offset.original1"]),
    "pruned": (is_pruned, ["offset_orig"]),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_vectors_that_are_computed_from_others_have_those_as_parameters(llama, kind, tmp_path):
    handle = lf.patch(llama, OFFSETS)
    change, paths = COMPUTED[kind]
    change(handle.layers[0])
    assert [name for name, _ in handle.named_parameters()] == [*(f"0.{path}" for path in paths), "2.offset"]
    assert {id(p) for p in handle.parameters()} == {id(p) for p in llama.parameters() if p.requires_grad}
    assert handle.n_parameters() == sum(p.numel() for p in llama.parameters() if p.requires_grad)
    llama(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    handle.requires_grad_(False)
    assert not any(p.requires_grad for p in llama.parameters())
    assert lf.AdapterCheckpoints(handle).state_dict()["vectors"]["0.offset"].equal(handle.layers[0].offset)
    other = lf.load(tiny_model("llama"), handle.save(tmp_path))
    torch.testing.assert_close(other.layers[0].offset, handle.layers[0].offset, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot load vectors into layer 0, whose offset is computed from other"):
        handle.take(other.adapter())
    # moved and cast with the rest, and never below float32
    llama.to(torch.float64)
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    llama.half()
    assert {p.dtype for p in handle.parameters()} == {torch.float32}


def test_a_weight_put_into_our_layer_is_no_vector(llama):
    handle = lf.patch(llama, OFFSETS)
    before = [id(p) for p in handle.parameters()]
    layer = handle.layers[0]
    layer._parameters["weight"] = nn.Parameter(torch.zeros_like(layer.weight))
    assert [id(p) for p in handle.parameters()] == before
    assert handle.n_parameters() == 32
