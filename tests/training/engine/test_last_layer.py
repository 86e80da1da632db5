"""The last layer's MLP on the rows that are read: the same logits and gradients, fewer rows, and no trace."""

import pytest
import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.table import COMPARED
from lofit_fast.data.collate import KEPT_ROWS
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.training import CompletionCollator
from lofit_fast.training.engine import Engine, compiled_layers, prepared
from lofit_fast.training.engine.last_layer import narrowed
from tests.crossing_threads import crossed_by
from tests.library_versions import BY_ROW, called
from tests.oracle import randomize
from tests.tiny_models import HIDDEN, LAYERS, tiny_model, tokens

# (tokens, labelled tokens) of each row
SHAPES = ((11, 3), (5, 1), (9, 4))
KEPT = sum(labelled for _, labelled in SHAPES)
WHOLE = 3 * 11


def batch(shapes=SHAPES, packed=False):
    rows = []
    for seed, (length, labelled) in enumerate(shapes):
        ids = tokens(1, length, seed)[0].tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length - labelled) + ids[-labelled:]})
    return CompletionCollator(0, packed=packed, pad_to_multiple_of=1, logits=BY_ROW)(rows)


def patched(family="llama", dtype=torch.float64, **config):
    model = tiny_model(family, dtype)
    randomize(lf.patch(model, lf.LofitConfig(**(config or {"scale": "all", "offset": "all"}))))
    return model


