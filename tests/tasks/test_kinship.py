import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lofit_fast.tasks import kinship as module
from lofit_fast.tasks import majority_accuracy
from lofit_fast.tasks.kinship import CHAINS, NAMES, RELATIONS, STEPS, TEMPLATES, kinship, reduce_chain

ROOT = Path(__file__).parents[2]
# written out again: the oracle shares nothing with the generator but the sentences it reads
FEMININE = {
    "father": "mother",
    "son": "daughter",
    "brother": "sister",
    "husband": "wife",
    "grandfather": "grandmother",
    "grandson": "granddaughter",
    "uncle": "aunt",
    "nephew": "niece",
    "father-in-law": "mother-in-law",
    "son-in-law": "daughter-in-law",
}
QUESTION = re.compile(r"Story: (.+) Question: How is (\w+) related to (\w+)\? Answer: (\w+) is (\w+)'s")
CHECKSUM = "74910a1aa914849d"


class Family:
    """People, each with one mother, one father, at most one spouse, and any number of children: a graph to walk."""

    def __init__(self):
        self.female, self.parents, self.spouse, self.children = {}, {}, {}, {}

    def person(self, female):
        new = len(self.female)
        self.female[new], self.children[new] = female, []
        return new

    def parents_of(self, person):
        if person not in self.parents:
            father = self.person(False)
            self.parents[person] = (father, self.spouse_of(father))
            self._bear(person, father)
        return self.parents[person]

    def spouse_of(self, person):
        if person not in self.spouse:
            other = self.person(not self.female[person])
            self.spouse[person], self.spouse[other] = other, person
            self.children[other] = self.children[person]
        return self.spouse[person]

    def child_of(self, person, female):
        child, other = self.person(female), self.spouse_of(person)
        self.parents[child] = (other, person) if self.female[person] else (person, other)
        self._bear(child, person)
        return child

    def _bear(self, child, parent):
        # the list is one and the same for both of a couple
        self.children[parent].append(child)

    def follow(self, person, word):
        """Who a sentence's `word` of `person` is: the one there can be, or a new child or sibling."""
        if word in ("father", "mother"):
            return self.parents_of(person)[word == "mother"]
        if word in ("husband", "wife"):
            assert self.female[person] is (word == "husband"), f"a {word} of the wrong person"
            return self.spouse_of(person)
        if word in ("son", "daughter"):
            return self.child_of(person, word == "daughter")
        assert word in ("brother", "sister")
        return self.child_of(self.parents_of(person)[0], word == "sister")

    def relations(self, first, last):
        """Every one of the 18 words that says what `last` is to `first`."""

        def parents(people):
            return {parent for person in people for parent in self.parents.get(person, ())}

        def children(people):
            return {child for person in people for child in self.children[person]}

        def spouses(people):
            return {self.spouse[person] for person in people if person in self.spouse}

        def siblings(people):
            return {child for person in people for child in children(parents([person])) - {person}}

        me = [first]
        sets = {
            "father": parents(me),
            "son": children(me),
            "brother": siblings(me),
            "grandfather": parents(parents(me)),
            "grandson": children(children(me)),
            "uncle": siblings(parents(me)),
            "nephew": children(siblings(me)),
            "father-in-law": parents(spouses(me)),
            "son-in-law": spouses(children(me)),
            "husband": spouses(me),
        }
        words = [word for word, people in sets.items() if last in people]
        return [FEMININE[word] if self.female[last] else word for word in words]


def answers(words, first_is_female):
    """The oracle: what the last person is to the first; None when two of the people told of are one and the same."""
    family = Family()
    people = [family.person(first_is_female)]
    for word in words:
        people.append(family.follow(people[-1], word))
    return family.relations(people[0], people[-1]) if len(set(people)) == len(people) else None


