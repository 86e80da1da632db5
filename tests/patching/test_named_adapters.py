"""Several adapters on one model: added, switched, saved, merged and removed; each row of a batch with its own."""

import asyncio
import threading

import pytest
import torch
from torch import Tensor

import lofit_fast as lf
from lofit_fast.patching.scopes import Scopes
from tests.accuracy_rule import check
from tests.oracle import Hook, randomize, vectors_of
from tests.patched_models import SOME, relative, snapshot
from tests.tiny_models import tiny_model, tokens

HEADS = {"default": [(1, 0), (1, 3)], "a": SOME, "b": [(0, 0), (2, 1)], "c": "all"}


class Shared:
    """A model with four adapters on it, and what each computes by itself, hooked by nobody of ours."""

    def __init__(self, folder, family="llama", dtype=torch.float32, saved=None, **options) -> None:
        self.folders, self.vectors = made(folder, family, dtype, **options) if saved is None else saved
        self.model = tiny_model(family, dtype)
        self.handle = lf.load(self.model, self.folders["default"])
        for name in "abc":
            self.handle.add(name, self.folders[name])

    def alone(self, name, call, dtype=torch.float32, family="llama"):
        """What the hook computes with one adapter; the base's for None."""
        model = tiny_model(family, dtype)
        if name is None:
            return call(model)
        hook = Hook(model, self.vectors[name])
        try:
            return call(model)
        finally:
            hook.remove()


def made(folder, family, dtype, **options):
    """(folders, vectors) of the adapters, by name."""
    folders, vectors = {}, {}
    for number, (name, heads) in enumerate(HEADS.items()):
        handle = lf.patch(tiny_model(family, dtype), lf.LofitConfig(offset=heads, **options))
        randomize(handle, seed=number)
        vectors[name], folders[name] = vectors_of(handle), handle.save(folder / name)
    return folders, vectors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return made(tmp_path_factory.mktemp("adapters"), "llama", torch.float32)


@pytest.fixture
def shared(tmp_path, saved):
    return Shared(tmp_path, saved=saved)


def logits(model, ids) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_each_adapter_is_what_it_is_by_itself(shared, tmp_path):
    handle, ids = shared.handle, tokens()
    assert handle.adapters == ("default", "a", "b", "c") and handle.active == "default"
    for name in ("a", None, "c", "b", "default"):
        handle.set_active(name)
        assert handle.active == name
        assert relative(logits(shared.model, ids), shared.alone(name, lambda m: logits(m, ids))) < 1e-5
        if name is not None:
            # the file is the one that it was read from
            again = handle.save(tmp_path / "again", name=None)
            assert (again / "adapter_model.safetensors").read_bytes() == (
                shared.folders[name] / "adapter_model.safetensors"
            ).read_bytes()
            single = lf.load(tiny_model("llama"), again).model
            assert torch.equal(logits(shared.model, ids), logits(single, ids))


