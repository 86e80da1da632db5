"""Two- and three-step family stories with 18 relations as answers, written by a program: no data is needed.

A story is a chain of people; every sentence names the relation of one to the next, and the question asks for the
relation between the two ends. The world is plain: siblings share both parents, couples share all their children,
everybody has one mother, one father and at most one spouse. A chain is used only where its answer is certain there.
"""

import itertools
import random

from lofit_fast.tasks.task import Example, Task

# kind of relation -> (word for a man, word for a woman)
WORDS = {
    "parent": ("father", "mother"),
    "child": ("son", "daughter"),
    "sibling": ("brother", "sister"),
    "spouse": ("husband", "wife"),
    "grandparent": ("grandfather", "grandmother"),
    "grandchild": ("grandson", "granddaughter"),
    "pibling": ("uncle", "aunt"),
    "nibling": ("nephew", "niece"),
    "parent-in-law": ("father-in-law", "mother-in-law"),
    "child-in-law": ("son-in-law", "daughter-in-law"),
}
MEANING = {word: (kind, gender) for kind, words in WORDS.items() for gender, word in enumerate(words)}

# what a sentence may say, and what may be asked: 18 words, as a spouse is never the answer
STEPS = ("parent", "child", "sibling", "spouse")
RELATIONS = tuple(sorted(word for word, (kind, _) in MEANING.items() if kind != "spouse"))

# (kind of B to A, kind of C to B) -> kind of C to A, for three different people.
# a pair is absent when C could be two things to A (a grandfather's son: father or uncle), A's spouse, or none of the 18
COMPOSITION = {
    ("parent", "parent"): "grandparent",
    ("parent", "child"): "sibling",
    ("parent", "sibling"): "pibling",
    ("parent", "spouse"): "parent",
    ("child", "child"): "grandchild",
    ("child", "sibling"): "child",
    ("child", "spouse"): "child-in-law",
    ("sibling", "parent"): "parent",
    ("sibling", "child"): "nibling",
    ("sibling", "sibling"): "sibling",
    ("spouse", "parent"): "parent-in-law",
    ("spouse", "child"): "child",
    ("grandparent", "spouse"): "grandparent",
    ("grandchild", "sibling"): "grandchild",
    ("nibling", "sibling"): "nibling",
    ("parent-in-law", "spouse"): "parent-in-law",
}
# steps that end where they began: a third person there would be a second mother, father, husband or wife
RETURNS = {("child", "parent"), ("spouse", "spouse")}

MALE, FEMALE = 0, 1
POSSESSIVE = ("his", "her")
FRAME = "Story: {story} Question: How is {last} related to {first}? Answer: {last} is {first}'s"

# split -> (names of men, names of women)
NAMES = {
    "train": (
        "Adam Alan Albert Andrew Arthur Ben Brian Carl Charles Daniel David Dennis Edward Eric Frank Fred George "
        "Gordon Harold Henry Howard Jack James Jeff John Keith Kevin Louis Mark Martin Neil Oliver Patrick Peter "
        "Ralph Richard Samuel Simon Thomas Walter",
        "Alice Amanda Amy Andrea Anna Barbara Betty Carol Catherine Claire Diana Dorothy Elizabeth Ellen Emily "
        "Emma Eva Florence Grace Hannah Helen Irene Jane Janet Joan Julia Karen Laura Linda Lucy Margaret Martha "
        "Mary Nancy Nora Rachel Rebecca Rose Sarah Sophie",
    ),
    "validation": (
        "Aaron Anthony Barry Bernard Bill Bruce Christopher Colin Craig Derek Donald Douglas Ernest Gary Gerald "
        "Graham Greg Hugh Ian Jacob Jason Joseph Joshua Kenneth Lawrence Luke Matthew Michael Nathan Oscar Paul "
        "Philip Robert Roger Scott Stephen Steve Timothy Victor William",
        "Abigail Agnes Angela Beth Brenda Caroline Charlotte Christine Cynthia Deborah Donna Doris Edith Eleanor "
        "Fiona Gloria Heather Isabel Jennifer Jessica Judith Kate Lillian Lisa Lydia Maria Michelle Monica Natalie "
        "Olivia Pamela Patricia Ruth Sandra Sharon Stella Susan Teresa Vera Wendy",
    ),
}
NAMES = {split: tuple(tuple(names.split()) for names in pools) for split, pools in NAMES.items()}
# split -> one sentence each: b is a's relation; {his} is a's possessive
TEMPLATES = {
    "train": (
        "{b} is well known in town as {a}'s {relation}.",
        "{a} has a {relation} whose first name is {b}.",
        "{a} planted a row of beans with {his} {relation} {b}.",
        "{a} and {his} {relation} {b} share a small boat.",
        "{a} wrote a long letter to {his} {relation} {b}.",
        "{a} lent a red bicycle to {his} {relation} {b}.",
        "{a} often plays chess against {his} {relation} {b}.",
        "{a} keeps an old photo of {his} {relation} {b}.",
        "{a} waited at the station for {his} {relation} {b}.",
        "{a} sang a short song beside {his} {relation} {b}.",
        "On Monday {a} met {his} {relation} {b} for lunch.",
        "{a}'s {relation}, {b}, makes very good soup.",
    ),
    "validation": (
        "{a} cooked a late dinner for {his} {relation} {b}.",
        "{a} took the bus to see {his} {relation} {b}.",
        "{a} sold an old piano to {his} {relation} {b}.",
        "{a} walked the small dog with {his} {relation} {b}.",
        "{a} phones {his} {relation} {b} every evening.",
        "{b}, who is {a}'s {relation}, collects foreign stamps.",
        "{a} went fishing at dawn with {b}, {a}'s {relation}.",
        "Last year {a} and {his} {relation} {b} opened a shop.",
    ),
}