def pattern(template):
    escaped = re.escape(template)
    for field, group in (
        ("a", r"(?P<a>\w+)"),
        ("b", r"(?P<b>\w+)"),
        ("his", "(?P<his>his|her)"),
        ("relation", r"(?P<relation>\w+)"),
    ):
        escaped = escaped.replace(re.escape(f"{{{field}}}"), group, 1)
        escaped = escaped.replace(re.escape(f"{{{field}}}"), f"(?P={field})")
    return re.compile(escaped)


def read(example, split):
    """The people and relation words of a prompt, and the templates used, from the text alone."""
    story, *asked = QUESTION.fullmatch(example.prompt).groups()
    people, words, used = [], [], []
    for sentence in re.findall(r"[^.]+\.", story):
        found = [(t, m) for t in TEMPLATES[split] if (m := pattern(t).fullmatch(sentence.strip()))]
        assert len(found) == 1, sentence
        template, fields = found[0][0], found[0][1].groupdict()
        people = people or [fields["a"]]
        assert fields["a"] == people[-1], "a chain: every sentence goes on from the last person"
        men, women = NAMES[split]
        if fields.get("his"):
            assert (fields["his"] == "her") == (fields["a"] in women)
        assert fields["b"] in (women if fields["relation"] in FEMININE.values() else men)
        people.append(fields["b"])
        words.append(fields["relation"])
        used.append(template)
    assert asked == [people[-1], people[0]] * 2
    assert len(set(people)) == len(people) and len(set(used)) == len(used)
    return people, words, used


@pytest.fixture(scope="module")
def task():
    return kinship()


SPLITS = pytest.mark.parametrize("split", ["train", "validation"])


@SPLITS
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_kinship_answers_agree_with_the_family_graph(split, seed):
    examples = getattr(kinship(360, 360, seed=seed), split)
    for example in examples:
        people, words, _ = read(example, split)
        assert answers(words, people[0] in NAMES[split][1]) == [example.completion.strip()], example
        assert example.answers == (example.completion.strip(),)


def test_kinship_every_chain_has_one_answer_for_all_genders():
    base = {"parent": ("father", "mother"), "child": ("son", "daughter"), "sibling": ("brother", "sister")}
    checked = Counter()
    for (kind, hops), steps in ((key, steps) for key, all_steps in CHAINS.items() for steps in all_steps):
        assert len(steps) == hops
        for genders in itertools.product((False, True), repeat=hops + 1):
            # couples are a man and a woman: the other assignments are never made
            if any(s == "spouse" and genders[i] == genders[i + 1] for i, s in enumerate(steps)):
                continue
            words = [
                ("husband", "wife")[genders[i + 1]] if s == "spouse" else base[s][genders[i + 1]]
                for i, s in enumerate(steps)
            ]
            assert answers(words, genders[0]) == [module.WORDS[kind][genders[-1]]], (steps, genders)
            checked[kind] += 1
    assert set(checked) == set(module.WORDS) - {"spouse"} and min(checked.values()) >= 8


@pytest.mark.parametrize(
    ("words", "relation"),
    [
        ("son son", "grandson"),
        ("father sister", "aunt"),
        ("brother son", "nephew"),
        ("wife father", "father-in-law"),
        ("son wife", "daughter-in-law"),
        ("mother husband", "father"),
        ("brother mother", "mother"),
        ("mother son", "brother"),
        ("mother father son", "uncle"),
        ("son wife daughter", "granddaughter"),
    ],
)
def test_kinship_oracle_and_chains_on_known_cases(words, relation):
    words = words.split()
    assert answers(words, first_is_female=False) == [relation]
    kinds = tuple(module.MEANING[word][0] for word in words)
    assert relation in module.WORDS[reduce_chain(kinds)]


@pytest.mark.parametrize(
    "steps",
    # the same person again, a second mother, a spouse, a cousin, a sister-in-law: no story may be made of these
    [
        ("child", "parent"),
        ("spouse", "spouse"),
        ("parent", "child", "parent"),
        ("parent", "spouse", "spouse"),
        ("parent", "sibling", "child"),
        ("sibling", "spouse"),
        ("spouse", "sibling"),
        ("parent", "parent", "parent"),
    ],
)
def test_kinship_uncertain_chains_are_not_used(steps):
    assert reduce_chain(steps) is None
    assert not any(steps in chains for chains in CHAINS.values())