ROWS = ["a", "b", None, "a", "default", "c"]


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "qwen2"))])
def test_rows_are_equal_one_by_one(tmp_path, family):
    shared = Shared(tmp_path, family)
    ids = tokens(len(ROWS))
    with shared.handle.rows(ROWS):
        got = logits(shared.model, ids)
    for row, name in enumerate(ROWS):
        expected = shared.alone(name, lambda m, row=row: logits(m, ids[row : row + 1]), family=family)
        assert relative(got[row : row + 1], expected) < 1e-5
    # and nothing is left of it
    assert relative(logits(shared.model, ids), shared.alone("default", lambda m: logits(m, ids), family=family)) < 1e-5
    assert shared.handle.scopes.plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_rows_in_16_bits_are_as_exact_as_a_hook(tmp_path, dtype):
    shared = Shared(tmp_path, dtype=dtype)
    layer, z = shared.handle.layers[1], torch.randn(len(ROWS), 5, 64).to(dtype)
    with shared.handle.rows(ROWS), torch.no_grad():
        got = layer(z)
    for row, name in enumerate(ROWS):
        v = torch.zeros(4, 16)
        if name is not None and (1, "offset") in shared.vectors[name]:
            heads, rows = shared.vectors[name][1, "offset"]
            v[heads] = rows
        exact = torch.nn.functional.linear(z[row].double() + v.flatten().double(), layer.weight.double())
        check(got[row], exact, torch.nn.functional.linear(z[row] + v.flatten().to(dtype), layer.weight))


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_generation_with_rows_is_that_of_each_prompt(shared, side):
    model, handle = shared.model, shared.handle
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    lengths = [4, 7, 9, 5, 9, 6]
    ids, mask = torch.zeros(6, 9, dtype=torch.long), torch.zeros(6, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, at], mask[row, at] = tokens(6, 9)[row, :length], 1
    if side == "right":
        # prompts that end with padding go on from it: what is compared is a forward of them
        with handle.rows(ROWS), torch.no_grad():
            got = model(ids, attention_mask=mask, use_cache=False).logits
        for row, name in enumerate(ROWS):
            alone = shared.alone(name, lambda m, row=row: logits(m, ids[row : row + 1, : lengths[row]]))
            assert relative(got[row, : lengths[row]], alone[0]) < 1e-5
        return
    with handle.rows(ROWS):
        got = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    for row, name in enumerate(ROWS):
        prompt = ids[row : row + 1, 9 - lengths[row] :]
        assert torch.equal(
            got[row], shared.alone(name, lambda m, p=prompt: m.generate(p, **options))[0, lengths[row] :]
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        pytest.param({"num_beams": 2}, marks=pytest.mark.slow),
        pytest.param({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, marks=pytest.mark.slow),
    ],
)
def test_beams_and_returned_sequences_have_their_prompts_adapter(shared, options):
    ids, names = tokens(2, 6), ["a", None]
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, **options}
    per = options.get("num_return_sequences", 1)
    with shared.handle.rows(names):
        got = shared.model.generate(ids, **options).view(2, per, -1)
    for row, name in enumerate(names):
        alone = shared.alone(name, lambda m, row=row: m.generate(ids[row : row + 1], **options))
        assert torch.equal(got[row], alone)
    # two names for one prompt are not its beams'
    with shared.handle.rows(["a", "b"]), pytest.raises(ValueError, match="names the adapters of 2 rows"):
        shared.model.generate(ids[:1], num_beams=2, max_new_tokens=2, pad_token_id=0)
    # a batch that has grown outside of generate is nobody's
    with shared.handle.rows(names), pytest.raises(ValueError, match="names the adapters of 2 rows"):
        logits(shared.model, tokens(4, 6))


def test_gradients_reach_each_adapter_from_its_own_rows(shared, tmp_path):
    handle, ids = shared.handle, tokens(4)
    handle.add("t", shared.folders["a"], trained=True)
    handle.add("new", lf.LofitConfig(offset=[(2, 0)], seed=3))
    trained = {name: list(handle.parameters(name)) for name in ("default", "t", "new")}
    assert list(handle.parameters("b")) == [] and all(trained.values())
    with handle.rows(["t", "default", "b", "t"]):
        out = shared.model(ids, use_cache=False).logits.square().sum(dim=(1, 2))
        out.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in trained["new"])
    for name, rows in (("t", [0, 3]), ("default", [1])):
        single = tiny_model("llama")
        alone = lf.load(single, shared.folders["a" if name == "t" else name])
        single(ids[rows], use_cache=False).logits.square().sum().backward()
        for got, expected in zip(trained[name], alone.parameters(), strict=True):
            assert relative(got.grad, expected.grad) < 1e-4
    # what a step changes is there in the next forward, with gradients and without
    with torch.no_grad():
        for p in trained["t"]:
            p.add_(0.1)
        handle.set_active("t")
        now = logits(shared.model, ids)
        saved = handle.save(tmp_path / "t")
    assert relative(now, logits(lf.load(tiny_model("llama"), saved).model, ids)) < 1e-5
    assert relative(now, shared.alone("a", lambda m: logits(m, ids))) > 1e-3


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_layers_run_again_with_their_rows(shared, reentrant):
    handle, ids, names = shared.handle, tokens(3), ["default", None, "b"]

    def gradients():
        inputs = shared.model.get_input_embeddings()(ids).detach().requires_grad_()
        with handle.rows(names):
            out = shared.model(inputs_embeds=inputs, use_cache=False).logits.square().mean()
        # the scope has been left, and another is around
        with handle.disabled():
            out.backward()
        grads = [inputs.grad, *(p.grad.clone() for p in handle.parameters())]
        for p in handle.parameters():
            p.grad = None
        return grads

    expected = gradients()
    shared.model.train()
    shared.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(torch.equal(got, e) for got, e in zip(gradients(), expected, strict=True))


