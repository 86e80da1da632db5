"""What is released: a wheel of the two packages and nothing else, the same bytes each time, and a source that tests."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"lofit_fast": ROOT / "lofit_fast", "lofit_kernels": ROOT / "kernels" / "lofit_kernels"}
# what a checkout has, beside what was built or run in it
SOURCES = ("benchmarks", "docs", "examples", "kernels", "lofit_fast", "tests")
FILES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
)
# a date before 1980 is none in a zip file
EPOCH = "1700000000"


def build(kind: str, folder: Path, *, umask: int = 0o022) -> Path:
    """Copy the checkout into folder/source and build a "wheel" or "sdist" of it there, by setuptools as pip does."""
    source, out = folder / "source", folder / "out"
    source.mkdir(parents=True)
    before = os.umask(umask)
    try:
        for name in SOURCES:
            shutil.copytree(
                ROOT / name, source / name, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in FILES:
            shutil.copyfile(ROOT / name, source / name)
        code = f"import setuptools.build_meta as build; print(build.build_{kind}({str(out)!r}))"
        environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
    expected = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.name == "page"
    }
    metadata = {name for name in names if ".dist-info/" in name}
    assert set(names) - metadata == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    parts = {name.partition(".dist-info/")[2] for name in metadata}
    assert parts == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


@pytest.mark.slow
def test_the_wheel_built_twice_is_the_same_bytes(tmp_path):
    # another folder, another time, another umask
    first, second = build("wheel", tmp_path / "a"), build("wheel", tmp_path / "b" / "elsewhere", umask=0o077)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_the_source_distribution_tests_itself(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    tracked = {path.relative_to(ROOT) for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_file()}
    wanted = {str(path) for path in tracked if "__pycache__" not in path.parts and path.suffix != ".pyc"} | set(FILES)
    assert wanted - names == set()
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "runs"))]
