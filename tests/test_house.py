"""The rules of the house: who may import whom, what importing costs, what things are called."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"lofit_kernels": ROOT / "kernels" / "lofit_kernels", "lofit_fast": ROOT / "lofit_fast"}

# a module may import those before it in its own list, and never those after; a package stands for its modules
ORDER = {
    "lofit_kernels": [
        "reference",
        "roofline",
        "measured",
        "plan",
        "aten",
        "gpu",
        "projection",
        "ops",
        "traced",
        "functional",
        "autotune",
    ],
    "lofit_kernels.gpu": [
        "tiles",
        "jit",
        "offset",
        "grouped",
        "affine",
        "matmul",
        "forward",
        "backward",
        "primitives",
        "catalogue",
    ],
    "lofit_fast": [
        "config",
        "architectures",
        "packing",
        "attention",
        "files",
        "layer",
        "folding",
        "head",
        "heads",
        "adapter",
        "merge",
        "tasks",
        "encoding",
        "reference",
        "patch",
        "models",
        "scoring",
        "probing",
        "evaluation",
        "baselines",
        "plots",
        "planning",
        "bench_results",
        "bench_figures",
        "bench_report",
        "training",
        "demo",
        "paper",
        "cli_plan",
        "cli_select",
        "cli_paper",
        "cli",
    ],
    "lofit_fast.paper": [
        "cells",
        "bootstrap",
        "methods",
        "settings",
        "experiments",
        "tuning",
        "estimate",
        "run",
        "tables",
        "figures",
        "report",
        "session",
        "data",
        "fitting",
        "execute",
    ],
    "lofit_fast.baselines": [
        "attachment",
        "hook",
        "original",
        "prompting",
        "edits",
        "positions",
        "iti",
        "repe",
        "lora",
        "red",
        "loreft",
        "jola",
        "rivals",
    ],
    "lofit_fast.tasks": [
        "task",
        "contrast",
        "source",
        "clutrr",
        "completion",
        "kinship",
        "mquake",
        "open_domain",
        "truthfulqa",
    ],
    "lofit_fast.training": [
        "batching",
        "collate",
        "arguments",
        "passes",
        "heap",
        "narrow",
        "engine",
        "packed",
        "timings",
        "probe",
        "measure",
        "profile",
        "run",
        "prefix_store",
        "stand_ins",
        "prefix",
        "trainer",
        "dpo_trainer",
        "settled",
        "supervised",
        "recipe",
        "dpo",
        "objective",
        "selection",
        "report",
        "grid",
        "sweep_run",
        "workers",
        "sweep",
    ],
}
# what a package's modules may import at all, of what the rules speak of
FORBIDDEN = {"lofit_kernels": {"lofit_fast", "transformers", "peft", "accelerate", "datasets"}, "lofit_fast": set()}

SOURCES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST, module: str) -> set[str]:
    """Full names of all that is imported below the node, inside functions too, except for type checkers."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative import"
            found |= {f"{child.module}.{alias.name}" for alias in child.names}
        found |= imports(child, module)
    return found


def imports_of(module: str) -> set[str]:
    return imports(ast.parse(SOURCES[module].read_text()), module)


def below(package: str, name: str) -> str | None:
    """The module or package directly below `package` that a full name leads into."""
    rest = name.removeprefix(f"{package}.") if name.startswith(f"{package}.") else ""
    first = rest.split(".")[0]
    return first if f"{package}.{first}" in SOURCES else None


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    order = ORDER[package]
    broken = []
    for module in SOURCES:
        importer = below(package, module)
        if importer is None:
            continue
        for name in imports_of(module):
            imported = below(package, name)
            if imported is not None and imported != importer and order.index(imported) > order.index(importer):
                broken.append(f"{module} imports {name}")
    assert broken == []


@pytest.mark.parametrize("package", ORDER)
def test_every_module_has_its_place(package):
    folder = PACKAGES[package.split(".")[0]].joinpath(*package.split(".")[1:])
    there = {p.stem for p in folder.iterdir() if (p.suffix == ".py" or (p / "__init__.py").exists())} - {"__init__"}
    assert there <= set(ORDER[package])


def test_only_the_version_is_imported_from_the_top():
    public = {name for module in SOURCES for name in imports_of(module) if name.count(".") == 1}
    tops = {name for name in public if name.startswith("lofit_fast.") and below("lofit_fast", name) is None}
    assert tops <= {"lofit_fast.__version__"}


@pytest.mark.parametrize("module", SOURCES)
def test_forbidden_imports(module):
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert not roots & FORBIDDEN[module.split(".")[0]]


def test_triton_stays_in_its_room():
    users = {module for module in SOURCES if any(n.split(".")[0] == "triton" for n in imports_of(module))}
    assert all(module.startswith("lofit_kernels.gpu.") for module in users)


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_is_named_for_nothing():
    names = {
        p.name for folder in ("kernels", "lofit_fast", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    }
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert names


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


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter with `path` on sys.path, in that order. Returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in path)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_loads_neither_triton_nor_transformers():
    code = """
        import os, sys
        before = dict(os.environ)
        import lofit_fast, lofit_kernels
        import torch
        heavy = {"triton", "transformers", "peft", "accelerate", "datasets", "matplotlib"}
        print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized(), dict(os.environ) == before)
    """
    assert python(code, ROOT / "kernels", ROOT) == "[] False True"


def test_every_public_name_is_there():
    code = """
        import lofit_fast, lofit_kernels
        later = {"Engine", "fit"}
        print([n for m in (lofit_fast, lofit_kernels) for n in m.__all__ if n not in later and not hasattr(m, n)])
    """
    assert python(code, ROOT / "kernels", ROOT) == "[]"


def test_checkout_does_not_pose_as_kernels():
    code = """
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import is_kernels_available
        import importlib.metadata
        installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
        config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        assert LlamaForCausalLM(config) is not None
        print(installed, is_kernels_available())
    """
    installed, available = python(code, ROOT, ROOT / "kernels").split()
    if installed == "True":
        pytest.skip("Hugging Face's kernels is installed here")
    assert available == "False"


def test_checkout_does_not_shadow_kernels(tmp_path):
    stand_in = tmp_path / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("__version__ = '0.16.0'\n")
    metadata = tmp_path / "kernels-0.16.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n")
    code = """
        import importlib.metadata, kernels
        import lofit_fast, lofit_kernels
        print(kernels.__file__, importlib.metadata.version("kernels"))
    """
    # the checkout comes first
    assert python(code, ROOT, ROOT / "kernels", tmp_path) == f"{stand_in / '__init__.py'} 0.16.0"
