"""Rows from wherever people have them: a file, a folder, a data set saved to disk or one of the hub."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tqdm.auto import tqdm

from lofit_fast.extras import needing
from lofit_fast.files import given_path
from lofit_fast.tasks.published_splits import PROMPTS
from lofit_fast.tasks.row_files import READERS, Rows, file_rows, is_row_file, plain_rows

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>\S+))?")
# the names that rows are read by, whatever a file calls its columns
COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected")
SPLIT = "train"
# the words of a file's name, "my_testSet-1" say, and those of them that are a split's
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_OF_SPLIT = re.compile(
    r"(train(ing)?|test(ing)?|val(id(ation)?)?|dev(elopment)?|eval(uation)?)(s|set|split|data)?", re.IGNORECASE
)
# what lies beside data and is none
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def source_rows(
    source: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Rows:
    """Pairs of (where, row), read as they are asked for. where: the place of the row, for errors.

    Args:
        source: a file of a type in `READERS`; a folder of such files, or one that `datasets` has saved to disk; or a
            data set of the hub, "owner/name" or "owner/name:split". What exists on the disk is never asked of the hub.
        split: of a folder or of the hub, "train" unless said. In a folder of files: those with a word of that split in
            their names (`my_train-0.csv`, `training.csv`), or whose names begin with it where it is another name. A
            folder whose files name no split is read whole.
        subset: the configuration of a data set of the hub.
        columns: names to read by (`COLUMNS`) -> names that the source has. Other columns stay what they are.
        progress: whether a bar shows what takes more than a second.

    Raises:
        FileNotFoundError: no such file, folder or split, and not a hub id either.
        ImportError: a library is missing that the source needs.
        TypeError: a source that is neither a path nor an id, or columns that are no mapping of texts.
        ValueError: a source that cannot be read, a name in `columns` that is none of `COLUMNS` or no column of the
            source, a split of a file, or a subset of what is not on the hub.
    """
    check_columns(columns)
    if not isinstance(source, str | Path):
        raise TypeError(f"data must be a path or a data set id, got {type(source).__name__}")
    rows = tqdm(
        _rows(source, split, subset), desc="reading", unit=" rows", delay=1.0, leave=False, disable=not progress
    )
    return ((where, _renamed(row, where, columns or {})) for where, row in rows)


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raise TypeError or ValueError unless it maps some of `COLUMNS` to one name each, or is None."""
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for pair in columns.items() for name in pair):
        raise TypeError(f"columns must map texts to texts, got {columns!r}")
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"columns: got the name {unknown[0]!r}, expected some of {', '.join(COLUMNS)}")
    if not all(columns.values()) or len(set(columns.values())) < len(columns):
        raise ValueError(f"columns: expected one column for each name, got {dict(columns)}")


def _rows(source: str | Path, split: str | None, subset: str | None) -> Rows:
    path = given_path(source)
    hub = None if isinstance(source, Path) or path.exists() or is_row_file(path) else HUB_ID.fullmatch(source)
    if hub is not None and is_row_file(Path(hub["id"])):
        raise FileNotFoundError(f"{hub['id']}: no such file")
    if hub is not None:
        if split is not None and hub["split"] is not None:
            raise ValueError(f"{source}: got the split {split!r} too, expected one of the two")
        return _hub_rows(hub["id"], subset, split or hub["split"] or SPLIT)
    if subset is not None:
        raise ValueError(f"{source}: got subset={subset!r}, but only data sets of the hub (owner/name) have subsets")
    if path.is_dir():
        return _folder_rows(path, split)
    if isinstance(source, str) and not path.exists() and not is_row_file(path):
        raise FileNotFoundError(f"{source}: no such file or folder, and not a data set id such as owner/name")
    if split is not None:
        raise ValueError(f"{source}: got split={split!r}, but a file is one split: name the file of that split")
    return file_rows(path)


