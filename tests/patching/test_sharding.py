"""Sharded models: refused before anything changes, or right."""

import copy
import functools
import inspect

import pytest
import torch
from torch import distributed, nn

import lofit_fast as lf
from tests.oracle import randomize
from tests.patched_models import CONFIGS, HOOKS, logits, loss, relative
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model

fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")


def alone(test):
    """The test in a process of its own, which has a group of itself: tensors placed on it are DTensors all the same.

    Torch remembers layouts of tensors, and with them their group, to the end of a process. Processes that later tests
    fork would have it without its threads.
    """

    @functools.wraps(test)
    def run(**given):
        in_processes(1, lambda rank: test(mesh=distributed.init_device_mesh("cpu", (1,)), **given))

    own = inspect.signature(test)
    run.__signature__ = own.replace(parameters=[value for name, value in own.parameters.items() if name != "mesh"])
    return run


def placed(linear, mesh, *places):
    from torch.distributed.tensor import distribute_tensor

    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, places))


def rows_and_columns(model, mesh):
    from torch.distributed.tensor import Shard

    placed(model.model.layers[1].self_attn.o_proj, distributed.init_device_mesh("cpu", (1, 1)), Shard(0), Shard(1))
    return model


def fully_sharded(model, mesh):
    fsdp.fully_shard(model, mesh=mesh)
    return model


def one_layer_sharded(model, mesh):
    fsdp.fully_shard(model.model.layers[0], mesh=mesh)
    return model


def wrapped_inside(model, mesh):
    layer = fsdp.FullyShardedDataParallel(model.model.layers[1], use_orig_params=True, device_id=torch.device("cpu"))
    model.model.layers[1] = layer
    return model


def wrapped_whole(model, mesh):
    return fsdp.FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))


def partitioned(model, mesh):
    """As ZeRO stage 3 leaves parameters between their uses."""
    for number, parameter in enumerate(model.parameters()):
        parameter.data, parameter.ds_id = torch.empty(0), number
    return model


def local_part(model, mesh):
    """Half of the inputs, under a module that still says it has all of them."""
    linear = model.model.layers[0].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.detach()[:, :32].clone())
    return model


def said_by_the_model(model, mesh):
    model._tp_size = 2
    return model


def sharded_around(model, mesh):
    """As a part of something else: nothing in the model itself was given to fully_shard."""
    fsdp.fully_shard(nn.Sequential(model), mesh=mesh)
    return model


FOUND = {
    rows_and_columns: r"layers\.1\.self_attn\.o_proj\.weight placed .* over 2 dimensions of processes",
    sharded_around: r"the model is sharded as a part of a module around the model",
    wrapped_inside: r"found a FullyShardedDataParallel around model\.layers\.1",
    wrapped_whole: r"found a FullyShardedDataParallel around the model",
    partitioned: r"embed_tokens\.weight, a parameter that is partitioned \(ZeRO stage 3\)",
    local_part: r"layers\.0\.self_attn\.o_proj\.weight, which has the shape \(32, 32\) here, expected \(32, 64\)",
    said_by_the_model: r"tensor-parallel over 2 processes",
}


def state(model):
    """Every module and tensor, what they hold of it here, and who listens."""
    seen = {}
    for name, module in model.named_modules():
        hooks = [list(getattr(module, kind)) for kind in HOOKS]
        seen[f"module {name}"] = (id(module), module.training, vars(module).get("forward"), hooks)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = getattr(tensor, "_local_tensor", tensor).detach()
        seen[f"tensor {name}"] = (id(tensor), tensor.requires_grad, hash(local.numpy().tobytes()))
    return seen


@pytest.mark.parametrize("shard", FOUND, ids=lambda shard: shard.__name__)
@alone
def test_sharded_model_is_refused_as_it_is(shard, mesh, tmp_path):
    plain = tiny_model("llama")
    handle = lf.patch(plain, CONFIGS["both"])
    handle.save(tmp_path)
    handle.unpatch()
    model = shard(plain, mesh)
    before = state(model)
    for put_in in (lambda: lf.patch(model, CONFIGS["both"]), lambda: lf.load(model, tmp_path)):
        with pytest.raises(ValueError, match=rf"cannot patch a sharded model: .*{FOUND[shard]}.*data-parallel"):
            put_in()
        assert state(model) == before
    assert lf.handle_of(model) is None


@alone
def test_columns_that_are_not_cut_one_after_another_are_refused(mesh):
    from torch.distributed.tensor import DTensor, placement_types

    model = tiny_model("llama")
    o_proj = model.model.layers[1].self_attn.o_proj
    packed = placement_types._StridedShard(dim=1, split_factor=2)
    o_proj.weight = nn.Parameter(DTensor.from_local(o_proj.weight.detach(), mesh, [packed]))
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight is placed .* one after another"):
        lf.patch(model, CONFIGS["both"])
    assert state(model) == before


def sharded_after(mesh, **options):
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    whole = copy.deepcopy(model)
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh, **options)
    fsdp.fully_shard(model, mesh=mesh, **options)
    return model, handle, whole


