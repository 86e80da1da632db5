"""A patched model in other people's loops: its losses and gradients are those of a hook, whatever runs it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import lofit_fast as lf
from tests.oracle import Hook, randomize, vectors_of
from tests.tiny_models import tiny_model, tokens

CONFIG = lf.LofitConfig(scale=[(0, 0), (1, 2)], offset=[(0, 1), (1, 3), (2, 0)])


def patched(**changes):
    handle = lf.patch(tiny_model("llama", **changes), CONFIG)
    randomize(handle)
    return handle


def loss_of(model, seed=1):
    ids = tokens(seed=seed)
    return nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def close(got, expected, tolerance=1e-5):
    """Whether losses and gradients agree, relative to the largest."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] - value).abs().max() <= tolerance * value.abs().max(), key


def by_hook(handle, seed=1):
    """Loss and gradients of a hook with the handle's vectors, on a base model of its own."""
    model = tiny_model("llama").to(next(handle.model.parameters()).dtype)
    hook = Hook(model, vectors_of(handle))
    keys = sorted(hook.parameters)
    value = loss_of(model, seed)
    grads = torch.autograd.grad(value, [hook.parameters[key] for key in keys])
    return {"loss": value.detach()} | {f"{n}.{c}": g for (n, c), g in zip(keys, grads, strict=True)}


def by_ours(handle, run, seed=1):
    """Loss and gradients of the patched model, called as `run`."""
    handle.model.zero_grad()
    value = loss_of(run, seed)
    value.backward()
    return {"loss": value.detach()} | {name: p.grad.clone() for name, p in handle.named_parameters()}


def checkpointed(model, reentrant, input_grads):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (model.enable_input_require_grads if input_grads else model.disable_input_require_grads)()
    return model


def prepared(model):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    parameters = [p for p in model.parameters() if p.requires_grad]
    return Accelerator(cpu=True).prepare(model, torch.optim.AdamW(parameters))[0]


def layers_compiled(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return model


def trained_by_others(model):
    model.requires_grad_(True)
    return model


RUNS = {
    "plain": lambda model: model,
    "train mode": lambda model: model.train(),
    "checkpointing": lambda model: checkpointed(model, False, True),
    "checkpointing, frozen inputs": lambda model: checkpointed(model, False, False),
    "reentrant checkpointing": lambda model: checkpointed(model, True, True),
    "compiled layers": lambda model: layers_compiled(model, "eager"),
    "accelerate": prepared,
    "moved": lambda model: model.to("cpu", torch.float32),
    "the base is trained too": trained_by_others,
}


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.slow] * (run == "compiled layers")) for run in RUNS]
)
def test_gradients_in_a_loop_are_a_hooks(dynamo, run):
    handle = patched()
    called = RUNS[run](handle.model)
    # a second batch of another length of the same model
    for seed in (1, 2):
        close(by_ours(handle, called, seed), by_hook(handle, seed))


# compilers take their time, and test_fold.py compiles layers and model with the quickest
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_in_a_compiled_loop_are_a_hooks(dynamo, whole, backend):
    handle = patched()
    model = handle.model
    called = torch.compile(model, backend=backend, fullgraph=True) if whole else layers_compiled(model, backend)
    close(by_ours(handle, called), by_hook(handle))


def test_the_bases_gradients_are_right_where_others_train_it():
    handle, plain = patched(), tiny_model("llama")
    expected = by_hook(handle)
    hook = Hook(plain, vectors_of(handle))
    plain.requires_grad_(True)
    loss_of(plain).backward()
    handle.model.requires_grad_(True)
    close(by_ours(handle, handle.model), expected)
    for name, p in plain.named_parameters():
        got = handle.model.get_parameter(name.replace("o_proj.weight", "o_proj.inner.weight")).grad
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)
    hook.remove()


def test_vectors_frozen_by_others_are_loud():
    handle = patched()
    handle.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_of(handle.model).backward()


def test_reentrant_checkpointing_of_frozen_inputs_is_loud():
    handle = patched()
    model = checkpointed(handle.model, reentrant=True, input_grads=False)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        value = loss_of(model)
    with pytest.raises(RuntimeError, match="does not require grad"):
        value.backward()
    # where something else is trained too, torch's warning is all there is
    handle.model.lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        loss_of(model).backward()
    assert all(p.grad is None for p in handle.parameters())


def test_a_loop_under_autocast_is_no_worse_than_a_hook():
    handle = patched()
    exact = by_hook(handle)
    with torch.autocast("cpu", torch.bfloat16):
        ours, hook = by_ours(handle, handle.model), by_hook(handle)
    for key, value in exact.items():
        error, allowed = ((got[key] - value).abs().max() for got in (ours, hook))
        # or one unit in the last place of bfloat16
        assert error <= max(2 * allowed, 2**-8 * value.abs().max()), key


def trained(handle, between=None, steps=4):
    """The vectors after some steps of AdamW."""
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(handle.model, seed).backward()
        optimizer.step()
        if between is not None:
            between(handle)
    return torch.cat([p.detach().flatten() for p in handle.parameters()])


