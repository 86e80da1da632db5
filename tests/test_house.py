"""The rules of the house: who may import whom, what importing costs, what things are called."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import lofit_fast
import lofit_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = {"lofit_kernels": ROOT / "kernels" / "lofit_kernels", "lofit_fast": ROOT / "lofit_fast"}

SOURCES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}


@cache
def imports_of(module: str) -> set[str]:
    """Full names of all that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_the_version_is_imported_from_the_top():
    names = {name for module in SOURCES for name in imports_of(module) if name.count(".") == 1}
    tops = {name for name in names if name.startswith("lofit_fast.") and name not in SOURCES}
    assert tops <= {"lofit_fast.__version__"}


def test_triton_stays_in_its_room():
    users = {module for module in SOURCES if any(n.split(".")[0] == "triton" for n in imports_of(module))}
    assert all(module.startswith("lofit_kernels.gpu.") for module in users)


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


FOLDERS = ("kernels", "lofit_fast", "benchmarks", "examples", "tests")
# a package and its command, and what pytest looks for by name
SHARED = {"__init__", "__main__", "conftest"}


def test_no_file_is_named_for_nothing():
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert names


def test_no_two_modules_share_a_name():
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    named = {}
    for path in paths:
        if path.stem not in SHARED:
            named.setdefault(path.stem, []).append(str(path))
    assert {name: found for name, found in named.items() if len(found) > 1} == {}
    assert len(named) > 100


def public_definitions(tree: ast.Module):
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))
                yield from ((f"{node.name}.{m.name}", m) for m in methods)


@pytest.mark.parametrize("module", SOURCES)
def test_everything_public_is_documented(module):
    tree = ast.parse(SOURCES[module].read_text())
    bare = [name for name, node in public_definitions(tree) if ast.get_docstring(node) is None]
    assert bare == []
    assert ast.get_docstring(tree)


# what each of the tests below needs to know of a fresh interpreter, in one, since each takes seconds to import torch:
# light imports first. the path has the checkout, then its kernels/, and at last a package of that name
FRESH = """
    import importlib.metadata, json, os, sys
    seen, before = {}, dict(os.environ)

    import lofit_fast, lofit_kernels, torch
    heavy = {"triton", "transformers", "peft", "accelerate", "datasets", "matplotlib"}
    seen["heavy"] = sorted(heavy & set(sys.modules))
    seen["cuda"] = torch.cuda.is_initialized()
    seen["environment"] = dict(os.environ) == before

    # the tile table is read where there is no Triton
    sys.modules["triton"] = None
    import lofit_kernels.gpu.tiles
    del sys.modules["triton"]
    seen["tiles"] = torch.cuda.is_initialized()

    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import is_kernels_available
    seen["installed"] = any(found.name == "kernels" for found in importlib.metadata.distributions())
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    assert LlamaForCausalLM(config) is not None
    seen["available"] = is_kernels_available()

    sys.path.append(STAND_IN)
    sys.modules.pop("kernels", None)
    import kernels
    seen["kernels"] = [getattr(kernels, "__file__", None), importlib.metadata.version("kernels")]
    print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh interpreter saw, and the folder of a package called kernels that it met last."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("__version__ = '0.16.0'\n")
    metadata = folder / "kernels-0.16.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    # the checkout comes first
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", f"STAND_IN = {str(folder)!r}\n" + textwrap.dedent(FRESH)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


def test_importing_loads_neither_triton_nor_transformers(fresh):
    assert (fresh["heavy"], fresh["cuda"], fresh["environment"]) == ([], False, True)


def test_the_tile_table_needs_no_triton(fresh):
    assert fresh["tiles"] is False


@pytest.mark.parametrize("module", [lofit_fast, lofit_kernels], ids=lambda module: module.__name__)
def test_every_public_name_is_there(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_checkout_does_not_pose_as_kernels(fresh):
    if fresh["installed"]:
        pytest.skip("Hugging Face's kernels is installed here")
    assert fresh["available"] is False


def test_checkout_does_not_shadow_kernels(fresh):
    if fresh["installed"]:
        pytest.skip("Hugging Face's kernels is installed here")
    assert fresh["kernels"] == [str(fresh["folder"] / "kernels" / "__init__.py"), "0.16.0"]
