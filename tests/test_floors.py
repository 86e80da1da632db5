"""The least versions that setup.py asks for are the very ones that `make test-oldest` installs."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.speed.gpu.__main__ import REQUIRED

ROOT = Path(__file__).parents[1]


def floors():
    """Package -> the least versions asked for, over all extras."""
    found = {}
    for name, version in re.findall(r'"([A-Za-z][\w-]*)>=([\d.]+)', (ROOT / "setup.py").read_text()):
        found.setdefault(name, set()).add(Version(version))
    return found


def pinned(name):
    """Package -> the versions that a constraints file names, one for each environment marker."""
    found = {}
    lines = (ROOT / name).read_text().splitlines()
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found.setdefault(requirement.name, set()).add(Version(specifier.version))
    return found


def test_one_floor_for_each_package():
    assert {name: versions for name, versions in floors().items() if len(versions) != 1} == {}


def test_floors_are_the_oldest_versions_that_are_run():
    asked, run = floors(), pinned("constraints-oldest.txt")
    needed = re.findall(
        r'"([\w-]+)>=', re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.S)[1]
    )
    assert {"torch", "triton", "transformers", "safetensors", "huggingface_hub", "filelock", "tqdm"} == set(needed)
    assert set(needed) <= run.keys()
    assert {name: (asked[name], run[name]) for name in asked.keys() & run.keys() if asked[name] != run[name]} == {}


def test_floors_are_no_newer_than_the_tested_versions():
    tested = pinned("constraints.txt")
    assert {name: version for name, (version,) in floors().items() if version > min(tested.get(name, {version}))} == {}


def test_the_oldest_package_that_builds_ours_is_run():
    (needed,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert pinned("constraints-oldest.txt")["setuptools"] == {Version(needed.removeprefix("setuptools>="))}


def test_the_gpu_script_needs_what_the_package_needs():
    asked = floors()
    assert {name: {Version(".".join(map(str, least)))} for name, least in REQUIRED.items()} == {
        name: asked[name] for name in REQUIRED
    }
