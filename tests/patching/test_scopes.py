"""Scopes of several threads and tasks: each obeys its own, in whatever order they are entered and left."""

import asyncio
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching import entered, scopes
from lofit_fast.patching.scopes import Scopes
from tests.library_versions import compiles_hooks
from tests.oracle import randomize
from tests.patched_models import CONFIGS, logits
from tests.tiny_models import tiny_model, tokens


class Seen:
    """A patched model with what it computes in each state."""

    def __init__(self, config=CONFIGS["both"]) -> None:
        self.model = tiny_model("llama")
        with torch.no_grad():
            self.base = logits(self.model)
        self.handle = lf.patch(self.model, config)
        randomize(self.handle)
        with torch.no_grad():
            self.adapted = logits(self.model)
        assert not torch.allclose(self.base, self.adapted, atol=1e-3)

    def state(self) -> str:
        """What this thread's model is now."""
        with torch.no_grad():
            got = logits(self.model)
        # a thread may have other numbers of threads of its own
        near = {"base": self.base, "adapted": self.adapted}.items()
        return next((name for name, expected in near if torch.allclose(got, expected, atol=1e-5)), "neither")


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def other():
    """other(call): what the call returns in another thread, the same one each time."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda call, *given: pool.submit(call, *given).result(60)


def leave(scope):
    scope.__exit__(None, None, None)


def test_a_scope_is_of_the_thread_that_entered_it(seen, other):
    scope = seen.handle.disabled()
    other(scope.__enter__)
    assert seen.state() == "adapted" and other(seen.state) == "base"
    with seen.handle.disabled():
        other(leave, scope)
        assert seen.state() == "base" and other(seen.state) == "adapted"
    assert seen.state() == other(seen.state) == "adapted"


@pytest.mark.parametrize("first", ["here", "there"])
def test_overlapping_scopes_of_two_threads_leave_nothing_behind(seen, other, first):
    here, there = seen.handle.disabled(), seen.handle.disabled()
    if first == "here":
        here.__enter__()
        other(there.__enter__)
        leave(here)
        assert seen.state() == "adapted" and other(seen.state) == "base"
        other(leave, there)
    else:
        other(there.__enter__)
        here.__enter__()
        other(leave, there)
        assert seen.state() == "base" and other(seen.state) == "adapted"
        leave(here)
    assert seen.state() == other(seen.state) == "adapted"
    assert seen.handle.scopes.plain and not seen.handle.scopes.asks


def test_what_another_thread_has_folded_is_its_own(seen, other):
    scope = seen.handle.folded()
    other(scope.__enter__)
    before = other(logits, seen.model)
    with torch.no_grad():
        for vectors in seen.handle.parameters():
            # as torch does not count it: what it does is folded anew
            vectors.data.mul_(2)
        after = logits(seen.model)
    assert torch.allclose(before, seen.adapted, atol=1e-5) and not torch.allclose(after, seen.adapted, atol=1e-3)
    # scales are no part of a fold; offsets are those of before
    assert not torch.allclose(other(logits, seen.model), after, atol=1e-3)
    other(leave, scope)
    with torch.no_grad():
        assert torch.equal(logits(seen.model), after)
    assert other(torch.is_grad_enabled)


def test_scopes_of_one_thread_may_be_left_in_any_order(seen):
    def within(scope):
        with scope():
            yield

    for scopes_of in (
        (seen.handle.disabled, seen.handle.disabled),
        (seen.handle.disabled, seen.handle.scopes.disabled),
    ):
        first, second = (within(scope) for scope in scopes_of)
        next(first)
        next(second)
        first.close()
        assert seen.state() == "base"
        second.close()
        assert seen.state() == "adapted"


def test_a_scope_may_be_left_in_another_thread(seen, other):
    scope = seen.handle.disabled()
    scope.__enter__()
    assert seen.state() == "base"
    other(leave, scope)
    assert seen.state() == other(seen.state) == "adapted"
    # and a layer by itself, before the model has looked
    layer, z = seen.handle.layers[0], torch.randn(1, 3, 64)
    adapted = layer(z)
    scope = seen.handle.disabled()
    scope.__enter__()
    other(leave, scope)
    assert torch.equal(layer(z), adapted)
    assert not seen.handle.scopes.asks


def test_an_exception_in_a_thread_leaves_its_scope(seen, other):
    def fail():
        with seen.handle.disabled():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        other(fail)
    assert other(seen.state) == seen.state() == "adapted"


def test_a_thread_that_is_started_inside_begins_outside(seen):
    found = {}
    with seen.handle.disabled():
        context = contextvars.copy_context()
        for name, call in (("plain", seen.state), ("copied", lambda: context.run(seen.state))):
            thread = threading.Thread(target=lambda n=name, c=call: found.update({n: c()}))
            thread.start()
            thread.join()
    assert found == {"plain": "adapted", "copied": "base"}
    # a copy does not outlive the scope
    assert context.run(seen.state) == "adapted"


def test_a_copied_context_leaves_nothing_in_the_thread_that_ran_it(seen, other):
    layer, z = seen.handle.layers[0], torch.randn(1, 3, 64)
    with seen.handle.disabled():
        context = contextvars.copy_context()
        assert other(context.run, seen.state) == "base"
        # the model's forward is over, and the thread by itself is in no scope
        assert torch.equal(other(layer, z), other(contextvars.Context().run, layer, z))
        assert not torch.equal(other(layer, z), layer.inner(z))


def test_a_layer_by_itself_keeps_nothing_of_a_copied_context(seen, other):
    layer = next(iter(seen.handle.layers.values()))
    z = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    base = layer.inner(z)

    def off():
        with torch.no_grad():
            return torch.allclose(layer(z), base, atol=1e-5)

    def interrupted():
        hook = layer.inner.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(seen.model)
        hook.remove()

    def interrupt(*_):
        raise KeyboardInterrupt

    async def in_a_loop():
        with seen.handle.disabled():
            return other(contextvars.copy_context().run, off)

    assert asyncio.run(in_a_loop())
    assert not other(off)
    with seen.handle.disabled():
        other(contextvars.copy_context().run, interrupted)
    assert not other(off)
    assert not seen.handle.scopes.asks and other(seen.state) == "adapted"


def test_a_scope_inside_a_copied_context_is_over_with_the_scopes(seen, other):
    layer, z = seen.handle.layers[0], torch.randn(1, 3, 64)

    def job():
        with seen.handle.folded():
            return seen.state()

    with seen.handle.disabled():
        assert other(contextvars.copy_context().run, job) == "base"
        assert other(seen.state) == "adapted"
    assert other(seen.state) == "adapted"
    assert not torch.equal(other(layer, z), layer.inner(z))


def test_tasks_that_take_turns_obey_their_own_scopes(seen):
    layer, z = seen.handle.layers[0], torch.randn(1, 3, 64)
    with torch.no_grad():
        of_layer = {"base": layer.inner(z), "adapted": layer(z)}
    found = []

    def note(expected):
        with torch.no_grad():
            found.append((seen.state(), torch.equal(layer(z), of_layer[expected]), expected))

    async def in_base():
        for _ in range(3):
            with seen.handle.disabled():
                await asyncio.sleep(0)
                note("base")
                found.append((await asyncio.to_thread(seen.state), True, "base"))
            await asyncio.sleep(0)
            note("adapted")

    async def adapted():
        for _ in range(12):
            note("adapted")
            await asyncio.sleep(0)

    async def run():
        await asyncio.gather(in_base(), adapted(), in_base())

    asyncio.run(run())
    assert len(found) == 30
    assert all(state == expected and same for state, same, expected in found)
    assert seen.state() == "adapted" and not seen.handle.scopes.asks


def test_a_task_that_outlives_its_scope_is_in_it_no_more(seen):
    async def late(begun, over):
        begun.set()
        await over.wait()
        return seen.state()

    async def run():
        begun, over = asyncio.Event(), asyncio.Event()
        with seen.handle.disabled():
            task = asyncio.create_task(late(begun, over))
            await begun.wait()
        over.set()
        return await task

    assert asyncio.run(run()) == "adapted"


def test_two_handles_have_scopes_of_their_own(seen):
    twin = Seen()
    with seen.handle.disabled():
        assert (seen.state(), twin.state()) == ("base", "adapted")
        with twin.handle.disabled():
            assert twin.state() == "base"
        assert (seen.state(), twin.state()) == ("base", "adapted")


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_is_in_no_scope(seen, twin_of):
    with seen.handle.disabled(), seen.handle.folded():
        twin = twin_of(seen.model)
    other = lf.handle_of(twin)
    with torch.no_grad():
        assert torch.equal(logits(twin), seen.adapted)
        with other.disabled():
            assert torch.equal(logits(twin), seen.base) and seen.state() == "adapted"
    hooks = len(seen.model.model._forward_pre_hooks)
    other.unpatch()
    assert not twin.model._forward_pre_hooks and len(seen.model.model._forward_pre_hooks) == hooks


def test_a_replica_has_what_held_where_it_was_made(seen, other):
    layer, z = seen.handle.layers[0], torch.randn(1, 3, 64)

    def replicated():
        replica = layer._replicate_for_data_parallel()
        for name, module in layer._modules.items():
            replica._modules[name] = module
        for name, vectors in layer._parameters.items():
            setattr(replica, name, vectors)
        replica._buffers = dict(layer._buffers)
        return replica

    with torch.no_grad():
        with seen.handle.disabled():
            assert torch.equal(other(replicated(), z), layer.inner(z))
        with seen.handle.folded():
            inside = replicated()
        assert torch.equal(inside(z), layer(z))


def test_what_would_change_the_answers_of_another_thread_is_refused(seen, other, tmp_path):
    handle = seen.handle
    handle.save(tmp_path)
    scope = handle.folded()
    other(scope.__enter__)
    for action in (handle.unpatch, handle.merge):
        with pytest.raises(ValueError, match="another thread or task is inside"):
            action()
    with pytest.raises(ValueError, match="of this thread or another, which computes with the old ones"):
        handle.take(handle.adapter())
    handle.save(tmp_path)
    assert seen.state() == "adapted"
    other(leave, scope)
    handle.take(handle.adapter())
    # a thread's own scope is its own matter
    with handle.disabled():
        handle.unpatch()
    assert seen.state() == "base"


def by_inputs(seen, *, checkpoint=None, forward=nullcontext, backward=nullcontext, run=lambda call: call()):
    """Gradients of the inputs' embeddings, with scopes around the two passes; run: the backward pass in a thread."""
    model = seen.model
    model.train()
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    inputs = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    with forward():
        out = model(inputs_embeds=inputs, use_cache=False).logits.square().mean()
    with backward():
        run(out.backward)
    return inputs.grad


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_runs_again_in_the_scope_of_its_forward(reentrant, elsewhere, other):
    run = other if elsewhere else lambda call: call()
    seen = Seen()
    disabled = seen.handle.disabled
    base, adapted = by_inputs(seen, forward=disabled), by_inputs(seen)
    assert not torch.equal(base, adapted)
    # left before the backward pass, and entered before it
    assert torch.equal(by_inputs(seen, checkpoint=reentrant, forward=disabled, run=run), base)
    assert torch.equal(by_inputs(seen, checkpoint=reentrant, backward=disabled, run=run), adapted)
    assert torch.equal(by_inputs(seen, checkpoint=reentrant, forward=disabled, backward=disabled, run=run), base)
    assert seen.handle.scopes.plain
    layers = seen.model.model.layers
    seen.handle.unpatch()
    assert all(type(layer._gradient_checkpointing_func).__name__ == "partial" for layer in layers)