@alone
def test_model_sharded_after_the_patch_trains_as_the_whole_one(mesh):
    model, handle, whole = sharded_after(mesh)
    for each in (model, whole):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss(each).backward()
            optimizer.step()
            optimizer.zero_grad()
    for got, expected in zip(handle.parameters(), lf.handle_of(whole).parameters(), strict=True):
        assert relative(got.full_tensor(), expected) < 1e-5


def gather(model):
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.unshard()


@pytest.mark.parametrize("gathered", [False, True], ids=["parts", "gathered"])
@alone
def test_sharded_model_is_saved_and_filled_but_not_merged(gathered, mesh, tmp_path):
    model, handle, whole = sharded_after(mesh)
    lf.handle_of(whole).save(tmp_path / "whole")
    adapter = lf.handle_of(whole).adapter()
    if gathered:
        gather(model)
    with pytest.raises(ValueError, match=r"cannot merge a sharded model: .*lofit_fast\.export"):
        handle.merge()
    with torch.no_grad():
        for vectors in handle.parameters():
            vectors.zero_()
    if gathered:
        # what is written into gathered tensors would be lost
        gather(model)
    handle.take(adapter)
    handle.save(tmp_path / "sharded")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert relative(logits(model), logits(whole)) < 1e-6


@pytest.mark.parametrize("shard", [fully_sharded, one_layer_sharded], ids=lambda shard: shard.__name__)
@alone
def test_gathered_model_is_patched(shard, mesh):
    # every tensor is an ordinary one, and those that are trained are not: they come back
    model = shard(tiny_model("llama"), mesh)
    gather(model)
    handle = lf.patch(model, CONFIGS["both"])
    ids = set(map(id, handle.parameters()))
    assert all(p.requires_grad == (id(p) in ids) for p in model.parameters())
    gather(model)
    handle.unpatch()
    assert all(p.requires_grad for p in model.parameters())
    gather(model)
    assert all(p.requires_grad for p in model.parameters())


def freed(vectors):
    vectors.untyped_storage().resize_(0)


def flat(vectors):
    vectors.data = vectors.detach().flatten()


def elsewhere(vectors):
    vectors.data = torch.empty(0)


@pytest.mark.parametrize("take", [flat, elsewhere, freed], ids=lambda take: take.__name__)
def test_vectors_in_parts_are_not_saved(take, tmp_path):
    """As FSDP's flat tensors, and ZeRO stage 3, leave them between their uses."""
    handle = lf.patch(tiny_model("llama"), CONFIGS["both"])
    take(handle.layers[1].offset)
    with pytest.raises(ValueError, match=r"cannot save the adapter of a sharded model: found layer 1's offset, which"):
        handle.save(tmp_path / "parts")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("take", [flat, elsewhere], ids=lambda take: take.__name__)
def test_base_in_parts_is_not_merged(take, tmp_path):
    handle = lf.patch(tiny_model("llama"), CONFIGS["both"])
    take(handle.layers[1].inner.weight)
    for action, do in {"merge": handle.merge, "export": lambda: lf.export(handle, tmp_path / "plain")}.items():
        with pytest.raises(ValueError, match=rf"cannot {action} a sharded model: found \S+, which has the shape"):
            do()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@alone
def test_no_whole_weight_waits_for_the_backward(dtype, mesh):
    """What a forward keeps of a projection is FSDP's own tensor, which is empty by then."""
    model, handle, _ = sharded_after(mesh, mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=dtype))
    shape, kept = tuple(handle.layers[1].weight.shape), []

    def keep(tensor):
        kept.append((tuple(tensor.shape), tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model)
    weights = [storage for own, storage in kept if own in (shape, shape[::-1])]
    assert weights and all(storage.nbytes() == 0 for storage in weights)


@alone
def test_mixed_precision_leaves_vectors_that_came_after_as_they_are(mesh):
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model, whole = tiny_model("llama"), tiny_model("llama")
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    handles = [lf.patch(each, CONFIGS["both"]) for each in (model, whole)]
    for handle in handles:
        randomize(handle)
    vectors = {id(parameter) for parameter in handles[1].parameters()}
    for parameter in whole.parameters():
        parameter.data = parameter.data if id(parameter) in vectors else parameter.data.bfloat16()
    assert relative(logits(model), logits(whole)) < 1e-6
    loss(model).backward()
    loss(whole).backward()
    for got, expected in zip(*(handle.parameters() for handle in handles), strict=True):
        assert got.dtype == got.grad.dtype == torch.float32
        assert relative(got.grad, expected.grad) < 1e-6


@alone
def test_mixed_precision_computes_with_rounded_vectors(mesh):
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model, handle, whole = sharded_after(mesh, mp_policy=policy)
    vectors = {id(parameter) for parameter in lf.handle_of(whole).parameters()}
    for parameter in whole.parameters():
        rounded = parameter.data.bfloat16()
        parameter.data = rounded.float() if id(parameter) in vectors else rounded
    assert relative(logits(model), logits(whole)) < 1e-6
    loss(model).backward()
    loss(whole).backward()
    for got, expected in zip(handle.parameters(), lf.handle_of(whole).parameters(), strict=True):
        assert got.dtype == got.grad.dtype == torch.float32
        assert relative(got.grad.full_tensor(), expected.grad) < 2e-2
