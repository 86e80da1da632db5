"""What the packages import is what setup.py declares, and nothing of it executes what it reads."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = [*sorted((ROOT / "lofit_fast").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
PROGRAMS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
OURS = {"lofit_fast", "lofit_kernels"}
# declared and imported by nobody of us: transformers imports them, for training and for what it reads
FOR_TRANSFORMERS = {"accelerate", "bitsandbytes"}

# modules that are imported where preferences are trained or models are served, and where the extra is named if it is
# missing
EARLY = {
    "lofit_fast/training/preference_trainer.py": {"datasets", "trl"},
    # `lofit_fast/peft/__init__.py` says what is missing
    **{
        f"lofit_fast/peft/{name}.py": {"peft"}
        for name in ("lofit_peft_config", "lofit_peft_layer", "lofit_peft_model", "registration")
    },
    "lofit_fast/serving/openai_requests.py": {"pydantic"},
    "lofit_fast/serving/web_app.py": {"fastapi"},
    "lofit_fast/serving/web_server.py": {"uvicorn"},
}


def declared() -> dict[str, set[str]]:
    """Extra -> the packages that setup.py installs with it; "" for what is always installed."""
    names: dict[str, object] = {}

    def value(node: ast.expr):
        if isinstance(node, ast.Name):
            return names[node.id]
        if isinstance(node, ast.List):
            return [
                part for item in node.elts for part in (value(item) if isinstance(item, ast.Starred) else [value(item)])
            ]
        return value(node.value) if isinstance(node, ast.Starred) else ast.literal_eval(node)

    tree = ast.parse((ROOT / "setup.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            names[node.targets[0].id] = value(node.value)
        elif isinstance(node, ast.AugAssign):
            names[node.target.id] = [*names[node.target.id], *value(node.value)]
    (call,) = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = given["extras_require"]
    rows = {"": value(given["install_requires"])} | {
        key.value: value(row) for key, row in zip(extras.keys, extras.values, strict=True)
    }
    return {extra: {_package(requirement) for requirement in row} for extra, row in rows.items()}


def _package(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].replace("-", "_")


@cache
def read(path: Path) -> tuple[list[tuple[str, ast.stmt]], list[tuple[str, ast.Call]]]:
    """(package, statement) of every import of a file, in functions and under TYPE_CHECKING too; (dotted name, call) of
    every call whose function has one."""
    imported, called = [], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported += [(alias.name.partition(".")[0], node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append((node.module.partition(".")[0], node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called.append((ast.unparse(node.func), node))
    return imported, called


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Of those, imports of what is neither ours nor Python's own."""
    return [(name, node) for name, node in read(path)[0] if name not in OURS and name not in sys.stdlib_module_names]


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return read(path)[1]


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def test_what_is_imported_is_installed_with_the_package_or_an_extra():
    installed = set().union(*declared().values())
    assert [
        f"{where(path, node)}: {name}" for path in PRODUCT for name, node in imports(path) if name not in installed
    ] == []


def test_what_is_installed_is_imported():
    imported = {name for path in PRODUCT for name, _ in imports(path)}
    extras = declared()
    assert extras[""] <= imported
    library = set().union(*(extras[name] for name in ("train", "peft", "preferences", "quantized", "serve")))
    assert library - imported == FOR_TRANSFORMERS - {"accelerate"}
    # bench, test and dev are of the checkout alone
    extras_of_users = {"train", "peft", "preferences", "quantized", "flash", "gguf", "serve"}
    assert extras.keys() == {"", *extras_of_users, "bench", "test", "dev"}


def test_an_error_names_the_extra_that_brings_the_package():
    extras = declared()
    named = [
        (path, node) for path in PRODUCT for name, node in calls(path) if name == "needing" and len(node.args) == 3
    ]
    pairs = {(node.args[0].value.lower(), node.args[1].value) for _, node in named}
    assert len(pairs) > 5
    assert [(package, extra) for package, extra in sorted(pairs) if package not in extras[extra]] == []


def test_what_needs_an_extra_is_imported_where_it_is_used():
    """Importing a module of the library never fails for it. The commands are an extra's own."""
    extras = declared()
    optional = set().union(*extras.values()) - extras[""]
    found = {str(path.relative_to(ROOT)): top_level(path) & optional for path in PRODUCT}
    early = {path: names for path, names in found.items() if names and not path.startswith("lofit_fast/cli/")}
    assert early == EARLY


def top_level(path: Path) -> set[str]:
    """Packages that importing a file imports."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


# modules that execute what they read, or that start a program
EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "yaml", "code"}
# writes pickles, for the library to refuse
PLANTING = ROOT / "benchmarks" / "proof" / "reliability" / "file_mutations.py"
STARTING = {"subprocess", "pty", "runpy", "imp"}
RUNNING = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler"}
RUNNING |= {"os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv"}


@pytest.mark.parametrize(
    "banned, paths", [(EXECUTING | STARTING, PRODUCT), (EXECUTING, PROGRAMS)], ids=["product", "all"]
)
def test_nothing_that_executes_is_imported(banned, paths):
    found = [(path, name, node) for path in paths if path != PLANTING for name, node in read(path)[0]]
    assert [f"{where(path, node)}: {name}" for path, name, node in found if name in banned] == []


def executes(name: str, call: ast.Call) -> str | None:
    """Why a call may execute what it reads; None where it cannot."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    literal = {key: node.value for key, node in keywords.items() if isinstance(node, ast.Constant)}
    if name in RUNNING:
        return f"{name}()"
    if name == "torch.load" and literal.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if "allow_pickle" in keywords and literal.get("allow_pickle") is not False:
        return "allow_pickle"
    if "trust_remote_code" in keywords and literal.get("trust_remote_code") is not False:
        return "trust_remote_code"
    if "shell" in keywords and literal.get("shell") is not False:
        return "a shell"
    return None


def test_nothing_is_executed():
    found = [(where(path, call), executes(name, call)) for path in (*PRODUCT, *PROGRAMS) for name, call in calls(path)]
    assert [(place, reason) for place, reason in found if reason is not None] == []
    assert len(found) > 1000


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=asked)",
        "eval(text)",
        "os.system(text)",
        "run(command, shell=True)",
    ],
)
def test_what_would_be_found(source):
    call = ast.parse(source).body[0].value
    assert executes(ast.unparse(call.func), call) is not None


def test_whoever_loads_a_model_says_that_its_code_is_not_run():
    """transformers asks at the terminal where nobody has said so."""
    loading = [(path, node) for path in PRODUCT for name, node in calls(path) if name.endswith(".from_pretrained")]
    assert len(loading) >= 6
    for path, call in loading:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", where(path, call)
        reads_weights = not ast.unparse(call.func).startswith(
            ("AutoConfig", "AutoTokenizer", "transformers.AutoConfig")
        )
        # a GGUF file is read by transformers' own reader
        if reads_weights and path.name != "gguf.py":
            assert given.get("use_safetensors") == "True", where(path, call)
