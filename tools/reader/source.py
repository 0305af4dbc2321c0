"""What a page of the site takes from an algorithm's file: its docstring by headings, its tags, folds, names and axes.

Standard library only, so that the tests of the file formats need nothing else.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

HEADINGS = ("Paper", "Run", "Result", "Algorithm", "Symbols", "Shapes", "Differs")
SUFFIX = re.compile(r"(?<=[A-Za-z0-9])_([A-Z1]+)$")  # the axes of a tensor, at the end of its name


@dataclass
class Step:
    """A line of the pseudo-code."""

    number: str
    depth: int  # 0: in the outermost loop
    text: str
    places: list[tuple[int, int]] = field(default_factory=list)  # (first, last) line of each statement that does it


@dataclass
class Fold:
    """Lines that close up below the line of a `def` or `class` (or the docstring's first line)."""

    name: str
    head: int  # the line with the button
    first: int  # the lines that are hidden, first to last
    last: int


@dataclass
class Segment:
    """A top-level part of a file."""

    name: str  # of the function or class; "docstring", "imports and constants"
    first: int
    last: int


@dataclass
class Source:
    """An algorithm's file, taken apart."""

    name: str
    text: str
    summary: str  # the docstring's first line
    sections: dict[str, str]  # heading -> text in one line, and its notes as further lines
    qualifiers: dict[str, str]  # heading -> what stands between it and the colon ("Differs" -> "from the paper")
    lead: str  # what stands beside "Algorithm:"
    steps: list[Step]
    tags: dict[int, list[str]]  # line -> numbers of the tags in its comment
    folds: list[Fold]
    segments: list[Segment]
    axes: dict[str, str]  # letter -> meaning
    names: dict[str, int]  # identifier -> the line where it is defined, else where it occurs first

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")


def headed(doc: str) -> list[tuple[str, str, list[str]]]:
    """The docstring by headings: (heading, what stands before its colon, lines with their indentation)."""
    parts = []
    for line in doc.split("\n")[1:]:
        match = re.match(rf"({'|'.join(HEADINGS)})\b([^:]*):\s*(.*)", line)
        if match:
            parts.append((match[1], match[2].strip(), [match[3]] if match[3] else []))
        elif parts:
            parts[-1][2].append(line)
    return parts


def pseudo_code(lines: list[str]) -> tuple[str, list[Step], list[str]]:
    """(what precedes line [1], the steps, the notes after them) of the docstring's Algorithm."""
    lead, steps, notes = [], [], []
    for line in filter(str.strip, lines):
        tag = re.match(r"( *)\[(\d+)\]( *)", line)
        indent = len(line) - len(line.lstrip())
        if tag:
            steps.append(Step(number=tag[2], depth=max(0, (tag.end() - 8) // 4), text=line[tag.end() :]))
        elif not steps:
            lead.append(line.strip())
        elif indent > 4 and not notes:
            steps[-1].text += " " + line.strip()
        elif indent == 0 or not notes:
            notes.append(line.strip())
        else:
            notes[-1] += " " + line.strip()
    return " ".join(lead), steps, notes


def paragraphs(lines: list[str]) -> str:
    """A section's lines, joined; a line that is not indented begins a paragraph of its own."""
    text = ""
    for line in filter(str.strip, lines):
        text += ("\n" if text and not line.startswith(" ") else " " if text else "") + line.strip()
    return text


def axis_key(shapes: str) -> dict[str, str]:
    """Letter -> meaning, from "a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, ..".

    An entry begins with a capital that stands alone; "F and U features" is one of two letters; "Q of a query" takes
    its noun from the entry before. The list ends where a sentence does.
    """
    body = re.split(r"\.(?:\s|$)", shapes.split("):", 1)[-1])[0]
    entries = re.split(r"[,;]\s+(?:or\s)?(?=(?:[A-Z]|1)(?:\s|$|,))", body.strip())
    key, of_what = {}, ""
    for entry in entries:
        match = re.match(r"((?:[A-Z]|1)(?: and [A-Z])*) (.*)", " ".join(entry.split()))
        if not match:
            continue
        meaning = match[2]
        if meaning.startswith("of "):  # "F features of a state, Q of a query"
            meaning = f"{of_what} {meaning}"
        of_what = meaning.split(" of ")[0]
        for letter in re.findall(r"[A-Z1]", match[1]):
            key.setdefault(letter, meaning)
        if width := re.search(r"^(.*) of width ([A-Z])$", meaning):
            key.setdefault(width[2], f"width of the {width[1]}")
    return key


def comments(text: str) -> list[tuple[int, str]]:
    """(line, text) of all comments."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def head_end(node: ast.AST) -> int:
    """The last line of a compound statement's head, such as of `for ..:` over two lines."""
    return max(node.lineno, node.body[0].lineno - 1) if node.body[0].lineno > node.lineno else node.lineno


def statement(tree: ast.Module, line: int) -> tuple[int, int]:
    """First and last line of the smallest statement around a line; of a compound one, those of its head."""
    around = [x for x in ast.walk(tree) if isinstance(x, ast.stmt) and x.lineno <= line <= x.end_lineno]
    if not around:
        return line, line
    node = min(around, key=lambda x: x.end_lineno - x.lineno)
    if isinstance(getattr(node, "body", None), list):
        end = head_end(node)
        return (node.lineno, end) if line <= end else (line, line)
    return node.lineno, node.end_lineno


def folds(tree: ast.Module, text: str) -> list[Fold]:
    """Every function and class, and the module's docstring; a docstring's first line stays in sight."""
    found = [Fold(name="the docstring", head=1, first=2, last=tree.body[0].end_lineno)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = node.body[0].lineno
            is_doc = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            first += int(is_doc)
            if first <= node.end_lineno and first > node.lineno:
                found.append(Fold(name=node.name, head=node.lineno, first=first, last=node.end_lineno))
    return sorted(found, key=lambda fold: fold.head)


def segments(tree: ast.Module, text: str) -> list[Segment]:
    """The top-level parts in their order: the docstring, then definitions, and what lies between them.

    Comments belong to what follows, so that every line that is not empty is in one part.
    """
    lines = text.split("\n")
    parts = [Segment(name="docstring", first=1, last=tree.body[0].end_lineno)]
    for node in tree.body[1:]:
        first = next(k for k in range(parts[-1].last + 1, node.lineno + 1) if lines[k - 1].strip())
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts.append(Segment(name=node.name, first=first, last=node.end_lineno))
        elif parts[-1].name.startswith("imports"):
            parts[-1].last = node.end_lineno
        elif len(parts) == 1:
            parts.append(Segment(name="imports and constants", first=first, last=node.end_lineno))
        else:
            parts.append(Segment(name=ast.unparse(node).split("\n")[0][:60], first=first, last=node.end_lineno))
    return parts


def identifiers(tree: ast.Module, text: str) -> dict[str, int]:
    """Name -> line: of its definition (a function, class, field, argument), else where it occurs first."""
    first, defined = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            first.setdefault(token.string, token.start[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.setdefault(node.target.id, node.lineno)
    return first | defined


def read(path: Path) -> Source:
    """Take a file of algos/ apart."""
    text = path.read_bytes().decode()
    tree = ast.parse(text)
    doc = ast.get_docstring(tree, clean=False)
    parts = {heading: (qualifier, lines) for heading, qualifier, lines in headed(doc)}
    lead, steps, notes = pseudo_code(parts["Algorithm"][1])
    tags = {line: re.findall(r"\[(\d+)\]", comment) for line, comment in comments(text)}
    tags = {line: numbers for line, numbers in tags.items() if numbers}
    for step in steps:
        step.places = [statement(tree, line) for line, numbers in tags.items() if step.number in numbers]
    sections = {heading: paragraphs(lines) for heading, (_, lines) in parts.items()}
    sections["Algorithm"] = "\n".join(notes)
    sections["Run"] = "\n".join(line.strip() for line in parts["Run"][1] if line.strip())
    return Source(
        name=path.stem,
        text=text,
        summary=doc.split("\n")[0],
        sections=sections,
        qualifiers={heading: qualifier for heading, (qualifier, _) in parts.items()},
        lead=lead,
        steps=steps,
        tags=tags,
        folds=folds(tree, text),
        segments=segments(tree, text),
        axes=axis_key(" ".join(parts["Shapes"][1])),
        names=identifiers(tree, text),
    )
