"""What the tests of the prefix cache share: models with a prefix, sequences, the scope under test, and fits."""

import warnings
from contextlib import contextmanager

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.encode import IGNORED
from lofit_fast.training import CompletionCollator
from lofit_fast.training.prefix_cache.cache import PrefixCollator, prefix_cached
from lofit_fast.training.run_folder import RunFolder
from tests.library_versions import BY_ROW, taking_rows
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer

COLLATE = CompletionCollator(0, logits=BY_ROW)
HEADS = [(2, 1), (3, 0), (3, 3)]
# four layers whose types differ by place. the window is shorter than the longest sequences; but longer than any
# padding, since sdpa makes NaN of a query whose whole window is padding
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 11, "layer_types": MIXED}
CHANGES = {"gemma2": WINDOW, "gemma3": WINDOW}

EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
HELD_OUT = [{"prompt": "a+x=", "completion": "xa"}, {"prompt": "bb+w=", "completion": "wb"}]
RECIPE = lf.Recipe(top=2, min_layer=2, select_epochs=1, tune_epochs=3)


def rows(count=12):
    """Sequences of 6 to 16 tokens."""
    result = []
    for seed in range(count):
        ids = tokens(1, 6 + 3 * seed % 11, seed)[0].tolist()
        result.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - 2) + ids[-2:]})
    return result


ROWS = rows()
TOKENS = sum(len(row["input_ids"]) for row in ROWS)


def deep(family="llama", dtype=torch.float32, **changes):
    return taking_rows(tiny_model(family, dtype, num_hidden_layers=4, **{**CHANGES.get(family, {}), **changes}))


def tuned(model, heads=HEADS):
    handle = lf.patch(model, lf.LofitConfig(offset=heads))
    randomize(handle, 0.1)
    return handle


@contextmanager
def cached(handle, folder, sequences=ROWS, gb=1.0, collator=COLLATE):
    """The scope under test, in which its warnings are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "prefix cache")
        with prefix_cached(handle, sequences, collator, gb=gb, folder=folder) as with_states:
            assert isinstance(with_states, PrefixCollator)
            yield with_states


def stores(folder):
    return sorted(path.name for path in folder.glob("*") if (path / "index.json").is_file())


def results(handle, batch):
    """Logits and the gradient of their loss, in the model's dtype, as one vector each."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    logits = handle.model(**inputs, use_cache=False).logits.flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(logits, batch["shift_labels"])
    gradients = torch.autograd.grad(loss, list(handle.parameters()))
    return logits.detach().flatten(), torch.cat([gradient.flatten() for gradient in gradients])


class Passes:
    """Counts the tokens, padding included, that go through each of a model's layers."""

    def __init__(self, model):
        self.tokens = [0] * len(model.model.layers)
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda module, args, i=i: self.add(i, args[0]))

    def add(self, layer, states):
        self.tokens[layer] += states.shape[:2].numel()

    def take(self):
        taken, self.tokens = self.tokens, [0] * len(self.tokens)
        return taken


def fit(model, folder, gb=1.0, **options):
    """A fit of EXAMPLES with a prefix cache of at most gb. The model is unpatched after it."""
    engine = lf.Engine(prefix_cache_gb=gb)
    options = {"eval_data": HELD_OUT, "progress": False, "engine": engine, **options}
    result = lf.fit(model, tiny_tokenizer(), EXAMPLES, RECIPE, output_dir=folder, **options)
    result.handle.unpatch()
    return result


@contextmanager
def stopped(monkeypatch):
    """A scope in which Ctrl-C ends a fit in the second epoch of a step."""
    append = RunFolder.append_history

    def raising(self, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        append(self, row)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append_history", raising)
        yield


def vectors(result):
    return torch.cat([parameter.detach().flatten() for parameter in result.handle.parameters()])


def losses(result):
    return [value for row in result.history for value in (row["loss"], row["eval_loss"])]
