"""Everything that holds examples in Python is gone through row by row, or refused with a sentence."""

import pytest

from lofit_fast.data.given_examples import at_rest, given_examples

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def held(kind):
    """The rows in the hands of a library."""
    if kind == "polars":
        # stands in for the library, which nothing here installs
        return type("DataFrame", (), {"__module__": "polars.dataframe.frame", "to_dicts": lambda self: ROWS})()
    library = pytest.importorskip(kind.partition(".")[0])
    return {
        "datasets": lambda: library.Dataset.from_list(ROWS),
        "datasets.stream": lambda: library.Dataset.from_list(ROWS).to_iterable_dataset(),
        "pandas": lambda: library.DataFrame(ROWS),
        "pyarrow": lambda: library.Table.from_pylist(ROWS),
    }[kind]()


@pytest.mark.parametrize("kind", ["datasets", "datasets.stream", "pandas", "pyarrow", "polars"])
def test_libraries(kind):
    assert [*given_examples(held(kind))] == ROWS


@pytest.mark.parametrize("kind", ["datasets", "datasets.stream", "pyarrow"])
def test_messages_have_no_keys_that_nobody_wrote(kind, monkeypatch):
    talks = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]}]
    monkeypatch.setitem(globals(), "ROWS", talks)
    assert [*given_examples(held(kind))] == talks


def test_lists_and_generators():
    assert given_examples(ROWS) is ROWS
    assert [*given_examples(row for row in ROWS)] == ROWS


def test_what_can_be_gone_through_once_is_put_into_a_list():
    for data in (iter(ROWS), (row for row in ROWS), map(dict, ROWS)):
        assert at_rest(data) == ROWS
    for data in (ROWS, tuple(ROWS), None, "all"):
        assert at_rest(data) is data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("my.jsonl", r"the training data: got 'my.jsonl', expected examples: read it with load_task"),
        (
            {"prompt": ["a"], "completion": ["b"]},
            r"got a dict with the keys \['prompt', 'completion'\], expected a list",
        ),
        ({"train": ROWS, "test": ROWS}, r"got a dict with the keys \['train', 'test'\].* of several splits choose one"),
        (3, "expected a list of examples, got int"),
        (None, "expected a list of examples, got NoneType"),
    ],
)
def test_refusals(data, message):
    with pytest.raises(TypeError, match=message):
        given_examples(data)
