"""Same name, same source: copy a file's top-level functions and classes over those of the same name in its siblings.

python tools/sync.py algos/maml_trpo.py        (or: make sync FILE=algos/maml_trpo.py)
"""

import ast
import sys
from pathlib import Path

OWN = {"Args", "train", "evaluate", "main"}  # every algorithm's own


def definitions(text: str) -> dict[str, tuple[int, int]]:
    """Name -> first and last line (1-based, decorators included) of the top-level definitions that files share."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = {node.name: min([node.lineno, *(x.lineno for x in node.decorator_list)]) for node in nodes}
    return {node.name: (first[node.name], node.end_lineno) for node in nodes if node.name not in OWN}


def sources(text: str) -> dict[str, str]:
    """Name -> source of these definitions."""
    lines = text.split("\n")  # splitlines would also cut at form feeds
    return {name: "\n".join(lines[first - 1 : last]) for name, (first, last) in definitions(text).items()}


def sync(path: Path) -> list[str]:
    """Update the other files of the folder; returns "file: name" for every definition that changed."""
    shared, changed = sources(path.read_bytes().decode()), []  # read_text would turn \r\n into \n
    for other in sorted(set(path.parent.glob("*.py")) - {path}):
        copy = other.read_bytes().decode()
        for name, old in sources(copy).items():
            if name in shared and old != shared[name]:
                first, last = definitions(copy)[name]
                lines = copy.split("\n")
                copy = "\n".join([*lines[: first - 1], shared[name], *lines[last:]])
                changed.append(f"{other.name}: {name}")
        other.write_bytes(copy.encode())
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("usage: python tools/sync.py algos/FILE.py   (make sync FILE=algos/FILE.py)")
    print("\n".join(sync(Path(sys.argv[1]))) or "nothing to change")
