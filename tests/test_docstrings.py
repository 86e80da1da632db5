"""What the docstrings of public functions say of errors."""

import inspect
import re

import lofit_fast
import lofit_kernels
from lofit_fast.evaluation import judge


def public_functions():
    """Name -> function, of what users import: functions, and methods of classes, those of our bases too."""
    found = {}
    for package in (lofit_fast, lofit_kernels):
        for name in package.__all__:
            value = getattr(package, name)
            bases = [base for base in getattr(value, "__mro__", ()) if base.__module__.startswith("lofit_")]
            members = {f"{name}.{key}": one for base in bases for key, one in vars(base).items() if key[0] != "_"}
            for key, one in {name: value, **members}.items():
                function = inspect.unwrap(getattr(one, "fget", None) or getattr(one, "__func__", one))
                if inspect.isfunction(function):
                    found[key] = function
    return found


RAISE = re.compile(r"^\s+raise (\w+)\(", re.MULTILINE)
# what raises by what it calls, beside those that raise themselves
BY_OTHERS = {
    lofit_kernels.head_affine: {"TypeError", "ValueError"},
    lofit_kernels.fold_offset: {"TypeError", "ValueError"},
    lofit_fast.head_scores: {"TypeError", "ValueError"},
    judge.exact_match_accuracy: {"ValueError"},
    judge.constrained_accuracy: {"ValueError"},
    judge.score_candidates: {"ValueError"},
}


def test_what_a_public_function_raises_is_said():
    silent = []
    functions = {**public_functions(), **{function.__name__: inspect.unwrap(function) for function in BY_OTHERS}}
    others = {inspect.unwrap(function): kinds for function, kinds in BY_OTHERS.items()}
    for name, function in functions.items():
        raised = set(RAISE.findall(inspect.getsource(function))) | others.get(function, set())
        silent += [f"{name}: {kind}" for kind in sorted(raised) if kind not in (inspect.getdoc(function) or "")]
    assert silent == []