def test_a_cast_or_other_weights_fold_the_tables_anew(shared):
    ids = tokens()
    shared.handle.set_active("a")
    shared.model.double()
    assert relative(logits(shared.model, ids), shared.alone("a", lambda m: logits(m.double(), ids))) < 1e-10
    shared.model.float()
    other = tiny_model("llama", seed=5)
    with pytest.warns(UserWarning):
        shared.model.load_state_dict(other.state_dict())
    hook = Hook(other, shared.vectors["a"])
    assert relative(logits(shared.model, ids), logits(other, ids)) < 1e-5
    hook.remove()


def test_a_base_that_is_hooked_is_called_with_each_rows_vectors(shared):
    ids, seen = tokens(len(ROWS)), []
    hook = shared.handle.layers[1].inner.register_forward_hook(lambda m, a, y: seen.append(1))
    with shared.handle.rows(ROWS):
        got = logits(shared.model, ids)
    hook.remove()
    assert seen == [1]
    for row, name in enumerate(ROWS):
        expected = shared.alone(name, lambda m, row=row: logits(m, ids[row : row + 1]))
        assert relative(got[row : row + 1], expected) < 1e-5


def test_the_active_adapter_is_merged_and_the_model_is_as_it_was_otherwise(shared, tmp_path):
    ids = tokens()
    shared.handle.set_active("b")
    with pytest.raises(ValueError, match="export while 'b' is active"):
        lf.export(shared.handle, tmp_path / "exported")
    merged = shared.handle.merge()
    assert relative(logits(merged, ids), shared.alone("b", lambda m: logits(m, ids))) < 1e-5
    assert lf.handle_of(merged) is None


def test_unpatching_takes_all_of_them_out(tmp_path):
    model = tiny_model("llama")
    before = snapshot(model)
    handle = lf.patch(model, lf.LofitConfig(offset=[(1, 0)]), name="mine")
    handle.add("all", lf.LofitConfig(offset="all"))
    handle.set_active("all")
    handle.unpatch()
    assert snapshot(model) == before
    again = lf.patch(model, lf.LofitConfig(offset=[(1, 0)]))
    assert again.active == "default"


def test_folded_and_disabled_go_with_rows(shared):
    handle, model, ids = shared.handle, shared.model, tokens(3)
    with handle.rows(["a", None, "default"]), torch.no_grad():
        rows = logits(model, ids)
        with handle.disabled():
            assert torch.equal(logits(model, ids), shared.alone(None, lambda m: logits(m, ids)))
        with handle.folded():
            assert torch.allclose(logits(model, ids), rows, atol=1e-6)
        handle.set_active("b")
        assert torch.equal(logits(model, ids), rows)
        with handle.rows(["c"] * 3):
            inner = logits(model, ids)
        assert torch.equal(logits(model, ids), rows)
    assert relative(inner, shared.alone("c", lambda m: logits(m, ids))) < 1e-5
    assert relative(logits(model, ids), shared.alone("b", lambda m: logits(m, ids))) < 1e-5
    with handle.disabled():
        assert torch.equal(logits(model, ids), shared.alone(None, lambda m: logits(m, ids)))


def test_threads_have_active_adapters_of_their_own(shared):
    handle, found = shared.handle, {}
    handle.set_active("c")
    held, go = threading.Event(), threading.Event()

    def work():
        torch.set_num_threads(1)
        found["begins"] = handle.active
        handle.set_active("a")
        found["logits"] = logits(shared.model, tokens())
        held.set()
        go.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(30)
    assert handle.active == "c"
    assert relative(logits(shared.model, tokens()), shared.alone("c", lambda m: logits(m, tokens()))) < 1e-5
    with pytest.raises(ValueError, match="'a': it is active, or in a scope"):
        handle.remove("a")
    go.set()
    thread.join()
    assert found["begins"] == "default"
    assert relative(found["logits"], shared.alone("a", lambda m: logits(m, tokens()))) < 1e-5
    # a thread that has ended is in nobody's way
    handle.remove("a")
    assert handle.adapters == ("default", "b", "c")
    handle.add("d", shared.folders["a"])
    handle.set_active("d")
    assert relative(logits(shared.model, tokens()), shared.alone("a", lambda m: logits(m, tokens()))) < 1e-5