def reduce_chain(steps: tuple[str, ...]) -> str | None:
    """The kind of relation that a chain of kinds amounts to, or None where it is not certain.

    Neighbours are composed by `COMPOSITION` in any order that is defined at every stage; the order changes nothing but
    whether it is defined.
    """
    if len(steps) == 1:
        return steps[0]
    if RETURNS.intersection(itertools.pairwise(steps)):
        return None
    for cut in range(1, len(steps)):
        kind = COMPOSITION.get((reduce_chain(steps[:cut]), reduce_chain(steps[cut:])))
        if kind is not None:
            return kind
    return None


def chains(kind: str, hops: int) -> list[tuple[str, ...]]:
    """Every chain of `hops` steps that amounts to `kind`, in a fixed order."""
    return [steps for steps in itertools.product(STEPS, repeat=hops) if reduce_chain(steps) == kind]


CHAINS = {(kind, hops): chains(kind, hops) for kind in WORDS if kind != "spouse" for hops in (2, 3)}


def kinship(train_size: int = 300, validation_size: int = 180, seed: int = 0) -> Task:
    """Stories of two and three steps whose answer is one of 18 family relations.

    Each label occurs equally often, give or take one, and so do two and three steps per label; no prompt occurs twice.
    Training and validation share no name and no sentence template. A smaller split is the beginning of a larger one of
    the same seed, and neither depends on the size of the other. Prompts end in a word and completions begin with a
    space; `candidates` holds the 18 completions in alphabetical order.

    Args:
        train_size, validation_size: numbers of examples; multiples of 18 are balanced exactly.
        seed: another seed, other stories; the same on every machine and Python version.

    Raises:
        ValueError: a negative or fractional size or seed.
    """
    for name, value in (("train_size", train_size), ("validation_size", validation_size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of 0 or more")
    return Task(
        name="kinship",
        train=_split("train", train_size, random.Random(2 * seed)),
        validation=_split("validation", validation_size, random.Random(2 * seed + 1)),
        candidates=tuple(f" {relation}" for relation in RELATIONS),
    )


def _split(split, size, rng):
    examples, seen = [], set()
    for block in itertools.count():
        for position in _shuffled(range(len(RELATIONS)), rng):
            if len(examples) == size:
                return examples
            hops = 2 + (block + position) % 2
            example = _example(split, RELATIONS[position], hops, rng)
            while example.prompt in seen:
                example = _example(split, RELATIONS[position], hops, rng)
            seen.add(example.prompt)
            examples.append(example)


def _example(split, relation, hops, rng):
    kind, gender = MEANING[relation]
    steps = _pick(CHAINS[kind, hops], rng)
    genders = [gender]
    for step in reversed(steps):
        genders.insert(0, 1 - genders[0] if step == "spouse" else _pick((MALE, FEMALE), rng))
    names = [_shuffled(pool, rng) for pool in NAMES[split]]
    people = [names[gender].pop() for gender in genders]
    sentences = [
        template.format(a=people[i], b=people[i + 1], his=POSSESSIVE[genders[i]], relation=WORDS[step][genders[i + 1]])
        for i, (step, template) in enumerate(zip(steps, _shuffled(TEMPLATES[split], rng), strict=False))
    ]
    prompt = FRAME.format(story=" ".join(sentences), first=people[0], last=people[-1])
    return Example(prompt, f" {relation}")


# random() is the one method whose sequence Python promises to keep from version to version
def _pick(items, rng):
    return items[int(rng.random() * len(items))]


def _shuffled(items, rng):
    return sorted(items, key=lambda _: rng.random())
