"""Files, folders, saved data sets and the hub as one kind of source, and the columns that are read of them."""

import types
from inspect import signature

import pytest

from lofit_fast.tasks import TASKS, load_task
from lofit_fast.tasks.completion import completion
from lofit_fast.tasks.row_source import source_rows
from tests.tasks.row_writers import write

ROWS = [{"prompt": f"{i}", "completion": f" {i}!"} for i in range(6)]
THEIRS = [{"id": i, "question": f"{i}", "answer": f" {i}!"} for i in range(6)]
COLUMNS = {"prompt": "question", "completion": "answer"}


def read(source, **options):
    return [row for _, row in source_rows(source, **options)]


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the library: name -> rows. What is asked of it is in `asked`."""
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        if names == ("owner/two",):
            raise ValueError("Config name is missing. Please pick one among: ['a', 'b']")
        if split == "nowhere":
            raise RuntimeError("Unknown split 'nowhere'")
        return THEIRS

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_split_and_subset(hub):
    for source, options in (
        ("owner/set", {}),
        ("owner/set:test[:5]", {}),
        ("owner/set", {"split": "test"}),
        ("owner/set", {"subset": "en"}),
        ("owner/set:dev", {"subset": "en"}),
    ):
        assert read(source, columns=COLUMNS, **options)[0] == {"id": 0, "prompt": "0", "completion": " 0!"}
    splits = [("owner/set", "train"), ("owner/set", "test[:5]"), ("owner/set", "test")]
    assert hub == [*splits, ("owner/set", "en", "train"), ("owner/set", "en", "dev")]
    task = load_task("completion", "owner/set", split="test", subset="en", columns=COLUMNS)
    assert (len(task.train), len(task.validation), hub[-1]) == (5, 1, ("owner/set", "en", "test"))


def test_hub_refusals_say_what_to_choose(hub):
    with pytest.raises(ValueError, match=r"owner/two \(subset not given, split train; --subset and .*Please pick one"):
        read("owner/two")
    with pytest.raises(ValueError, match=r"owner/set \(subset not given, split nowhere.*Unknown split"):
        read("owner/set", split="nowhere")
    with pytest.raises(ValueError, match="got the split 'a' too, expected one of the two"):
        read("owner/set:b", split="a")
    with pytest.raises(FileNotFoundError, match=r"data/my\.jsonl: no such file"):
        read("data/my.jsonl:train")
    assert len(hub) == 2


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "lofit-fast\[train\]"'):
        read("owner/set")


def test_a_second_source_beside_the_hub(hub, tmp_path):
    held_out = write(tmp_path / "b.csv", THEIRS[:2])
    task = completion("owner/set", validation=held_out, subset="en", split="a", columns=COLUMNS)
    assert (len(task.train), len(task.validation), hub) == (6, 2, [("owner/set", "en", "a")])
    task = completion("owner/set", validation="owner/set:b", subset="en", split="a", columns=COLUMNS)
    assert hub[1:] == [("owner/set", "en", "a"), ("owner/set", "en", "b")]


def test_a_folder_that_datasets_has_saved(datasets, tmp_path):
    part = datasets.Dataset.from_list(ROWS)
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "held": part.select(range(2))}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == read(str(tmp_path / "two")) == ROWS
    assert read(tmp_path / "two", split="held") == ROWS[:2]
    # the format is saved with it
    part.with_format("arrow").save_to_disk(tmp_path / "formatted")
    assert read(tmp_path / "formatted") == ROWS
    with pytest.raises(ValueError, match="two: no split 'test', expected one of train, held"):
        read(tmp_path / "two", split="test")
    with pytest.raises(ValueError, match="one: got split='test', but the folder holds one data set"):
        read(tmp_path / "one", split="test")
    assert next(source_rows(tmp_path / "one"))[0] == f"{tmp_path / 'one'}: row 1"


def test_messages_have_no_keys_that_nobody_wrote(datasets, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked = {"role": "user", "content": "1+1?"}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [asked, {"role": "assistant", "content": "2", "thinking": "easy"}]},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read(write(tmp_path / "a.parquet", rows)) == read(tmp_path / "saved") == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_of_files(tmp_path, suffix):
    (tmp_path / "data").mkdir()
    for name, rows in (("train-00000-of-2", ROWS[:2]), ("train-00001-of-2", ROWS[2:4]), ("test-0", ROWS[4:])):
        write(tmp_path / "data" / f"{name}{suffix}", rows)
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(tmp_path) == read(tmp_path, split="train") == ROWS[:4]
    assert read(str(tmp_path), split="test") == ROWS[4:]
    with pytest.raises(FileNotFoundError, match=f"no file of the split 'dev', got test-0{suffix}, train-0"):
        read(tmp_path, split="dev")


# the name of each file, and which of them are read
NAMED = [
    (["my_train", "my_test"], ["my_train"]),
    (["training", "validation_set"], ["training"]),
    (["qa_Training_v2", "qa_devSet", "qa_TESTset"], ["qa_Training_v2"]),
    (["test_1", "train_1", "train_2"], ["train_1", "train_2"]),
    (["extra", "trainset"], ["trainset"]),
    # words that only look like those of a split
    (["contest", "latest_news", "trainer", "values"], ["contest", "latest_news", "trainer", "values"]),
]


@pytest.mark.parametrize(("names", "chosen"), NAMED)
def test_a_split_is_a_word_anywhere_in_a_name(tmp_path, names, chosen):
    for name in names:
        write(tmp_path / f"{name}.jsonl", [{**ROWS[0], "prompt": name}])
    assert [row["prompt"] for row in read(tmp_path)] == chosen


@pytest.mark.parametrize(
    "names", [["data", "test_set"], ["my_test"], ["eval_questions", "other"], ["dev-1", "testing"], ["Validation"]]
)
def test_files_of_other_splits_are_not_taken_for_training_data(tmp_path, names):
    for name in names:
        write(tmp_path / f"{name}.jsonl", ROWS[:1])
    with pytest.raises(FileNotFoundError, match=f"no file of the split 'train', got .*{names[-1]}.jsonl"):
        read(tmp_path)


def test_a_chosen_split_is_read_by_its_word_or_by_how_names_begin(tmp_path):
    for name in ("a_valid", "b_test", "train", "part_a-1", "part_ab"):
        write(tmp_path / f"{name}.jsonl", [{**ROWS[0], "prompt": name}])
    splits = {"validation": "a_valid", "test": "b_test", "train": "train", "part_a": "part_a-1"}
    for split, name in splits.items():
        assert [row["prompt"] for row in read(tmp_path, split=split)] == [name]
    with pytest.raises(FileNotFoundError, match="no file of the split 'eval', got a_valid"):
        read(tmp_path, split="eval")


def test_a_name_of_two_splits_is_refused(tmp_path):
    for name in ("train", "train_eval", "test"):
        write(tmp_path / f"{name}.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match=r"expected files that name one split, got train_eval\.jsonl: rename"):
        read(tmp_path)
    assert read(tmp_path, split="test") == ROWS[:1]


def test_a_folder_of_files_without_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got a folder without rows, expected files of type \.jsonl"):
        read(tmp_path)
    (tmp_path / "prompts.json").write_text("{}")
    with pytest.raises(ValueError, match="got the folder of a published task.*name the task, with --task"):
        read(tmp_path)
    (tmp_path / "prompts.json").unlink()
    for name, rows in (("b.jsonl", ROWS[2:]), ("a.jsonl", ROWS[:2])):
        write(tmp_path / name, rows)
    assert read(tmp_path) == ROWS
    write(tmp_path / "c.csv", ROWS)
    with pytest.raises(ValueError, match=r"got files of more than one type, expected one: a\.jsonl, b\.jsonl, c\.csv"):
        read(tmp_path)
    (tmp_path / "c.csv").rename(tmp_path / "test.csv")
    # nothing is called train, but something is a split
    with pytest.raises(FileNotFoundError, match="no file of the split 'train'"):
        read(tmp_path)


@pytest.mark.parametrize("options", [{"split": "train"}, {"subset": "en"}])
def test_a_file_has_neither_splits_nor_subsets(tmp_path, options):
    with pytest.raises(ValueError, match=rf"a\.jsonl: got {next(iter(options))}="):
        read(write(tmp_path / "a.jsonl", ROWS), **options)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_of_files(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [{"q": "x", "prompt": "no", "other": "y", "completion": "c"}])
    assert read(path, columns={"prompt": "q"}) == [{"prompt": "x", "other": "y", "completion": "c"}]
    # names may change places
    swapped = read(path, columns={"prompt": "completion", "completion": "prompt"})
    assert (swapped[0]["prompt"], swapped[0]["completion"]) == ("c", "no")
    (example,) = completion(path, validation=0, columns={"prompt": "q"}).train
    assert (example.prompt, example.completion) == ("x", "c")
    message = rf"a{suffix}: .* 1.*: no column 'nope' to read as prompt, got the columns \['q', 'prompt', 'other', 'comp"
    with pytest.raises(ValueError, match=message):
        completion(path, columns={"prompt": "nope"})


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"promt": "q"}, ValueError, "got the name 'promt', expected some of prompt, completion, messages"),
        ({"prompt": "q", "completion": "q"}, ValueError, "expected one column for each name"),
        ({"prompt": ""}, ValueError, "expected one column for each name"),
        ({"prompt": 3}, TypeError, "columns must map texts to texts"),
        ("prompt=q", TypeError, "columns must map texts to texts"),
    ],
)
def test_columns_that_are_none(tmp_path, columns, error, message):
    with pytest.raises(error, match=message):
        completion(write(tmp_path / "a.jsonl", ROWS), columns=columns)


def test_other_tasks_refuse_the_options(tmp_path):
    with pytest.raises(ValueError, match="task 'mquake': got columns, expected only: data"):
        load_task("mquake", tmp_path, columns=COLUMNS)


def test_reading_shows_a_bar(tmp_path, capsys, monkeypatch):
    from lofit_fast.tasks import row_source

    shown = []
    bar = row_source.tqdm
    monkeypatch.setattr(row_source, "tqdm", lambda rows, **how: shown.append(how["disable"]) or bar(rows, **how))
    path = write(tmp_path / "a.jsonl", ROWS)
    for progress in (True, False):
        load_task("completion", path, progress=progress)
    assert shown == [False, True]
    assert load_task("kinship", progress=True).train


@pytest.mark.parametrize("content", ["nope", "{}", '{"splits": ["train"]}'])
def test_a_folder_that_only_looks_saved_is_refused(tmp_path, content, datasets):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match="expected what `datasets` has saved to disk, got"):
        completion(tmp_path)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if "data" in signature(task).parameters])
def test_no_name_stands_for_the_working_folder(name, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected the path of a file or folder, got ''"):
        load_task(name, "")


@pytest.mark.parametrize("kind", ["prompts", "preferences"])
def test_turns_to_learn_are_refused_of_rows_without_any(kind, tmp_path):
    rows = {"prompts": ROWS, "preferences": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2}[kind]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=f"a.jsonl: got train_on='last', .*but it holds {kind}.*expected 'all'"):
        completion(path, train_on="last")
    assert completion(path, train_on="all", validation=0)


def test_an_unknown_train_on_is_refused_of_any_data(tmp_path):
    with pytest.raises(ValueError, match="train_on: got 'first', expected all or last"):
        completion(write(tmp_path / "a.jsonl", ROWS), train_on="first")
