"""What runs of a sweep may be called: nothing that is another folder, on any system, and nothing twice."""

import pytest

from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.run_names import name_of

BASE = {"model": "tiny"}
# name -> a word of what is wrong with it
BAD = {
    "..": "dot",
    ".": "dot",
    ".hidden": "dot",
    "end.": "dot",
    " .. ": "dot",
    "": "text in quotes",
    " ": "empty",
    "../up": "separator",
    "a/b": "separator",
    "/abs": "separator",
    "a\\b": "separator",
    "C:\\x": "separator",
    "a\0b": "cannot be shown",
    "a\nb": "cannot be shown",
    "a\x1b[2J": "cannot be shown",
    "half \ud83d": "cannot be shown",
    "con": "device",
    "NUL.txt": "device",
    "Com1": "device",
    "x" * 151: "150 signs",
    "漢" * 70: "200 bytes",
    "!?*": "no letter",
    "___": "no letter",
}


def names_of(*names):
    listed = [{"name": name, "seed": number} for number, name in enumerate(names)]
    return [run.name for run in parse_grid({"base": BASE, "runs": listed}).runs]


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_a_name_that_is_no_folder_of_its_own(name):
    with pytest.raises(ValueError, match=rf"(?s)\[\[runs\]\] 1 name: .*{BAD[name]}") as caught:
        names_of(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("twice", [("A", "a"), ("é", "e\u0301"), ("a b", "a_b"), ("ß", "SS")], ids=str)
def test_two_names_that_are_one_folder_somewhere(twice):
    with pytest.raises(ValueError, match="several runs are called"):
        names_of(*twice)


def test_names_that_stay():
    assert names_of("many heads", "é", "lr=0.1,top=3", "v1.2", "a", "con2") == [
        "many_heads",
        "é",
        "lr=0.1,top=3",
        "v1.2",
        "a",
        "con2",
    ]


def test_names_of_settings_are_short_and_plain():
    assert name_of({"heads": "../../etc/heads.json"}) == "heads=.._.._etc_heads.json"
    assert len(name_of({"heads": "x" * 500})) == 150
    assert len(name_of({"heads": "漢" * 500}).encode()) <= 200
    assert name_of({"heads": "."}) == "heads="
    assert name_of({}) == "run"


def test_ten_thousand_names_take_no_time():
    assert len(names_of(*(f"run {number}" for number in range(10_000)))) == 10_000