def test_kinship_order_of_composition_never_changes_the_answer():
    compose = module.COMPOSITION.get
    for a, b, c in itertools.product(STEPS, repeat=3):
        both = {compose((compose((a, b)), c)), compose((a, compose((b, c))))} - {None}
        assert len(both) <= 1, (a, b, c)


@SPLITS
def test_kinship_labels_and_hops_are_balanced(task, split):
    examples = getattr(task, split)
    counts = Counter(example.completion for example in examples)
    assert set(counts) == {f" {relation}" for relation in RELATIONS} and len(counts) == 18
    assert max(counts.values()) - min(counts.values()) == (1 if len(examples) % 18 else 0)
    hops = Counter((example.completion, len(read(example, split)[1])) for example in examples)
    for label in counts:
        assert abs(hops[label, 2] - hops[label, 3]) <= 1
    assert len({example.prompt for example in examples}) == len(examples)


def test_kinship_splits_share_no_name_and_no_template(task):
    pools = {split: set().union(*NAMES[split]) for split in NAMES}
    assert all(len(set(names)) == len(names) >= 40 for split in NAMES for names in NAMES[split])
    assert all(not set(NAMES[split][0]) & set(NAMES[split][1]) for split in NAMES)
    assert not pools["train"] & pools["validation"]
    assert not set(TEMPLATES["train"]) & set(TEMPLATES["validation"])
    names, templates = {}, {}
    for split in NAMES:
        readings = [read(example, split) for example in getattr(task, split)]
        names[split] = {name for people, _, _ in readings for name in people}
        templates[split] = {template for _, _, used in readings for template in used}
        # every sentence is used, and nothing that only the other split may say
        assert names[split] <= pools[split] and templates[split] == set(TEMPLATES[split])
        others = [pattern(t) for other in NAMES if other != split for t in TEMPLATES[other]]
        for example in getattr(task, split):
            story = QUESTION.fullmatch(example.prompt)[1]
            assert not any(p.fullmatch(s.strip()) for s in re.findall(r"[^.]+\.", story) for p in others)
    assert not names["train"] & names["validation"]


def test_kinship_format(task):
    assert (task.name, len(task.train), len(task.validation)) == ("kinship", 300, 180)
    assert task.candidates == tuple(f" {relation}" for relation in sorted(RELATIONS))
    for example in (*task.train, *task.validation):
        assert example.prompt == example.prompt.strip() and "\n" not in example.prompt
        assert re.fullmatch(r" [a-z-]+", example.completion)
        assert example.prompt.endswith("'s")
    assert majority_accuracy(task) == pytest.approx(1 / 18)


def checksum(task):
    return hashlib.sha256(repr((task.train, task.validation, task.candidates)).encode()).hexdigest()[:16]


def test_kinship_is_always_the_same(task):
    assert checksum(task) == CHECKSUM


@pytest.mark.slow
def test_kinship_is_the_same_in_every_process():
    code = "import test_kinship; print(test_kinship.checksum(test_kinship.kinship()))"
    for hash_seed in ("1", "2"):
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == CHECKSUM


def test_kinship_seeds_and_sizes(task):
    assert kinship(seed=1) != task
    small = kinship(train_size=50, validation_size=7)
    assert small.train == task.train[:50] and small.validation == task.validation[:7]
    assert kinship(0, 0).train == []
    assert not {example.prompt for example in task.train} & {example.prompt for example in kinship(seed=1).train}


@pytest.mark.parametrize("options", [{"train_size": -1}, {"validation_size": 1.5}, {"seed": "0"}, {"train_size": True}])
def test_kinship_rejects(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}: got {value!r}, expected a whole number")):
        kinship(**options)