def generates(handle):
    ids = handle.model.generate(tokens()[:1, :4], max_new_tokens=3, do_sample=False)
    with handle.folded():
        folded = handle.model.generate(tokens()[:1, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, folded)


BETWEEN = {
    "generation": generates,
    "evaluation": lambda handle: handle.model.eval().train(),
    "moved": lambda handle: handle.model.to("cpu").float(),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_happens_between_steps_changes_nothing(between):
    assert torch.equal(trained(patched()), trained(patched(), BETWEEN[between]))


def test_autograds_graphs_survive_a_disabled_forward_between():
    handle = patched()
    value = loss_of(handle.model)
    with handle.disabled(), torch.no_grad():
        base = loss_of(handle.model)
    value.backward()
    assert base != value
    close({n: p.grad for n, p in handle.named_parameters()}, {k: v for k, v in by_hook(handle).items() if k != "loss"})


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "of a trusted handle": lambda model: (lf.AdapterCheckpoints(lf.handle_of(model)), copy.deepcopy(model))[1],
    "wrapped": lambda model: copy.deepcopy(nn.ModuleList([model]))[0],
    "from the decoder": lambda model: lf.handle_of(copy.deepcopy(model.model)).model,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_a_handle_of_its_own(how):
    original = patched()
    before = {name: p.detach().clone() for name, p in original.model.named_parameters()}
    model = COPIES[how](original.model)
    handle = lf.handle_of(model)
    assert handle is not original
    assert handle.model is model
    assert {id(p) for p in handle.parameters()} <= {id(p) for p in model.parameters()}
    assert torch.equal(loss_of(model), loss_of(original.model))
    # each drives its own
    with handle.disabled():
        assert torch.equal(loss_of(model), loss_of(tiny_model("llama")))
        assert not torch.equal(loss_of(original.model), loss_of(tiny_model("llama")))
    close(by_ours(handle, model), by_hook(handle))
    trained(handle)
    assert all(torch.equal(p, before[name]) for name, p in original.model.named_parameters())
    close(by_ours(handle, model), by_hook(handle))
    with pytest.warns(UserWarning, match="AdapterCheckpoints"):
        model.load_state_dict(model.state_dict())
    plain = handle.unpatch()
    assert torch.equal(loss_of(plain), loss_of(tiny_model("llama")))
    assert lf.handle_of(original.model) is original
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.load_state_dict(plain.state_dict())
    close(by_ours(original, original.model), by_hook(original))
    original.unpatch()
    assert not any(m._forward_pre_hooks or m._load_state_dict_post_hooks for m in (*plain.modules(),))


# in a model of one layer the decoder's fold hooks are on the attention itself
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("part", ["layers", "layers.0", "layers.0.self_attn", "layers.0.self_attn.o_proj"])
def test_a_copy_of_a_part_is_refused(part, layers):
    model = tiny_model("llama", num_hidden_layers=layers)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    for copied in (model.model.get_submodule(part), [model.model.get_submodule(part), model]):
        with pytest.raises(ValueError, match="cannot be copied or trained by itself"):
            copy.deepcopy(copied)
    for whole in (model, model.model, handle, [model, model.model.get_submodule(part)]):
        copied = copy.deepcopy(whole)
        twin = copied[0] if isinstance(copied, list) else copied
        twin = twin if twin.__class__ is handle.__class__ else lf.handle_of(twin)
        assert twin is not handle and twin.model is not model
        assert {id(p) for p in twin.parameters()}.isdisjoint(map(id, handle.parameters()))


def test_an_averaged_model_is_a_whole_copy():
    handle = patched()
    averaged = torch.optim.swa_utils.AveragedModel(handle.model)
    other = lf.handle_of(averaged.module)
    assert other is not handle and other.model is averaged.module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_trains_as_one_that_was_patched_later(dtype):
    handle, later = patched(), lf.patch(tiny_model("llama").to(dtype), CONFIG)
    randomize(later)
    handle.model.half() if dtype == torch.float16 else handle.model.to(dtype)
    assert [p.dtype for p in handle.parameters()] == [p.dtype for p in later.parameters()]
    got, expected = by_ours(handle, handle.model), by_ours(later, later.model)
    assert all(torch.equal(value, expected[key]) or dtype == torch.float64 for key, value in got.items())
    close(got, expected, 1e-6)


def test_replicas_of_data_parallelism_compute_the_same():
    handle = patched()
    model = handle.model
    modules = list(model.modules())
    # what torch.nn.parallel.replicate does, on one device and without a broadcast
    twins = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, p in module._parameters.items():
            setattr(twin, name, None if p is None else p * 1.0)
        twin._former_parameters = {}
    expected = by_hook(handle)
    model.zero_grad()
    value = loss_of(twins[model])
    value.backward()
    close({"loss": value.detach()} | {n: p.grad for n, p in handle.named_parameters()}, expected)