def results(model, inputs, parameters=None, **options):
    """Logits of the kept rows, and gradients of a loss in their own dtype: transformers computes its own in float32."""
    given = {k: v for k, v in inputs.items() if "labels" not in k}
    logits = called(model, given, **options).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), inputs["shift_labels"])
    parameters = list(lf.handle_of(model).parameters()) if parameters is None else parameters
    return logits.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same(got, expected, tolerance=1e-12):
    assert (got[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected[1])
    for gradient, wanted in zip(got[1], expected[1], strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            assert (gradient - wanted).abs().max() <= tolerance * wanted.abs().max()


def unmarked(inputs):
    """A batch that asks for all logits."""
    asks = (KEPT_ROWS, "logits_to_keep")
    return {key: value for key, value in inputs.items() if "label" not in key and key not in asks}


def rows_seen(model):
    """The rows that the linears of each layer's MLP are given, per call, as a list that grows."""
    seen = [[] for _ in range(LAYERS)]
    for layer, calls in zip(decoder_layers(model), seen, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, c=calls: c.append(args[0].shape[:-1].numel()))
    return seen


def belongings(model):
    """The objects a model is made of, down to its modules' own attributes, and how many hooks hang on each."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    kinds += ("_forward_hooks_always_called",)
    return [
        ({key: id(value) for key, value in vars(m).items()}, [list(getattr(m, kind)) for kind in kinds])
        for m in model.modules()
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_narrow_changes_neither_logits_nor_gradients(family, packed):
    model, inputs = patched(family), batch(packed=packed)
    expected = results(model, inputs)
    seen = rows_seen(model)
    with narrowed(model):
        got = results(model, inputs)
    whole = sum(length for length, _ in SHAPES) if packed else WHOLE
    assert seen == [[whole]] * (LAYERS - 1) + [[KEPT]]
    assert_same(got, expected)


def test_narrow_backward_has_the_same_rows(llama):
    randomize(lf.patch(llama, lf.LofitConfig(scale="all")))
    seen = []
    llama.model.layers[-1].mlp.down_proj.register_full_backward_hook(lambda _, __, grad: seen.append(grad[0].shape))
    with narrowed(llama):
        results(llama, batch())
    assert seen == [(KEPT, HIDDEN)]


FULL = {
    "no mask": {"logits_to_keep": 0},
    "positions": {"logits_to_keep": torch.tensor([3, 4])},
    "positions of each row": {"logits_to_keep": torch.arange(6).view(3, 2)},
    "hidden states": {"output_hidden_states": True},
    "cache": {"use_cache": True},
}


@pytest.mark.parametrize("case", FULL)
def test_narrow_runs_in_full_where_more_is_read(case, llama):
    inputs = {**batch(), **FULL[case]}
    # one way to ask for rows
    other = KEPT_ROWS if "logits_to_keep" in FULL[case] else None
    inputs = {key: value for key, value in inputs.items() if "labels" not in key and key != other}
    expected = called(llama, inputs)
    seen = rows_seen(llama)
    with narrowed(llama):
        got = called(llama, inputs)
    assert seen[-1] == [WHOLE]
    assert got.logits.equal(expected.logits)
    for mine, theirs in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        assert mine.equal(theirs)


def test_narrow_runs_in_full_where_the_config_asks_for_hidden_states(llama):
    llama.config.output_hidden_states = True
    seen = rows_seen(llama)
    with narrowed(llama):
        assert called(llama, batch()).hidden_states is not None
    assert seen[-1] == [WHOLE]


def test_narrow_is_for_one_forward_pass(llama):
    inputs = batch()
    seen = rows_seen(llama)
    with narrowed(llama):
        called(llama, inputs)
        # without the head, with a failure on the way, and to generate
        llama.model(inputs["input_ids"], use_cache=False)
        hook = llama.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            called(llama, inputs)
        hook.remove()
        llama.model(inputs["input_ids"], use_cache=False)
        llama.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False)
    assert seen[-1] == [KEPT, WHOLE, KEPT, WHOLE, WHOLE, 3]


@pytest.mark.parametrize("labelled", [1, 11])
def test_narrow_at_the_ends(labelled):
    # one kept row, and nearly all of them
    model, inputs = patched(), batch(((11, labelled),))
    expected = results(model, inputs)
    with narrowed(model):
        assert_same(results(model, inputs), expected)


def test_narrow_leaves_no_trace(family):
    model = patched(family)
    mlp = decoder_layers(model)[-1].mlp
    mine = mlp.register_forward_hook(lambda *_: None)
    before, keys = belongings(model), list(model.state_dict())
    with pytest.raises(KeyError), narrowed(model):
        assert belongings(model) != before
        # whoever saves or trains by name meets the model's own
        assert list(model.state_dict()) == keys and decoder_layers(model)[-1].mlp is mlp
        raise KeyError
    assert belongings(model) == before
    mine.remove()


def test_narrow_shows_whole_batches_to_who_listens_to_the_mlp(llama):
    mlp, seen = llama.model.layers[-1].mlp, []
    mlp.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    with narrowed(llama):
        called(llama, batch())
    assert seen == [(3, 11, HIDDEN)] * 2


def test_narrow_is_a_knob_of_the_engine(llama):
    seen = rows_seen(llama)
    for engine in (Engine(narrow=True), Engine(narrow=False)):
        with prepared(llama, engine):
            called(llama, batch())
    assert seen[-1] == [KEPT, WHOLE]


class MixedMLP(nn.Module):
    """Experts in one tensor, by what would be a plain MLP's name."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, HIDDEN, HIDDEN))

    def forward(self, x):
        return x @ self.experts[0]


class Mixture(nn.Linear):
    """No MLP by its name."""


class PlainMLP(nn.Linear):
    """One."""


def dropping():
    """An MLP with dropout as a function."""
    mlp = PlainMLP(HIDDEN, HIDDEN)
    mlp.residual_dropout = 0.1
    return mlp


def with_dropout():
    """An MLP with dropout as a module."""
    mlp = PlainMLP(HIDDEN, HIDDEN)
    mlp.dropout = nn.Dropout(0.1)
    return mlp


OTHERS = {
    "experts": MixedMLP,
    "another name": lambda: Mixture(HIDDEN, HIDDEN),
    "dropout": with_dropout,
    "dropout as a function": dropping,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_narrow_leaves_other_feed_forwards_alone(kind, llama):
    llama.model.layers[-1].mlp = OTHERS[kind]()
    before = belongings(llama)
    with narrowed(llama):
        assert belongings(llama) == before


def test_narrow_takes_the_plain_ones(llama):
    # the control of the test above
    llama.model.layers[-1].mlp = PlainMLP(HIDDEN, HIDDEN)
    before = belongings(llama)
    with narrowed(llama):
        assert belongings(llama) != before


def test_narrow_leaves_models_alone_that_know_no_mask(llama):
    class Deaf(type(llama)):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            return super().forward(input_ids, attention_mask)

    llama.__class__ = Deaf
    before = belongings(llama)
    with narrowed(llama):
        assert belongings(llama) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_narrow_under_checkpointing_of_two_forwards(reentrant):
    model = patched().train()
    batches = [batch(), batch(((7, 2), (8, 5)))]
    expected = [results(model, inputs)[1] for inputs in batches]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with narrowed(model):
        losses = []
        for inputs in batches:
            # the layers' second runs come when both batches are gone
            logits = called(model, {k: v for k, v in inputs.items() if "labels" not in k}).logits
            losses.append(nn.functional.cross_entropy(logits.flatten(0, -2), inputs["shift_labels"]))
        sum(losses).backward()
    for parameter, wanted in zip(lf.handle_of(model).parameters(), zip(*expected, strict=True), strict=True):
        assert (parameter.grad - sum(wanted)).abs().max() <= 1e-12 * sum(wanted).abs().max()


def test_narrow_comes_back_after_checkpointing(llama):
    seen = rows_seen(llama.train())
    llama.gradient_checkpointing_enable()
    with narrowed(llama), torch.no_grad():
        called(llama, batch())
        # it is off in eval mode, and then taken off
        called(llama.eval(), batch())
        llama.gradient_checkpointing_disable()
        called(llama.train(), batch())
    assert seen[-1] == [WHOLE, KEPT, KEPT]


TRAINED = [name for name, peer in COMPARED.items() if peer.kind == "trained"]


@pytest.mark.parametrize("name", TRAINED)
def test_narrow_with_peers(name):
    if name == "lora":
        pytest.importorskip("peft")
    model, inputs = tiny_model("llama", torch.float64), batch()
    options = {"targets": "all-linear"} if name == "lora" else {}
    attachment = COMPARED[name].make(model, seed=0, **options)
    parameters = list(attachment.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    # one that draws, draws the same
    with torch.random.fork_rng():
        expected = results(model, inputs, parameters)
    seen = []
    model.model.layers[-1].mlp.act_fn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    with prepared(model, Engine(narrow=True)), torch.random.fork_rng():
        assert_same(results(model, inputs, parameters), expected)
    assert seen == [KEPT]


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("plain_first", [True, False])
def test_rows_are_those_of_the_thread_that_asks_for_them(plain_first, stays):
    model, inputs = patched(), batch()
    plain = unmarked(inputs)

    def logits_of(given):
        with torch.no_grad():
            return model(**{key: value for key, value in given.items() if "label" not in key}, use_cache=False).logits

    with selecting_rows(model):
        calls = [lambda: logits_of(plain), lambda: logits_of(inputs)]
        expected = [call() for call in calls]
        order = 1 if plain_first else -1
        with narrowed(model):
            got = crossed_by(model.model, *calls[::order], stays=stays)[::order]
    assert [one.shape for one in got] == [one.shape for one in expected] and len(got[1]) == KEPT
    for one, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(one, wanted)


def test_an_interrupted_pass_leaves_no_rows():
    model, inputs = patched(), batch()
    plain = unmarked(inputs)
    expected = model(**plain, use_cache=False).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    with selecting_rows(model), narrowed(model):
        hook = model.model.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            called(model, inputs)
        hook.remove()
        torch.testing.assert_close(model(**plain, use_cache=False).logits, expected)


@pytest.mark.parametrize("config", ["LoraConfig", "IA3Config"])
def test_narrow_with_pefts_wrapper(config):
    pytest.importorskip("peft")
    import peft

    options = {"target_modules": ["v_proj", "down_proj"]}
    options |= {"feedforward_modules": ["down_proj"]} if config == "IA3Config" else {}
    adapted = peft.get_peft_model(
        tiny_model("llama", torch.float64), getattr(peft, config)(task_type="CAUSAL_LM", **options)
    )
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = batch()
    expected = results(adapted, inputs, parameters)
    seen = []
    layer = decoder_layers(adapted)[-1]
    layer.mlp.act_fn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    with prepared(adapted, Engine(narrow=True)):
        assert_same(results(adapted, inputs, parameters), expected)
    assert seen == [KEPT]


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        ("llama", True),
        pytest.param("gemma3", False, marks=pytest.mark.slow),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("gemma3", True, marks=pytest.mark.slow),
    ],
)
def test_narrow_compiles_once_for_all_shapes(family, packed, monkeypatch, dynamo):
    # graphs are counted, and tracing alone makes them
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    model = patched(family)
    shapes = [SHAPES, ((12, 2), (5, 4), (6, 1)), ((8, 8), (8, 5), (3, 2)), ((30, 2), (9, 1))]
    batches = [batch(chosen, packed) for chosen in shapes]
    expected = [results(model, inputs) for inputs in batches]
    counters = torch._dynamo.utils.counters
    with prepared(model, Engine(compile=True, narrow=False)):
        results(model, batches[0])
        results(model, batches[1])
    plain = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    with prepared(model, Engine(compile=True, narrow=True)):
        for number, (inputs, wanted) in enumerate(zip(batches, expected, strict=True)):
            assert_same(results(model, inputs), wanted, 1e-11)
            # of the last layer, one of its own
            assert counters["stats"]["unique_graphs"] <= plain + 1, number
        # and one for the whole of it
        full = {**unmarked(batches[0]), "use_cache": False}
        got = model(**full).logits
    assert not counters["graph_break"]
    torch.testing.assert_close(got, model(**full).logits)
