"""The same rows from every type of file, and what is said about files that are not right."""

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

from lofit_fast.tasks.completion import completion
from lofit_fast.tasks.row_files import READERS, file_rows
from tests.tasks.row_writers import write

# quotes, separators, line ends, and a sign that some readers take for a line end
ROWS = [
    {"prompt": 'He said "a,b";\tthen\n', "completion": " c\r\nd "},
    {"prompt": "x\u2028y é 漢", "completion": "4"},
    {"prompt": "  spaces  ", "completion": "\ttab"},
]


@pytest.mark.parametrize("suffix", [*READERS, ".CSV", ".JSONL"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_type_gives_the_same_rows(tmp_path, suffix, encoding):
    path = write(tmp_path / f"a{suffix}", ROWS, encoding)
    assert [row for _, row in file_rows(path)] == ROWS
    task = completion(path, validation=0)
    assert [{"prompt": e.prompt, "completion": e.completion} for e in task.train] == ROWS


@pytest.mark.parametrize("suffix", READERS)
def test_every_type_names_the_row_that_is_wrong(tmp_path, suffix):
    empty = None if suffix == ".parquet" or "json" in suffix else ""
    path = write(tmp_path / f"a{suffix}", [{"prompt": "p\nq", "completion": "c"}, {"prompt": empty, "completion": "c"}])
    place = "line" if suffix == ".jsonl" else "row"
    with pytest.raises(
        ValueError, match=rf"a{suffix}: {place} 2.*prompt must be a string, got NoneType, an empty cell"
    ):
        completion(path)
    path = write(tmp_path / f"b{suffix}", [{"prompt": "p", "text": "c"}])
    with pytest.raises(
        ValueError, match=rf"b{suffix}: {place} 1.*got the keys \['prompt', 'text'\].*--columns renames"
    ):
        completion(path)


@pytest.mark.parametrize("suffix", READERS)
def test_every_type_refuses_what_is_no_such_file(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"a{suffix}"
    with pytest.raises(FileNotFoundError, match=rf"a{suffix}: no such file"):
        completion(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"a{suffix}: (got no rows|got no column names|expected Parquet)"):
        completion(path)
    path.write_bytes(b'{"prompt": "\xff"}, x\n')
    with pytest.raises(ValueError, match=rf"a{suffix}: expected (UTF-8 text|Parquet)"):
        completion(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"a{suffix}: got a folder, expected one of type"):
        list(file_rows(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\n", "got no rows"),
        ("prompt,completion\na,b\n\nc\n", r"row 2, line 4: got 1 cells, expected 2: \['prompt', 'completion'\]"),
        ("prompt,completion\na,b,c\n", "row 1, line 2: got 3 cells, expected 2"),
        ('prompt,completion\n"a\na",b\n"c,d\n', r"line \d: expected CSV, got what is not"),
        ('prompt,completion\n"a"b,c\n', "line 2: expected CSV, got what is not"),
        ("prompt,completion,prompt\na,b,c\n", "got the column 'prompt' more than once"),
        ("prompt,completion\na,\n", "row 1, line 2: completion must be a string, got NoneType, an empty cell"),
        ('prompt,completion\n"a\n\na",b\n,\n', "row 2, line 5: prompt must be a string, got NoneType"),
        ("prompt;completion\na;b\n", "got one column, 'prompt;completion', expected ',' between columns, not ';'"),
        ("text\na\n", r"row 1, line 2: got the keys \['text'\], expected the keys prompt and completion, or messages"),
        (",\n", "got no column names"),
    ],
)
def test_csv_refuses(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.csv: {message}"):
        completion(tmp_path / "a.csv")


def test_csv_takes_long_cells_and_names_with_spaces_and_puts_the_limit_back(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f" prompt, completion,,\n{long}, b,1,2\n")
    before = csv.field_size_limit()
    (example,) = completion(tmp_path / "a.csv", validation=0).train
    assert (example.prompt, example.completion) == (long, " b")
    assert csv.field_size_limit() == before


def test_csv_files_read_in_turn_leave_each_other_the_limit(tmp_path):
    long = "x" * 200_000
    before = csv.field_size_limit()
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("prompt,completion\n" + f"{name},{long}\n" * 3)
    first, second = (file_rows(tmp_path / f"{name}.csv") for name in "ab")
    next(first)
    next(second)
    assert csv.field_size_limit() == before
    # the one that began first ends first
    assert [row["completion"] for _, row in first] == [long] * 2
    assert [row["completion"] for _, row in second] == [long] * 2
    assert csv.field_size_limit() == before


def test_csv_files_that_are_left_half_read_leave_the_limit(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d\n")
    before = csv.field_size_limit()
    rows = file_rows(tmp_path / "a.csv")
    next(rows)
    assert csv.field_size_limit() == before
    (tmp_path / "bad.csv").write_text('prompt,completion\n"a"b,c\n')
    with pytest.raises(ValueError, match="expected CSV"):
        list(file_rows(tmp_path / "bad.csv"))
    assert csv.field_size_limit() == before


def test_csv_files_are_read_by_several_threads(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text("prompt,completion\n" + f"a,{long}\n" * 20)
    before = csv.field_size_limit()

    def read(_):
        return [len(row["completion"]) for _, row in file_rows(tmp_path / "a.csv")]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(8))) == [[len(long)] * 20] * 8
    assert csv.field_size_limit() == before


def test_parquet_keeps_types_and_lists(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "a.parquet", [chat] * 300)
    assert [row for _, row in file_rows(path)] == [chat] * 300
    path = write(tmp_path / "b.parquet", [{"prompt": "x", "completion": 4}])
    with pytest.raises(ValueError, match=r"b\.parquet: row 1: completion must be a string, got int"):
        completion(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'a\.parquet: Parquet needs pyarrow: pip install "lofit-fast\[train\]"'):
        completion(path)


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    for name, bad in (("a.jsonl", "{"), ("a.csv", "a,b,c")):
        good = "prompt,completion\na,b" if name == "a.csv" else '{"prompt": "a", "completion": "b"}'
        (tmp_path / name).write_text(f"{good}\n{bad}\n")
        rows = file_rows(tmp_path / name)
        assert next(rows)[1] == {"prompt": "a", "completion": "b"}
        with pytest.raises(ValueError, match="2"):
            next(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
        # the first of them used to be dropped without a word
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' is there twice"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "'role' is there twice"),
    ],
)
def test_json_that_python_cannot_hold_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 1: .*{message}"):
        list(file_rows(tmp_path / "a.jsonl"))


HALF = "it \\ud83d"


@pytest.mark.parametrize("row", ['{"prompt": "%s", "completion": "a"}', '{"prompt": "a", "completion": "%s"}'])
def test_half_a_character_is_refused_with_its_row(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row % HALF)
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1: .* holds half a character \(.*'\\ud83d'\)"):
        completion(tmp_path / "a.jsonl")