def _hub_rows(name: str, subset: str | None, split: str) -> Rows:
    load_dataset = _library().load_dataset
    configuration = () if subset is None else (subset,)
    try:
        rows = load_dataset(name, *configuration, split=split)
    except (OSError, ImportError):
        raise
    # the library raises whatever it likes: only the place and the options are added
    except Exception as error:
        asked = f"subset {subset or 'not given'}, split {split}"
        raise ValueError(f"{name} ({asked}; --subset and --split choose others): {error}") from error
    yield from _numbered(rows, f"{name}:{split}")


def _folder_rows(folder: Path, split: str | None) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _saved_rows(folder, split)
        return
    if (folder / PROMPTS).is_file():
        raise ValueError(
            f"{folder}: got the folder of a published task ({PROMPTS} is in it): name the task, with --task"
        )
    for path in _files_of(folder, split):
        yield from file_rows(path)


def _saved_rows(folder: Path, split: str | None) -> Rows:
    """Of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written."""
    library = _library()
    try:
        saved = library.load_from_disk(str(folder))
    # the library raises whatever it likes at files that it has not written
    except Exception as error:
        raise ValueError(f"{folder}: expected what `datasets` has saved to disk, got {error!r}") from error
    if isinstance(saved, Mapping):
        if (split or SPLIT) not in saved:
            raise ValueError(f"{folder}: no split {split or SPLIT!r}, expected one of {', '.join(saved)}")
        saved = saved[split or SPLIT]
    elif split is not None and split != str(saved.split):
        raise ValueError(f"{folder}: got split={split!r}, but the folder holds one data set: {saved.split}")
    yield from _numbered(saved, str(folder))


def _files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, in the order of their names: of the folder itself and of `data/` in it."""
    places = (folder, folder / "data")
    files = sorted(p for place in places if place.is_dir() for p in place.iterdir() if is_row_file(p) and p.is_file())
    files = [path for path in files if path.name not in _NOT_ROWS]
    if not files:
        raise FileNotFoundError(f"{folder}: got a folder without rows, expected files of type {', '.join(READERS)}")
    named = [path for path in files if _is_of(path, split or SPLIT)]
    if not named:
        names = ", ".join(path.name for path in files)
        if split is not None or any(_splits_in(path) for path in files):
            raise FileNotFoundError(f"{folder}: no file of the split {split or SPLIT!r}, got {names}")
        named = files
    if several := [path.name for path in named if len(_splits_in(path)) > 1]:
        raise ValueError(
            f"{folder}: expected files that name one split, got {', '.join(several)}: rename them, or give a file "
            "itself in place of the folder"
        )
    if len({path.suffix.lower() for path in named}) > 1:
        names = ", ".join(path.name for path in named)
        raise ValueError(f"{folder}: got files of more than one type, expected one: {names}")
    return named


def _splits_in(path: Path) -> set[str]:
    """The splits that a file's name speaks of, each by its first letters: "tra", "tes", "val", "dev" and "eva"."""
    return {word[:3].lower() for word in _WORDS.findall(path.stem) if _OF_SPLIT.fullmatch(word)}


def _is_of(path: Path, split: str) -> bool:
    if _OF_SPLIT.fullmatch(split):
        return split[:3].lower() in _splits_in(path)
    return re.match(rf"{re.escape(split)}(?![A-Za-z])", path.name) is not None


def _numbered(rows: Iterable, name: str) -> Iterator[tuple[str, object]]:
    return ((f"{name}: row {number}", row) for number, row in enumerate(plain_rows(rows), start=1))


def _library():
    # it takes seconds to import: only for those who use it
    with needing("datasets", "train", "reading a data set"):
        import datasets
    return datasets


def _renamed(row: object, where: str, columns: Mapping[str, str]) -> object:
    if not columns or not isinstance(row, Mapping):
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"{where}: no column {theirs!r} to read as {ours}, got the columns {list(row)}")
    rest = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return rest | {ours: row[theirs] for ours, theirs in columns.items()}