def test_tasks_have_active_adapters_and_rows_of_their_own(shared):
    handle, ids = shared.handle, tokens(2)
    layer, z = handle.layers[1], torch.randn(2, 3, 64)
    expected = {}
    for name in ("a", "c"):
        handle.set_active(name)
        expected[name] = logits(shared.model, ids), layer(z)
    handle.set_active("default")

    async def work(name):
        found = []
        handle.set_active(name)
        for _ in range(3):
            await asyncio.sleep(0)
            found += [(logits(shared.model, ids), layer(z))]
            with handle.rows([name, name]):
                await asyncio.sleep(0)
                assert torch.allclose(layer(z), expected[name][1], atol=1e-5)
        return found

    async def both():
        return await asyncio.gather(work("a"), work("c"))

    for name, found in zip("ac", asyncio.run(both()), strict=True):
        for got in found:
            assert all(torch.equal(a, b) for a, b in zip(got, expected[name], strict=True))
    assert handle.active == "default" and handle.scopes.plain


def test_what_is_chosen_in_inference_mode_is_trained_with_afterwards(shared):
    handle, ids = shared.handle, tokens(2)
    with torch.inference_mode():
        handle.set_active("b")
        handle.add("late", shared.folders["a"], trained=True)
        shared.model(ids, use_cache=False)
    with handle.rows(["late", "b"]):
        shared.model(ids, use_cache=False).logits.sum().backward()
    assert all(p.grad.any() for p in handle.parameters("late"))
    inputs = shared.model.get_input_embeddings()(ids).detach().requires_grad_()
    shared.model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    assert inputs.grad.any()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# a tiny one is in tests/benchmarks/speed/test_many_adapters.py
@pytest.mark.slow
def test_switching_compiles_nothing(shared, dynamo):
    handle, z = shared.handle, torch.randn(3, 5, 64)
    layer = handle.layers[1]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    def everything(other):
        for name in ("a", other, "default", None):
            handle.set_active(name)
            with torch.no_grad():
                assert torch.allclose(compiled(z), layer(z), atol=1e-6)
        for names in (["a", other, None], ["default", other, "a"]):
            with handle.rows(names), torch.no_grad():
                assert torch.allclose(compiled(z), layer(z), atol=1e-6)

    everything("b")
    first = graphs()
    everything("c")
    everything("b")
    # of one adapter, of the handle's own, of the base, of rows without and with what is folded anew
    assert graphs() == first == 5


def test_switching_folds_nothing(shared, monkeypatch):
    handle = shared.handle

    def never(*_, **__):
        raise AssertionError("folded")

    monkeypatch.setattr("lofit_fast.patching.offset_table.fold_offset", never)
    for name in ("a", "b", "c", None):
        handle.set_active(name)
        logits(shared.model, tokens())
    with handle.rows(["a", "b"]):
        logits(shared.model, tokens())


def test_answer_adapters_act_on_each_rows_answer(tmp_path):
    shared = Shared(tmp_path, positions="answer")
    handle, ids, names = shared.handle, tokens(3, 8), ["a", None, "c"]
    labels = ids.clone()
    for row, begins in enumerate((3, 5, 6)):
        labels[row, :begins] = -100
    with handle.rows(names), torch.no_grad():
        got = shared.model(ids, labels=labels, use_cache=False).logits
    for row, name in enumerate(names):
        handle.set_active(name)
        with torch.no_grad():
            alone = shared.model(ids[row : row + 1], labels=labels[row : row + 1], use_cache=False).logits
        assert relative(got[row : row + 1], alone) < 1e-5
        begins = (3, 5, 6)[row] - 1
        base = shared.alone(None, lambda m, row=row: logits(m, ids[row : row + 1]))
        assert torch.allclose(got[row, :begins], base[0, :begins], atol=1e-5)
    # the handle's own, which has no vectors in some of the layers that the others have
    single = lf.load(tiny_model("llama"), shared.folders["default"])
    assert set(handle.layers) > set(single.layers)
    handle.set_active("default")
    given = {"labels": labels, "use_cache": False}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert relative(shared.model(ids, **given).logits, single.model(ids, **given).logits) < 1e-5
    handle.set_active(None)
    # the base asks nobody where answers begin
    logits(shared.model, ids)
    with pytest.raises(ValueError, match="positions='all', expected those of the handle, 'answer'"):
        handle.add("all", lf.LofitConfig(offset=[(0, 0)]))


