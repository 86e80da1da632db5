"""Token sequences with common beginnings as trees, in which every distinct token stands once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TokenTree:
    """Token sequences with common beginnings: node i is tokens[i], after node parents[i] (-1: after the prefix).

    depths: of each node below the prefix, from 0. targets: (node, token, question, choice): the token is scored there.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}

    def add(self, question: int, choice: int, start: Sequence[int], ending: Sequence[int]) -> None:
        """A prompt's tokens, not yet run, and the choice's, all of which are scored; the last needs not be run."""
        node = -1
        for i, token in enumerate([*start, *ending]):
            if i >= len(start):
                self.targets.append((node, token, question, choice))
            if i < len(start) + len(ending) - 1:
                node = self._child(node, token)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """A tree without branches."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), list(range(len(tokens))))

    def rows(self) -> int:
        """How many nodes need logits."""
        return len(self.predicting())

    def predicting(self) -> set[int]:
        """The nodes at which a token of a choice is scored: the last one of each prompt, and those of the choices."""
        return {node for node, *_ in self.targets}

    def append(self, other: TokenTree) -> None:
        """Put another tree beside this one."""
        shift = len(self.tokens)
        self.tokens += other.tokens
        self.parents += [parent if parent < 0 else parent + shift for parent in other.parents]
        self.depths += other.depths
        self.targets += [(node + shift, *rest) for node, *rest in other.targets]

    def sight(self, offset: int) -> Tensor:
        """(n, offset + n) bool: whether a node sees each token of the prefix (always) and each node (its ancestors)."""
        seen = torch.zeros(len(self.parents), offset + len(self.parents), dtype=torch.bool)
        seen[:, :offset] = True
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, offset + node] = True
        return seen

    def _child(self, node: int, token: int) -> int:
        if (node, token) not in self._children:
            self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(0 if node < 0 else self.depths[node] + 1)
        return self._children[node, token]


def question_trees(starts, endings, max_tokens: int, max_rows: int) -> Iterator[TokenTree]:
    """A tree per question; one that is too large is split between its choices."""
    for question, (start, rows) in enumerate(zip(starts, endings, strict=True)):
        groups = [list(enumerate(rows))]
        while groups:
            group = groups.pop()
            tree = TokenTree()
            for choice, ending in group:
                tree.add(question, choice, start, ending)
            if len(group) > 1 and (len(tree.tokens) > max_tokens or tree.rows() > max_rows):
                groups += [group[len(group) // 2 :], group[: len(group) // 2]]
            else:
                yield tree


def side_by_side(trees: Iterator[TokenTree], max_tokens: int, max_rows: int) -> Iterator[TokenTree]:
    """Trees side by side, as many as the limits let."""
    row, rows = TokenTree(), 0
    for tree in trees:
        more = tree.rows()
        if row.tokens and (len(row.tokens) + len(tree.tokens) > max_tokens or rows + more > max_rows):
            yield row
            row, rows = TokenTree(), 0
        row.append(tree)
        rows += more
    if row.tokens:
        yield row


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens all prompts begin with, short of the last token of any: that one gives its question's first logits."""
    if not prompts:
        return []
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return list(first[:length])
