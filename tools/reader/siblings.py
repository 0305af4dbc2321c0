"""Two algorithms' files, definition by definition: what is the same, what differs, what only one of them has."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from tools.reader.source import Source

CONTEXT = 2  # equal lines around a change
AT_LEAST, AT_MOST, CLOSE = (
    2,
    4,
    0.3,
)  # siblings of a file; the share of equal lines from which one is offered beside two


@dataclass
class Part:
    """A definition that differs: rows of (mark, line here, line there); ("…", 0, 0) stands for equal lines between."""

    name: str
    kind: str  # "differs", "only here", "only there"
    rows: list[tuple[str, int, int]]

    def pairs(self) -> list[tuple[int, int]]:
        """(line here, line there) of lines that took each other's place: blocks of as many - as +."""
        found = []
        for block in re.finditer(r"(-+)(\++)", "".join(mark for mark, _, _ in self.rows)):
            if len(block[1]) == len(block[2]):
                size, start = len(block[1]), block.start()
                found += [(self.rows[start + k][1], self.rows[start + size + k][2]) for k in range(size)]
        return found

    @property
    def plus(self) -> int:
        return sum(mark == "+" for mark, _, _ in self.rows)

    @property
    def minus(self) -> int:
        return sum(mark == "-" for mark, _, _ in self.rows)


def likeness(here: Source, there: Source) -> float:
    """The share of equal lines, docstrings apart."""
    a, b = ([line for line in x.lines[x.segments[0].last :] if line.strip()] for x in (here, there))
    equal = sum(block.size for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return 2 * equal / (len(a) + len(b))


def closest(here: Source, likenesses: dict[frozenset, float], names: list[str]) -> list[str]:
    """The siblings that a file is compared with, the closest first."""
    others = sorted((x for x in names if x != here.name), key=lambda x: -likenesses[frozenset((here.name, x))])
    close = [x for x in others if likenesses[frozenset((here.name, x))] >= CLOSE]
    return others[: max(AT_LEAST, min(AT_MOST, len(close)))]


def rows(here: list[str], there: list[str], first_here: int, first_there: int) -> list[tuple[str, int, int]]:
    """A unified diff of two definitions, whose lines are numbered as in their files."""
    out = []
    for k, group in enumerate(SequenceMatcher(None, here, there, autojunk=False).get_grouped_opcodes(CONTEXT)):
        if k:
            out.append(("…", 0, 0))
        for tag, a, b, c, d in group:
            if tag == "equal":
                out += [(" ", first_here + i, first_there + j) for i, j in zip(range(a, b), range(c, d), strict=True)]
            else:
                out += [("-", first_here + i, 0) for i in range(a, b)]
                out += [("+", 0, first_there + j) for j in range(c, d)]
    return out


def changed(here: str, there: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where two lines that took each other's place differ, as (first, behind the last) character of whole words.

    Nothing is told of lines that have little in common.
    """
    a, b = (re.findall(r"\w+|\s+|.", line) for line in (here, there))
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < 0.5:
        return [], []
    spans = [], []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag != "equal":
            for out, words, first, last in ((spans[0], a, i, j), (spans[1], b, k, m)):
                start = len("".join(words[:first]))
                out.append((start, start + len("".join(words[first:last]))))
    return tuple([span for span in side if span[0] < span[1]] for side in spans)


def compare(here: Source, there: Source) -> tuple[list[str], list[Part]]:
    """(names of the definitions that are the same in both, the others in the order of reading)."""
    ours = {x.name: x for x in here.segments}
    theirs = {x.name: x for x in there.segments}
    same, parts = [], []

    def text(source: Source, segment) -> list[str]:
        return source.lines[segment.first - 1 : segment.last]

    for name, x in ours.items():
        if name not in theirs:
            parts.append(Part(name, "only here", [("-", k, 0) for k in range(x.first, x.last + 1)]))
            continue
        y = theirs[name]
        if text(here, x) == text(there, y):
            same.append(name)
        else:
            parts.append(Part(name, "differs", rows(text(here, x), text(there, y), x.first, y.first)))
    order = list(theirs)
    for name in order:
        if name not in ours:
            y = theirs[name]
            part = Part(name, "only there", [("+", 0, k) for k in range(y.first, y.last + 1)])
            before = [order[k] for k in range(order.index(name))]
            at = max([k + 1 for k, x in enumerate(parts) if x.name in before], default=0)
            parts.insert(at, part)
    return same, parts
