"""Tensor-parallel models: what one process computes, in several of which each has some of the heads."""

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.patching import handle as patching
from lofit_fast.patching.fully_sharded import spread_sample
from lofit_fast.patching.row_parallel import row_parallel_tensors
from lofit_fast.patching.weight_sample import base_digest, sample_places
from tests.accuracy_rule import check
from tests.oracle import randomize
from tests.parallel_models import everything, farthest, parallel, row_wise, saved, trained
from tests.several_processes import in_processes
from tests.tiny_models import HEAD_DIM, VOCAB, tiny_model, tokens

# imported before the fork
pytest.importorskip("torch.distributed.tensor.parallel", reason="torch without torch.distributed")
pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers without tp_plan")

# of layer 1 the second of two processes has no scale, of layer 2 the first none at all, of layer 0 no offset
BOTH = lf.LofitConfig(scale=[(0, 0), (0, 3), (1, 1)], offset=[(0, 1), (1, 0), (1, 3), (2, 2)])
BIASED = {"attention_bias": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    # transformers 5.17 spreads no vocabulary of an odd size over two processes
    return folder, saved(folder, "llama", vocab_size=VOCAB + 1, **BIASED)


def adapter_of(model):
    """A handle with vectors that matter."""
    handle = lf.patch(model, BOTH)
    randomize(handle)
    return handle


@pytest.fixture(scope="module")
def seen(base, tmp_path_factory):
    """What two processes make of one model, in each of them."""
    out, (folder, kind) = tmp_path_factory.mktemp("out"), base

    def work(rank):
        model = parallel(folder, kind, 2)
        objects = [layer.self_attn.o_proj for layer in model.model.layers]
        found = {"all": everything(model, BOTH), "written": [], "refused": {}}
        found["known"] = all(row_parallel_tensors(o) is not None for o in objects if o is not None)
        handle = lf.handle_of(model)
        write = patching.save_adapter
        patching.save_adapter = lambda *arguments: found["written"].append(rank) or write(*arguments)
        handle.save(out / "adapter")
        # who reads it waits for the one that writes it
        torch.distributed.barrier()
        for action, do in {"merge": handle.merge, "export": lambda: lf.export(handle, out / "plain")}.items():
            with pytest.raises(ValueError) as refused:
                do()
            found["refused"][action] = str(refused.value)
        handle.unpatch()
        found["digest"] = handle.adapter().base_digest
        found["back"] = all(a is b.self_attn.o_proj for a, b in zip(objects, model.model.layers, strict=True))
        again = lf.load(model, out / "adapter")
        with torch.no_grad():
            found["loaded"] = model(tokens()).logits
        again.unpatch()
        found["in_16_bits"] = in_16_bits(parallel(folder, kind, 2, torch.bfloat16))
        return found

    return in_processes(2, work), out


def test_processes_train_generate_and_choose_as_one(seen, base):
    folder, kind = base
    expected = everything(kind.from_pretrained(folder).eval(), BOTH)
    for found in seen[0]:
        assert farthest(found["all"], expected) < 1e-5
        assert found["known"]
    first, second = (found["all"]["final"] for found in seen[0])
    # to the last bit, or they would drift apart
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_adapter_is_written_once_and_whole(seen, base):
    (first, second), out = seen
    assert (first["written"], second["written"]) == ([0], [])
    folder, kind = base
    model = kind.from_pretrained(folder).eval()
    # the processes know together which base it is
    assert first["digest"] == second["digest"] == base_digest(model)
    handle = lf.load(model, out / "adapter", strict=True)
    for got, expected in zip(first["all"]["final"], handle.parameters(), strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        alone = model(tokens()).logits
    for found in (first, second):
        torch.testing.assert_close(found["all"]["logits"], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["loaded"], alone, rtol=0, atol=1e-5)


def test_base_layers_come_back_and_merging_is_refused(seen):
    for found in seen[0]:
        assert found["back"]
        for action, said in found["refused"].items():
            assert (
                f"cannot {action} a sharded model: it is tensor-parallel over 2" in said
                and "that one process holds whole" in said
            )
    assert not (seen[1] / "plain").exists()


def in_16_bits(model):
    """(output, gradients) of one projection in bfloat16, of what the hook computes through the same base, and y with
    scales that vanish beside 1."""
    handle = adapter_of(model)
    layer, rank = handle.layers[1], torch.distributed.get_rank()
    z = torch.randn(64, 4 * HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    own = z.chunk(2, dim=-1)[rank].clone()
    y = layer(own)
    y.float().square().sum().backward()
    got = [y.detach(), layer.scale.grad, layer.offset.grad]
    a, v = torch.zeros(2, 4, HEAD_DIM)
    a[[1]], v[[0, 3]] = layer.scale.detach(), layer.offset.detach()
    edited = ((1 + a.flatten()) * z + v.flatten()).bfloat16().chunk(2, dim=-1)[rank]
    with torch.no_grad():
        eager = layer.inner(edited)
        nn.init.constant_(layer.scale, 1e-3), nn.init.zeros_(layer.offset)
        small, none = layer(own), layer.inner(own)
    return z, a, v, got, eager, small, none


def test_accuracy_in_16_bits(seen, base):
    linear = base[1].from_pretrained(base[0], dtype=torch.bfloat16).model.layers[1].self_attn.o_proj.double()
    for z, a, v, (y, da, dv), eager, small, none in (found["in_16_bits"] for found in seen[0]):
        a, v, z = a.double().requires_grad_(), v.double().requires_grad_(), z.double()
        exact = linear((1 + a.flatten()) * z + v.flatten())
        check(y, exact.detach(), eager)
        exact.square().sum().backward()
        for got, expected in ((da, a.grad[[1]]), (dv, v.grad[[0, 3]])):
            assert ((got - expected).norm() / expected.norm()).item() < 1e-2
        # below half of what survives in (1 + a) z
        assert not torch.equal(small, none)


def by_torch(rank):
    """A loop with a model that torch's styles have cut before the patch and after it, and single layers by the way."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    found = {}
    for way in ("before", "after"):
        model = tiny_model("llama")
        if way == "before":
            row_wise(model, 2)
        handle = lf.patch(model, BOTH)
        if way == "after":
            row_wise(model, 2)
        found[f"known {way}"] = row_parallel_tensors(handle.layers[1].inner) is not None
        found[way] = trained(model, handle, 1)
    randomize(handle)
    layer = handle.layers[1]
    mesh = layer.inner.weight.device_mesh
    z = torch.randn(2, 6, 4 * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    own = z.chunk(2, dim=-1)[rank]
    with torch.no_grad():
        found["plain"], found["whole"] = layer(own), layer(z)
        found["placed"] = layer(DTensor.from_local(own, mesh, [Shard(-1)], run_check=False))
    for wrong, said in ((own[..., 1:], "has 31 of the 64 inputs"), (own[..., :16], "has 16 of the 64 inputs")):
        with pytest.raises(ValueError, match=said):
            layer(wrong)
    with pytest.raises(ValueError, match="expected one that is cut by heads"):
        layer(DTensor.from_local(own, mesh, [Shard(1)], run_check=False))
    handle.unpatch()
    large = torch.randn(300, 250, generator=torch.Generator().manual_seed(1))
    for dim in (0, 1):
        sample = spread_sample(distribute_tensor(large, mesh, [Shard(dim)]), sample_places)
        assert torch.equal(sample, large[sample_places(large)])
    # each process has the outputs of half of the tokens
    row_wise(half := tiny_model("llama"), 2, output_layouts=Shard(1))
    handle = adapter_of(half)
    found["known sequence"] = row_parallel_tensors(handle.layers[1].inner) is not None
    with torch.no_grad():
        # added to, since what is on its way cannot be sent to the test
        found["sequence"] = handle.layers[1](own) + 0
    return found


def test_other_configs_elsewhere_and_rows_cut_beside_columns_are_refused():
    def work(rank):
        from torch.distributed import fsdp, init_device_mesh

        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
        model = row_wise(tiny_model("llama"), 2, mesh["tp"])
        with pytest.raises(ValueError, match="expected the same LofitConfig in every process"):
            lf.patch(model, lf.LofitConfig(offset=[(0, rank)]))
        fsdp.fully_shard(model, mesh=mesh["fsdp"])
        with pytest.raises(ValueError, match="cannot patch a sharded model: found"):
            lf.patch(model, BOTH)

    in_processes(2, work)


@pytest.mark.slow
def test_styles_of_torch_before_the_patch_and_after():
    both = in_processes(2, by_torch)
    model = tiny_model("llama")
    expected = trained(model, lf.patch(model, BOTH), 1)
    randomize(handle := lf.handle_of(model))
    z = torch.randn(2, 6, 4 * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = handle.layers[1](z)
    for found in both:
        assert found["known before"] and found["known after"] and not found["known sequence"]
        for way in ("before", "after"):
            for name, values in expected.items():
                for a, b in zip(found[way][name], values, strict=True):
                    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-5)
        for name in ("plain", "placed"):
            torch.testing.assert_close(found[name], y, rtol=0, atol=1e-5)
    joined = torch.cat([found["sequence"] for found in both], dim=1)
    torch.testing.assert_close(joined, y, rtol=0, atol=1e-5)
