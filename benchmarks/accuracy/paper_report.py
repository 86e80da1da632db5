"""report.md: per section the question, the picture, the answer and the table, from the cells that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.accuracy import figures, findings, tables
from benchmarks.accuracy.combining import COMBINING_SAYS, combining_answer, combining_table
from benchmarks.accuracy.comparison import enumerated
from benchmarks.accuracy.experiments import TRAINED_FOR_OUTSIDE, Available, Plan, Slot, labelled
from benchmarks.accuracy.method_table import METHODS, SELECTOR_LABELS, TASKS
from benchmarks.accuracy.preset import PRESET_SAYS, preset_answer
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.size_figure import parameters
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.trained_sizes import of_one_size, size_answer, size_table
from benchmarks.accuracy.tuning import settled_so_far
from benchmarks.accuracy.tuning_edges import choices_made, edges_answer, tuning_table
from benchmarks.accuracy.tuning_search import MOST, RUNS
from benchmarks.accuracy.variants import VARIANTS_SAY, variants_table
from lofit_fast.files import write_text

Part = Callable[[Sequence[Slot], Results], str]


@dataclass(frozen=True)
class Section:
    """A heading, a question, its picture, its answer by rule, and its table. says: what is to be known to read them.

    experiments: whose slots it shows; those of the section's own name where none are given. of: which of them.
    """

    title: str
    question: str
    picture: Callable
    answer: Part
    table: Part
    says: str = ""
    experiments: tuple[str, ...] = ()
    of: Callable[[Sequence[Slot]], list[Slot]] = list


SECTIONS = {
    "table1": Section(
        "Table 1: LoFiT, 0-shot, ITI, RepE, and controls",
        "Is LoFiT better than methods that do not train the model?",
        figures.dots,
        findings.beside_lofit,
        tables.accuracy_table,
        "Majority answers the commonest training answer; constrained 0-shot takes the best-scoring of all answers of"
        " the task; 5-shot puts five training examples before the question. Stars: another accuracy than LoFiT's on"
        " the same questions.",
    ),
    "table2": Section(
        "Table 2: ways to choose heads",
        "Does it matter how the heads are chosen?",
        partial(figures.dots, rows=SELECTOR_LABELS.get),
        findings.ways_to_choose,
        tables.selection_table,
        "The same step 2 on heads chosen in different ways. Overlap is with the choice of LoFiT's step 1 of the same"
        " seed. All use the settings of LoFiT, which were tuned on its own choice: that favours it, and heads that have"
        " 0 % may have diverged at a rate that is too large for them.",
    ),
    "table3": Section(
        "Table 3: LoFiT and other trained methods",
        "How does LoFiT do beside methods that train more numbers?",
        figures.dots,
        findings.beside_lofit,
        tables.peers_table,
        "Seconds are of training, with those of choosing heads; LoFiT goes through its epochs twice, once per step, the"
        " others once. They compare among the rows timed on one device with one engine.",
    ),
    "parameters": Section(
        "Accuracy per parameter",
        "What is the best use of about 10^3, 10^4 or 10^5 trained numbers, and of the seconds to train them?",
        parameters,
        size_answer,
        size_table,
        "Every finished cell of a method that is trained by gradients on all examples, LoFiT with its own choice of"
        " heads, at every size. All sizes of a method have the settings tuned for tables 1 and 3, so what one loses may"
        " be the rate's; LoRA's alpha is twice its rank. A size belongs to the nearest power of ten. It keeps up when"
        " the questions do not tell it apart from the most accurate, which the same questions pick: its own number"
        " flatters it. Seconds are with those of choosing heads, and are compared among the cells of one device alone.",
        ("table1", "table3", "tops", "variants", "parameters"),
        of_one_size,
    ),
    "table5": Section(
        "Table 5: out of domain",
        "Does tuning on TruthfulQA cost what the model could do elsewhere?",
        figures.dots,
        findings.out_of_domain,
        tables.outside_table,
    ),
    "transfer": Section(
        "Figure 1: heads of another task",
        "Do the chosen heads belong to their task?",
        figures.transfer,
        findings.own_heads,
        partial(tables.grid_table, rows=figures.heads_of, columns=lambda task: f"tuned on {labelled(task)}"),
        "Offsets tuned on heads that step 1 chose on each task, with the rates tuned for own heads: others, random ones"
        " above all, may diverge at them. Stars: another accuracy than with own heads.",
    ),
    "layers": Section(
        "Figure 2: where the chosen heads are",
        "In which layers are the heads that step 1 chooses?",
        figures.layers,
        findings.where_heads_are,
        tables.layers_table,
        "Heads chosen by step 1 in every layer, mean over seeds.",
    ),
    "sizes": Section(
        "Figure 3: accuracy over training size",
        "How much do more examples bring?",
        figures.sizes,
        findings.more_examples,
        partial(tables.grid_table, rows=figures.swept, columns=lambda size: f"{size} examples"),
        "Settings are those tuned with all examples.",
    ),
    "tops": Section(
        "Figure 4: accuracy over the number of heads",
        "How many heads are enough?",
        figures.tops,
        findings.more_heads,
        partial(tables.grid_table, columns=lambda top: f"{100 * top:g} % of the heads"),
        "One step 1 per task and seed, cut at each number; the rate is that tuned for table 1's, and more heads want a"
        " smaller one, so what is lost beyond may be the rate's. A number keeps up when the questions do not tell it"
        " apart from the most accurate.",
    ),
    "variants": Section(
        "What limits LoFiT",
        "Is it the few heads, offsets without scales, or steps of one size for all heads?",
        figures.dots,
        findings.beside_lofit,
        variants_table,
        VARIANTS_SAY,
    ),
    "preset": Section(
        "A preset",
        "Is a variant so much better than the paper's recipe that it should be the one to start with?",
        figures.dots,
        preset_answer,
        variants_table,
        PRESET_SAYS,
    ),
    "combining": Section(
        "LoFiT and LoRA together",
        "Is LoFiT on top of LoRA better than either alone, and is LoRA needed in other layers than those of LoFiT's"
        " heads?",
        figures.dots,
        combining_answer,
        combining_table,
        COMBINING_SAYS,
    ),
}


def write_report(
    output: Path, settings: Settings, available: Available, results: Results, command: str, summary: dict | None
) -> Path:
    """Write report.md and the figures into `output`. command: what made the cells. summary: of the last run."""
    slots = Plan(settings, available).slots()
    parts = [_head(slots, results, settings, command, summary)]
    for name, section in SECTIONS.items():
        own = section.of([slot for slot in slots if slot.experiment in (section.experiments or (name,))])
        if not own:
            continue
        figures.save(section.picture(own, results, _short(own)), output / "figures" / name)
        lines = [
            f"## {section.title}",
            f"**Question.** {section.question}",
            f"![{section.title}](figures/{name}.png)",
            f"{_caption(own, results)} Also as [SVG](figures/{name}.svg).",
            _missing(own, results),
            _dtypes(own, results),
            _answer(section.answer(own, results)),
            section.says,
            section.table(own, results),
        ]
        if name == "table5":
            lines.append(_outside(available))
        parts.append("\n\n".join(line.rstrip() for line in lines if line))
    parts.append(_tuning(slots, results, settings))
    path = output / "report.md"
    write_text(path, "\n\n".join(parts).rstrip() + "\n")
    return path


def _answer(text: str) -> str:
    """A list goes below its heading, a sentence beside it."""
    return "**Answer.**" + ("\n\n" if text.startswith("* ") else " ") + text


def _head(slots: Sequence[Slot], results: Results, settings: Settings, command: str, summary: dict | None) -> str:
    counts = results.counts(slots)
    lines = [
        "# The paper's experiments",
        f"Made by `{command}`; every number comes from a JSON file under [cells/](cells/).",
        f"{counts.planned - counts.missing} of {counts.planned} cells are finished; what is missing is blank."
        + _open(counts, " of them"),
        _READING,
    ]
    if made := _made(slots, results):
        lines.append(made)
    if summary and summary["failed"]:
        failed = "".join(f"\n* `{one['cell']}`: {one['error']}" for one in summary["failed"])
        lines.append(f"Failed in the last run, and tried again by the next:{failed}")
    return "\n\n".join(lines)


_READING = (
    "How to read it:\n\n"
    "* **Accuracy** is in percent, on validation questions. ± in tables is the sample standard deviation over seeds,"
    " left out for one seed. Where TruthfulQA has one number, it is MC1.\n"
    "* **Answers** are written by rule from the finished cells. A difference is in points, with its 95 % interval: the"
    " same questions and seeds of both, resampled 10,000 times, seeds and questions at once. *Above* and *below* mean"
    " that the interval leaves out 0. *No difference that the questions can show* means that it holds 0, not that the"
    " two are equal. With one seed the interval knows nothing of other seeds, with two little: in a simulation it holds"
    " the truth in 93 % or more while seeds alone spread by 5 points or less, and in 83 % where they spread by 10.\n"
    "* **Bars in pictures**, and brackets after an accuracy, are 95 % intervals made the same way. Where every answer"
    " is wrong the interval has no width; that is no certainty.\n"
    "* **p and stars**: the same paired bootstrap, two-sided; stars are of the first metric, \\* p < 0.05,"
    " \\*\\* p < 0.01, \\*\\*\\* p < 0.001.\n"
    "* **†**: a search for settings is not over, the method's own or LoFiT's for one made with it. The number is of the"
    " best settings so far, and may change.\n"
    "* **LoFiT** may have all heads where its search found that best: in tables 1, 3 and 5, over training size and"
    " beside a preset. Sections that ask which heads, or how many, take its best settings with some of them.\n"
    "* Neither stars nor intervals are corrected for the number of comparisons."
)


def _made(slots: Sequence[Slot], results: Results) -> str:
    """With what the cells were made, each value with its number of cells where they differ."""
    # each cell once, in the order of the plan
    cells = settled_so_far((cell for slot in slots for cell in slot.cells), results.tuning)
    found = [result for cell in cells if (result := results.folder.result(cell))]
    if not found:
        return ""
    values = {key: Counter(one["environment"][key] for one in found) for key in found[0]["environment"]}
    values["commit"] = Counter((one["commit"] or "unknown")[:7] for one in found)
    parts = [f"{key.replace('_', '-')} {_counted(counter)}" for key, counter in values.items()]
    if changed := sum(bool(one["dirty"]) for one in found):
        parts.append(f"{changed} cells with changes that were not committed")
    mixed = max(len(values["device"]), len(values["engine"])) > 1
    return f"Made with {'; '.join(parts)}." + " Seconds compare among the cells of one device and engine only." * mixed


def _counted(counter: Counter) -> str:
    if len(counter) == 1:
        return next(iter(counter))
    return ", ".join(f"{value} ({n} cells)" for value, n in counter.most_common())


def _tuning(slots: Sequence[Slot], results: Results, settings: Settings) -> str:
    if not settings.n_tuning:
        text = "None: every method ran with its default settings, ours included. The full run tunes each alike."
        return f"## Tuning\n\n{text}"
    choices = choices_made(slots, results)
    lines = [
        "## Tuning",
        "**Question.** Were the settings chosen inside of what was tried?",
        _answer(edges_answer(choices)),
        f"Every method that is trained or fitted gets {RUNS} runs, LoFiT for three settings, the others for one or"
        f" two, with one seed, judged by training examples set aside, and up to {MOST} while its best, or one as good,"
        " lies at an edge; the chosen settings are bold, of equals the first with the fewest edges. After the first"
        " four, each run changes one setting of the best so far: beyond, while that lies at an edge, and halfway to a"
        " neighbour otherwise. What asked for the same settings twice counts once. "
        "All ways to choose heads use LoFiT's. *At an edge* names the settings of the chosen run that are the "
        "smallest or largest number tried for that method, task and model; all heads are no edge.",
        tuning_table(choices, results),
    ]
    return "\n\n".join(lines)


def _outside(available: Available) -> str:
    absent = [facts.label for name, facts in TASKS.items() if facts.outside and name not in available.outside]
    if not absent:
        return ""
    return (
        f"{', '.join(absent)}: not run, since the data folder had no file of theirs (`triviaqa.jsonl`, `nq_open.jsonl`,"
        f" `mmlu.jsonl`; formats in docs/guide.md) and --hub was not given. The other local tasks, on which nothing was"
        f" tuned here, stand in."
    )


def _dtypes(slots: Sequence[Slot], results: Results) -> str:
    """Which rows were made in which dtype, where a section has several: rounding is then part of their differences."""
    rows: dict[str, dict[str, None]] = {}
    for slot in slots:
        for result in results.of(slot):
            rows.setdefault(result["environment"].get("dtype", "an unknown dtype"), {})[str(labelled(slot.row))] = None
    if len(rows) < 2:
        return ""
    return "Made in " + ", ".join(f"{dtype}: {enumerated(list(own))}" for dtype, own in sorted(rows.items())) + "."


def _missing(slots: Sequence[Slot], results: Results) -> str:
    counts = results.counts(slots)
    missing = f"{counts.missing} of {counts.planned} cells are missing." if counts.missing else ""
    return (missing + _open(counts, " of those there")).strip()


def _open(counts: tables.Counts, of: str) -> str:
    """How many finished cells are not final, in words after a sentence. of: which those are."""
    return f" {counts.open}{of} {'is' if counts.open == 1 else 'are'} marked † and not final." if counts.open else ""


def _facts(slots: Sequence[Slot]) -> tuple[str, dict[str, str], list[int]]:
    """(models, per task its sizes in words, numbers of seeds)."""
    cells = [cell for slot in slots for cell in slot.cells]
    sizes = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        trained = sorted({cell.train_size for cell in own if cell.train_size})
        span = f"{trained[0]} to {trained[-1]}" if len(trained) > 1 else str(*trained)
        sizes[task] = f"{span or 'no'} training examples, n = {own[0].n_validation} questions"
    seeds = sorted({len(slot.cells) for slot in slots if METHODS[slot.cells[0].method].learns})
    return ", ".join(dict.fromkeys(cell.model for cell in cells)), sizes, seeds or [1]


def _caption(slots: Sequence[Slot], results: Results) -> str:
    models, sizes, seeds = _facts(slots)
    tasks = "; ".join(f"{labelled(task)}: {text}" for task, text in sizes.items())
    epochs = max(cell.epochs for slot in slots for cell in slot.cells)
    text = f"*Model: {models}. {tasks}. Seeds: {' or '.join(map(str, seeds))}. Epochs: {epochs}.*"
    if TRAINED_FOR_OUTSIDE in sizes and (count := max(cell.n_outside for slot in slots for cell in slot.cells)):
        text = text[:-1] + f" Out of domain: at most {count} questions a task.*"
    return text


def _short(slots: Sequence[Slot]) -> str:
    """A figure's own caption."""
    models, sizes, seeds = _facts(slots)
    questions = ", ".join(
        f"{labelled(task)} n = {text.rpartition('n = ')[2].split()[0]}" for task, text in sizes.items()
    )
    return f"{models}; {questions}; seeds: {' or '.join(map(str, seeds))}"
