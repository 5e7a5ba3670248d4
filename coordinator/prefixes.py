"""Which sequences begin alike: a radix tree over their tokens.

Pure: no clock, no policy. It knows sequences by id and tokens, and nothing of what is cached of them. Sequences of
different salts never meet: who has another salt cannot even tell that a prompt has been here before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.types import SequenceId

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """A sequence that begins as the tokens that were asked for, and how many of them it has."""

    seq: SequenceId
    length: int


class _Node:
    """A point in the tree. Those but the root hold sequences or branch, so there are at most twice as many as
    sequences."""

    __slots__ = ("children", "edge", "parent", "seqs")

    def __init__(self, edge: Tokens, parent: _Node | None) -> None:
        self.edge = edge  # from the parent to here
        self.parent = parent
        self.children: dict[int, _Node] = {}  # by their edge's first token
        self.seqs: dict[SequenceId, None] = {}  # those that end here, in the order in which they came

    def below(self, but: _Node | None = None) -> Iterator[SequenceId]:
        """The sequences here and further down, without those in one child."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            yield from reversed(node.seqs)
            nodes += (child for child in node.children.values() if child is not but)


class PrefixTree:
    """Sequences by their tokens."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}  # by salt
        self._nodes: dict[SequenceId, tuple[str, _Node]] = {}  # where each sequence ends

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, seq: SequenceId) -> bool:
        return seq in self._nodes

    def put(self, seq: SequenceId, salt: str, tokens: Sequence[int]) -> None:
        """Remember a sequence, or that it has these tokens now."""
        self.remove(seq)
        node = self._roots.setdefault(salt, _Node((), None))
        whole, at = tuple(tokens), 0
        while at < len(whole):
            child = node.children.get(whole[at])
            if child is None:
                child = node.children[whole[at]] = _Node(whole[at:], node)
            elif (common := _common(child.edge, whole, at)) < len(child.edge):
                child = _split(child, common)
            at += len(child.edge)
            node = child
        node.seqs[seq] = None
        self._nodes[seq] = (salt, node)

    def remove(self, seq: SequenceId) -> None:
        """Forget a sequence; unknown ones are no error."""
        salt, node = self._nodes.pop(seq, ("", None))
        if node is None:
            return
        del node.seqs[seq]
        while (parent := node.parent) is not None and not node.seqs and len(node.children) < 2:
            if node.children:
                _join(node)
                return
            del parent.children[node.edge[0]]
            node = parent
        if node.parent is None and not node.seqs and not node.children:
            del self._roots[salt]

    def clear(self) -> None:
        self._roots.clear()
        self._nodes.clear()

    def shared(self, salt: str, tokens: Sequence[int]) -> Iterator[Shared]:
        """Every sequence that begins with at least the first of these tokens, those that share most of them first. The
        tree must not change meanwhile."""
        path: list[tuple[_Node, int]] = []  # with how many of the tokens lead there
        node, whole, at = self._roots.get(salt), tuple(tokens), 0
        while node is not None and at < len(whole):
            node = node.children.get(whole[at])
            if node is not None:
                common = _common(node.edge, whole, at)
                at += common
                path.append((node, at))
                if common < len(node.edge):
                    break
        passed: _Node | None = None
        for node, count in reversed(path):
            for seq in node.below(passed):
                yield Shared(seq, count)
            passed = node


def _common(edge: Tokens, whole: Tokens, at: int) -> int:
    """How many first tokens of the edge are those from `at` on. Slices compare in C, tokens one by one do not."""
    low, high = 0, min(len(edge), len(whole) - at)
    if edge[:high] == whole[at : at + high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if edge[low:middle] == whole[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low


def _split(node: _Node, at: int) -> _Node:
    """A new node on the node's edge, after so many of its tokens."""
    parent = node.parent
    assert parent is not None, "the root has no edge"
    upper = _Node(node.edge[:at], parent)
    parent.children[node.edge[0]] = upper
    node.edge, node.parent = node.edge[at:], upper
    upper.children[node.edge[0]] = node
    return upper


def _join(node: _Node) -> None:
    """Let the only child of a node that nothing needs take its place."""
    parent, (child,) = node.parent, node.children.values()
    assert parent is not None, "the root stays"
    child.edge, child.parent = node.edge + child.edge, parent
    parent.children[child.edge[0]] = child