def test_two_threads_that_train_have_graphs_of_their_own(other):
    seen = Seen()
    parameters, ids = list(seen.handle.parameters()), tokens(seed=5)
    held, go = threading.Event(), threading.Event()

    def gradients():
        return torch.autograd.grad(seen.model(input_ids=ids, labels=ids).loss, parameters)

    expected = gradients()
    here = threading.get_ident()

    def wait(*_):
        if threading.get_ident() != here:
            held.set()
            assert go.wait(30)

    hook = seen.model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        theirs = pool.submit(gradients)
        assert held.wait(30)
        # a whole step while the other thread is in the midst of its forward
        ours = gradients()
        with torch.no_grad():
            logits(seen.model)
        go.set()
        theirs = theirs.result(30)
    hook.remove()
    for got in (ours, theirs):
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_layers_obey_the_scopes_of_their_thread(dynamo, other):
    seen = Seen(lf.LofitConfig(offset="all"))
    # tracing is what is tested: the projections are as good as all, and nothing is lowered
    for layer in seen.handle.layers.values():
        layer.compile(backend="eager", fullgraph=True)

    def states():
        with torch.no_grad():
            found = [logits(seen.model)]
            with seen.handle.disabled():
                found.append(logits(seen.model))
            with seen.handle.folded():
                found.append(logits(seen.model))
        return found

    for found in (states(), other(states)):
        for got, expected in zip(found, (seen.adapted, seen.base, seen.adapted), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
    # one for each state, whatever the layer
    assert graphs() == 3
    states()
    other(states)
    # another thread, and the same scope again, are no reason to compile again
    assert graphs() == 3
    scope = seen.handle.disabled()
    other(scope.__enter__)
    assert seen.state() == "adapted" and other(seen.state) == "base"
    other(leave, scope)
    assert graphs() == 3


@pytest.mark.slow
@compiles_hooks
def test_a_model_compiled_whole_obeys_the_scopes_of_its_thread(dynamo, other):
    seen = Seen(lf.LofitConfig(offset="all"))
    run = torch.compile(seen.model, backend="eager", fullgraph=True)

    def states():
        with torch.no_grad():
            found = [run(tokens(), use_cache=False).logits]
            with seen.handle.disabled():
                found.append(run(tokens(), use_cache=False).logits)
        return found

    for found in (states(), other(states), states()):
        assert torch.allclose(found[0], seen.adapted, atol=1e-5) and torch.allclose(found[1], seen.base, atol=1e-5)
    assert graphs() == 2


def test_outside_of_scopes_no_context_variable_is_asked(seen, monkeypatch):
    class Never:
        def get(self):
            raise AssertionError("asked")

    monkeypatch.setattr(entered, "_ENTERED", Never())
    assert logits(seen.model).shape == seen.adapted.shape


def test_a_generator_that_is_collected_while_a_scope_is_entered_leaves_its_own(monkeypatch):
    scope = Scopes()

    def paused():
        with scope.disabled():
            yield

    def enter():
        one = paused()
        next(one)
        # the collector runs at any moment, also while the lock is held, as it is here
        monkeypatch.setattr(scopes, "_in_a_loop", lambda: bool(one.close()))
        with scope.disabled():
            found.append(scope.off)
        found.append(scope.plain)

    found = []
    # it would wait for itself for ever
    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [True, True]


def test_scopes_of_nobody_are_plain():
    alone = Scopes()
    with alone.disabled():
        assert alone.off and not alone.plain
    assert alone.plain and not alone.folding()


# stands in for transformers' loop, which computes in a thread of its own
BATCHING = "transformers.generation.continuous_batching.model_runner"


def generated_elsewhere(model, name=BATCHING):
    """Logits, or what was raised, of a forward that code of a module of this name runs in another thread."""
    space = {"__name__": name}
    exec("def step(model, ids):\n    return model(ids).logits", space)

    def work():
        try:
            with torch.no_grad():
                return space["step"](model, tokens())
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("scope", ["disabled", "active"])
def test_generating_in_a_thread_of_transformers_refuses_the_scopes_of_others(seen, scope, tmp_path):
    expected = generated_elsewhere(seen.model)
    with ExitStack() as stack:
        if scope == "disabled":
            stack.enter_context(seen.handle.disabled())
        else:
            seen.handle.set_active(None)
            stack.callback(seen.handle.set_active, seen.handle.own_name)
        assert "generate_batch computes in a thread of its own" in generated_elsewhere(seen.model)
        # a thread of the user's own is in no scope, as ever, and one's own forward is in one's own
        assert torch.equal(generated_elsewhere(seen.model, "serving"), expected)
        assert seen.state() == "base"
    assert torch.equal(generated_elsewhere(seen.model), expected)
    # folds are the same numbers
    with seen.handle.folded():
        assert torch.equal(generated_elsewhere(seen.model), expected)
