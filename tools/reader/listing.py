"""Code as HTML, a line at a time, by Pygments: what a reader copies from the page is the file, byte for byte."""

import re
from functools import cache
from html import escape

from pygments.lexers import PythonLexer, TextLexer, get_lexer_for_filename
from pygments.token import Comment, Keyword, Name, Number, Operator, String
from pygments.util import ClassNotFound

from tools.reader.source import SUFFIX

# Token -> class in reader.css; the first that fits. All else has none, and the colour of the text.
CLASSES = [
    (Comment, "c"),
    (String.Doc, "sd"),
    (String, "s"),
    (Number, "m"),
    (Keyword.Constant, "m"),
    (Keyword, "k"),
    (Operator.Word, "k"),
    (Name.Decorator, "nd"),
    (Name.Function, "n nf"),
    (Name.Class, "n nf"),
    (Name.Builtin.Pseudo, "nb"),
    (Name.Builtin, "nb"),
    (Name, "n"),
]


def tokens_by_line(text: str, lexer) -> list[list[tuple]]:
    """The tokens of each line, without its newline."""
    lines = [[]]
    for token, value in lexer.get_tokens(text):
        for k, part in enumerate(value.split("\n")):
            if k:
                lines.append([])
            if part:
                lines[-1].append((token, part))
    return lines


def token_html(token, value: str, page: str) -> str:
    """A token; tags in comments become links to the step, the axes at the end of a name an element of their own."""
    css = next((css for family, css in CLASSES if token in family), "")
    html = escape(value, quote=False)
    if token in Comment:
        html = re.sub(r"\[(\d+)\]", rf'<a class="tag" href="{page}#step-\1">[\1]</a>', html)
    elif token in Name and (match := SUFFIX.search(value)) and not value.isupper():
        html = f"{escape(value[: match.start()])}<b>{match[0]}</b>"
    return f'<span class="{css}">{html}</span>' if css else html


@cache  # a file is shown on the pages of its siblings, too
def highlight(text: str, filename: str = "x.py", page: str = "") -> list[str]:
    """Each line of a file as HTML.

    page: where the steps are that tags link to; "": on the same page.
    """
    options = {"stripnl": False, "ensurenl": False}  # every byte stays
    try:
        lexer = PythonLexer(**options) if filename.endswith(".py") else get_lexer_for_filename(filename, **options)
    except ClassNotFound:
        lexer = TextLexer(**options)
    return ["".join(token_html(*token, page) for token in line) for line in tokens_by_line(text, lexer)]


def listing(lines: list[str], folds: list) -> str:
    """The lines as the content of a <code>: numbers and buttons are drawn by CSS and are no text."""
    heads = {}
    for fold in folds:
        heads[fold.head] = fold
    html = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line:
            break  # what follows the last newline
        newline = "\n" if number < len(lines) else ""
        fold = heads.get(number)
        button = ""
        if fold:
            button = (
                f'<button class="fold" data-first="{fold.first}" data-last="{fold.last}" aria-expanded="true" '
                f'aria-label="Fold {fold.name}"></button>'
            )
        html.append(
            f'<span class="l" id="L{number}"><a class="no" href="#L{number}" data-no="{number}" '
            f'aria-label="Line {number}" tabindex="-1"></a>{button}{line}{newline}</span>'
        )
    return "".join(html)


def marked(html: str, spans: list[tuple[int, int]]) -> str:
    """A line of `highlight` with <mark> around some of its characters (first, behind the last), by their number."""
    inside = {k for first, last in spans for k in range(first, last)}
    out, position, is_open = "", 0, False
    for piece in re.findall(r"<[^>]+>|&\w+;|.", html):
        is_tag = piece[0] == "<" and len(piece) > 1
        wanted = not is_tag and position in inside
        if is_open and not wanted:  # marks never reach over a tag
            out, is_open = out + "</mark>", False
        if wanted and not is_open:
            out, is_open = out + "<mark>", True
        out += piece
        position += not is_tag
    return out + "</mark>" * is_open