def test_what_cannot_be_is_refused_before_anything_is_changed(shared, tmp_path):
    handle, model = shared.handle, shared.model
    before = snapshot(model)
    other = tiny_model("llama", num_hidden_layers=2)
    wrong = lf.patch(other, lf.LofitConfig(offset=[(0, 0)])).save(tmp_path / "wrong")
    scaled = lf.patch(tiny_model("llama"), lf.LofitConfig(scale=[(0, 0)])).save(tmp_path / "scaled")
    for error, message, call in (
        (ValueError, r"there is an adapter 'a' already", lambda: handle.add("a", shared.folders["a"])),
        (ValueError, r"there is an adapter 'default' already", lambda: handle.add("default", shared.folders["a"])),
        (TypeError, r"expected the name of an adapter, got 3", lambda: handle.add(3, shared.folders["a"])),
        (ValueError, r"the adapter is for another model", lambda: handle.add("w", wrong)),
        (ValueError, r"it has scales, and scales are one adapter at a time", lambda: handle.add("s", scaled)),
        (ValueError, r"heads the model does not have", lambda: handle.add("h", lf.LofitConfig(offset=[(9, 0)]))),
        (FileNotFoundError, r"no adapter folder", lambda: handle.add("f", tmp_path / "nowhere")),
        (ValueError, r"there is no adapter 'x', expected one of \['default', 'a'", lambda: handle.set_active("x")),
        (ValueError, r"there is no adapter 'x'", lambda: handle.rows(["a", "x"]).__enter__()),
        (ValueError, r"got no names", lambda: handle.rows([]).__enter__()),
        (TypeError, r"expected a list of names", lambda: handle.rows("ab").__enter__()),
        (ValueError, r"there is no adapter 'x'", lambda: handle.remove("x")),
        (ValueError, r"the handle's own adapter", lambda: handle.remove("default")),
        (ValueError, r"there is no adapter 'x'", lambda: handle.save(tmp_path / "x", name="x")),
        (TypeError, r"expected the name of an adapter", lambda: lf.patch(tiny_model("llama"), handle.config, name="")),
    ):
        with pytest.raises(error, match=message):
            call()
    assert snapshot(model) == before and handle.scopes.plain
    with handle.rows(["a", "b"]):
        with pytest.raises(ValueError, match=r"names the adapters of 2 rows.*packed into one row"):
            logits(model, tokens(1, 6))
        with pytest.raises(ValueError, match="in a scope of handle.rows"):
            handle.remove("b")
    handle.set_active("a")
    with pytest.raises(ValueError, match="load vectors while 'a' is active"):
        handle.take(handle.adapter("default"))
    handle.set_active(None)
    for call in (lambda: handle.save(tmp_path / "base"), handle.merge):
        with pytest.raises(ValueError, match="the base"):
            call()
    handle.set_active("default")
    handle.unpatch()
    with pytest.raises(ValueError, match="has ended"):
        handle.set_active("a")


def test_scales_stay_one_at_a_time_and_say_so(shared):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale=[(0, 1)], offset=SOME))
    randomize(handle)
    with pytest.raises(ValueError, match="the handle's own adapter has scales, and scales are one adapter at a time"):
        handle.add("a", shared.folders["a"])
    with pytest.raises(ValueError, match="scales are one adapter at a time"), handle.rows([None, "default"]):
        pass
    # but the base is there to switch to
    handle.set_active(None)
    assert torch.equal(logits(handle.model, tokens()), shared.alone(None, lambda m: logits(m, tokens())))


def test_in_scopes_of_nobody_nothing_is_chosen():
    scopes = Scopes()
    assert scopes.for_good() is None and scopes.choices() == []
