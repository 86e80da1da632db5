"""The kernels' jit bodies, the families that use them, and every mutant of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.proof.mutation_operators import OPERATORS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "lofit_kernels"
SUITES = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One fault in one body: what the line was, what it became, and the families whose kernels run it."""

    module: Module
    kernel: str
    operator: str
    line: str
    becomes: str
    families: tuple[str, ...]
    # (node that holds the replaced one, its field, place in that field or None), and the replacement
    place: tuple[ast.AST, str, int | None]
    replacement: ast.AST

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the table of reasons knows it by."""
        return self.kernel, self.operator, self.line, self.becomes

    def source(self) -> str:
        """The module's text with this fault in it."""
        with _Replaced(self.place, self.replacement):
            return ast.unparse(ast.fix_missing_locations(self.module.tree))


class _Replaced:
    """The tree with another node in one place, for a while."""

    def __init__(self, place: tuple[ast.AST, str, int | None], replacement: ast.AST) -> None:
        self.place, self.replacement = place, replacement

    def _swap(self) -> None:
        holder, name, number = self.place
        if number is None:
            there = getattr(holder, name)
            setattr(holder, name, self.replacement)
        else:
            there = getattr(holder, name)[number]
            getattr(holder, name)[number] = self.replacement
        self.replacement = there

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


class Module:
    """One file of the Triton path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.tree = ast.parse(path.read_text())
        self.functions = {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}

    @property
    def bodies(self) -> list[ast.FunctionDef]:
        """Its functions under @triton.jit."""
        return [f for f in self.functions.values() if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Name here -> (module of the Triton path, name there)."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lofit_kernels.gpu."):
                module = node.module.rsplit(".", 1)[-1]
                found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
        return found


def modules() -> dict[str, Module]:
    """Every file that has a jit body, by name."""
    found = (Module(path) for path in sorted((PACKAGE / "gpu").glob("*.py")))
    return {module.name: module for module in found if module.bodies}


def suites() -> dict[str, tuple[str, ...]]:
    """Family -> the modules with its cases: kill_FAMILY.py. A family is a file of kernels."""
    return {path.stem.removeprefix("kill_"): (path.stem,) for path in sorted(SUITES.glob("kill_*.py"))}


def _used(module: Module, everything: dict[str, Module]) -> set[tuple[str, str]]:
    """(module, function) of all that the functions of `module` reach."""
    waiting, seen = [(module.name, name) for name in module.functions], set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        home = everything[place[0]]
        for node in ast.walk(home.functions[place[1]]):
            if isinstance(node, ast.Name):
                target = home.imported.get(node.id, (home.name, node.id))
                if target[0] in everything and target[1] in everything[target[0]].functions:
                    waiting.append(target)
    return seen


def _places(node: ast.AST, statement: ast.stmt | None = None) -> Iterator[tuple[tuple, ast.AST, ast.stmt]]:
    """Every node below `node`, with its place in the tree and the statement it belongs to."""
    for name, value in ast.iter_fields(node):
        for number, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(child, ast.AST):
                belongs = child if isinstance(child, ast.stmt) else statement
                yield (node, name, number), child, belongs
                yield from _places(child, belongs)


def _text(statement: ast.stmt) -> str:
    """A statement in one line, without what is inside its block."""
    body = getattr(statement, "body", None)
    if body is None:
        return ast.unparse(statement)
    statement.body, rest = [ast.Pass()], getattr(statement, "orelse", None)
    if rest is not None:
        statement.orelse = []
    try:
        return ast.unparse(statement).splitlines()[0]
    finally:
        statement.body = body
        if rest is not None:
            statement.orelse = rest


def mutants_of_body(module: Module, body: ast.FunctionDef, families: tuple[str, ...]) -> Iterator[Mutant]:
    names = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
    names |= {argument.arg for argument in body.args.args}
    seen = set()
    for place, node, statement in list(_places(body)):
        if place[0] is body and place[1] != "body":
            continue
        if statement is None or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            continue
        line = _text(statement)
        for operator, mutate in OPERATORS.items():
            for replacement in list(mutate(node, names)):
                ast.fix_missing_locations(replacement)
                with _Replaced(place, replacement):
                    becomes = _text(replacement if node is statement else statement)
                mutant = Mutant(module, body.name, operator, line, becomes, families, place, replacement)
                if becomes != line and (id(statement), becomes) not in seen:
                    seen.add((id(statement), becomes))
                    yield mutant


def mutants() -> list[Mutant]:
    """All of them, in the order of the sources. Raises ValueError for a body that no family's cases run."""
    everything, families = modules(), suites()
    used = {family: _used(everything[family], everything) for family in families}
    found = []
    for module in everything.values():
        for body in module.bodies:
            users = tuple(family for family in families if (module.name, body.name) in used[family])
            if not users:
                raise ValueError(f"{module.name}.{body.name}: no cases; expected tests/proof/kill_{module.name}.py")
            found += mutants_of_body(module, body, users)
    return found
