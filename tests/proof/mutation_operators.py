"""The mutation operators: each turns one node of a kernel's syntax tree into faulty variants of it.

sign        + for -, - for +
mask        a condition dropped, weakened, moved by one or turned round; a mask left out
stride      a factor of a product left out, one stride in place of another
index       one off, rows for columns, quotient for remainder, one index in place of another
dtype       a conversion left out, a narrower type
accumulate  = for +=, a sum that forgets or starts elsewhere, a store or a statement left out
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from copy import deepcopy

Mutation = Iterator[ast.AST]
# what stands in for a name, where the kernel has both
NEIGHBOURS = (
    ("row", "column"),
    ("rows", "columns"),
    ("head", "slot"),
    ("chunk", "slot"),
    ("t", "n"),
    ("n", "k"),
    ("k", "t"),
    ("s", "d"),
    ("first", "end"),
    ("T", "N"),
    ("N", "K"),
    ("D", "K"),
    ("n_scale", "n_offset"),
    ("n_da", "n_scale"),
    ("n_rows", "n_columns"),
    ("n_n", "n_d"),
    ("n_k", "n_d"),
    ("block_t", "block_n"),
    ("block_t", "block_k"),
    ("down", "across"),
    ("scale_heads", "offset_heads"),
    ("scale_row", "row"),
    ("inside", "on_scale"),
    ("inside", "scaled"),
    ("sum_gz", "sum_g"),
    ("g", "gz"),
    ("BLOCK_R", "BLOCK_C"),
)
NARROWER = {"float64": "float32", "float32": "float16", "int64": "int32", "int32": "int16"}
FLIPPED = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}


def _function(node: ast.AST) -> str:
    """The name a call calls, without what it belongs to."""
    called = node.func if isinstance(node, ast.Call) else None
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def sign(node: ast.AST, names: set[str]) -> Mutation:
    other = {ast.Add: ast.Sub, ast.Sub: ast.Add}
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in other:
        yield _with(node, op=other[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand


def mask(node: ast.AST, names: set[str]) -> Mutation:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
        for other in FLIPPED[type(node.ops[0])]:
            yield _with(node, ops=[other()])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield node.left
        yield node.right
    if isinstance(node, ast.BoolOp) and not any(_about_none(value) for value in node.values):
        yield from node.values
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    if isinstance(node, ast.If) and not _about_none(node.test):
        yield _with(node, test=ast.Constant(True))
        yield _with(node, test=ast.Constant(False))
    if _function(node) in ("load", "store") and any(keyword.arg == "mask" for keyword in node.keywords):
        yield _with(node, keywords=[])
    if _function(node) == "where":
        yield node.args[1]
        yield node.args[2]
    if _function(node) in ("minimum", "maximum"):
        yield from node.args


def _about_none(test: ast.AST) -> bool:
    """Whether the test is about an argument that was left out: turned round it is no kernel any more."""
    return any(isinstance(op, ast.Is | ast.IsNot) for part in ast.walk(test) for op in getattr(part, "ops", []))


def stride(node: ast.AST, names: set[str]) -> Mutation:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield node.left
        yield node.right
    if isinstance(node, ast.Name) and node.id.startswith("stride"):
        for other in sorted(name for name in names if name.startswith("stride") and name != node.id):
            yield _with(node, id=other)


def index(node: ast.AST, names: set[str]) -> Mutation:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
        yield _with(node, op=ast.Mod() if isinstance(node.op, ast.FloorDiv) else ast.FloorDiv())
    if _function(node) == "cdiv":
        yield ast.BinOp(node.args[0], ast.FloorDiv(), node.args[1])
    if isinstance(node, ast.Tuple) and [ast.unparse(part) for part in node.elts] in ([":", "None"], ["None", ":"]):
        yield _with(node, elts=node.elts[::-1])
    if _function(node) == "range" and len(node.args) > 1:
        step = node.args[2] if len(node.args) > 2 else ast.Constant(1)
        yield _with(node, args=[ast.BinOp(node.args[0], ast.Add(), step), *node.args[1:]])
        yield _with(node, args=[node.args[0], ast.BinOp(node.args[1], ast.Sub(), step), *node.args[2:]])
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        for pair in NEIGHBOURS:
            if node.id in pair and set(pair) <= names:
                yield _with(node, id=pair[pair[0] == node.id])


def dtype(node: ast.AST, names: set[str]) -> Mutation:
    if _function(node) == "to" and isinstance(node.func, ast.Attribute):
        yield node.func.value
    if _function(node) in ("cast", "round_to"):
        yield node.args[0]
    if isinstance(node, ast.Attribute) and node.attr in NARROWER:
        yield _with(node, attr=NARROWER[node.attr])
    if isinstance(node, ast.Name) and node.id == "ACC":
        yield _parse("tl.float16")


def accumulate(node: ast.AST, names: set[str]) -> Mutation:
    if isinstance(node, ast.AugAssign):
        yield ast.Assign([node.target], node.value)
        yield ast.Pass()
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        for number, argument in enumerate(node.value.args):
            if ast.unparse(argument) == ast.unparse(node.targets[0]):
                forgetful = deepcopy(node.value)
                forgetful.args[number] = ast.BinOp(argument, ast.Mult(), ast.Constant(0))
                yield _with(node, value=forgetful)
    if _function(node) == "zeros":
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))
    if isinstance(node, ast.Constant) and type(node.value) is float:
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.Expr) and _function(node.value) == "store":
        yield ast.Pass()
    if _function(node) in ("sum", "max"):
        yield _parse(f"tl.min({', '.join(map(ast.unparse, node.args))})")


OPERATORS: dict[str, Callable[[ast.AST, set[str]], Mutation]] = {
    operator.__name__: operator for operator in (sign, mask, stride, index, dtype, accumulate)
}
