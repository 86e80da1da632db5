"""Short fits of a tiny model, and what must be the same before and after one."""

import copy
import json

import lofit_fast as lf
from lofit_fast.training import objectives
from tests.tiny_tokenizers import tiny_tokenizer

# what a clock says, and no seed repeats
CLOCKED = {"seconds", "tokens_per_s", "examples_per_s"}
EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
HELD_OUT = [{"prompt": "a+x=", "completion": "xa"}, {"prompt": "b+w=", "completion": "wb"}]
RECIPE = lf.Recipe(top=3, select_epochs=3, tune_epochs=3)
QUICK = lf.Recipe(top=2, select_epochs=1, tune_epochs=1)


def fit(model, folder, recipe=QUICK, examples=EXAMPLES, **options):
    return lf.fit(model, tiny_tokenizer(), examples, recipe, output_dir=folder, progress=False, **options)


def state_of(model):
    """Everything about a model that a refused or failed fit must leave alone."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
    }


def assert_same_state(model, before, *, but=()):
    after = state_of(model)
    values = before["values"]
    assert after["values"].keys() == values.keys()
    assert all(value.equal(values[name]) for name, value in after["values"].items())
    changed = [key for key in ("modules", "modes", "parameters", "config") if after[key] != before[key]]
    assert set(changed) <= set(but)


def assert_whole(folder):
    """No scratch folders, and every JSON file parses."""
    assert not list(folder.rglob(".lofit-*"))
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())


def vectors(handle):
    return [parameter.detach().clone() for parameter in handle.parameters()]


def assert_equal_vectors(got, expected):
    assert len(got) == len(expected)
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))


def count_steps(monkeypatch, steps):
    """Append to steps at every training step."""
    compute = objectives.LofitTrainer.compute_loss

    def counting(self, model, *args, **options):
        if model.training:
            steps.append(None)
        return compute(self, model, *args, **options)

    monkeypatch.setattr(objectives.LofitTrainer, "compute_loss", counting)
