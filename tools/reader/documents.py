"""The pages of docs/ as HTML: Markdown by markdown-it, formulas as MathML, links and addresses of headings."""

import posixpath
import re
from html import unescape

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from tools.reader.listing import highlight


def slug(title: str, taken: set[str]) -> str:
    """The address of a heading, as GitHub makes it, so that links work in both places."""
    name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    unique, k = name, 0
    while unique in taken:
        k += 1
        unique = f"{name}-{k}"
    taken.add(unique)
    return unique


def formula(text: str, options: dict) -> str:
    """LaTeX as MathML, which browsers draw by themselves."""
    return convert(text.strip(), display="block" if options["display_mode"] else "inline")


def fence(content: str, language: str, _attributes: str) -> str:
    lines = highlight(content.rstrip("\n"), {"python": "x.py", "toml": "x.toml"}.get(language, "x.sh"))
    return f'<pre class="block"><code>{chr(10).join(lines)}\n</code></pre>'


def markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"highlight": fence, "html": False}).enable("table")
    return parser.use(dollarmath_plugin, renderer=formula, allow_space=False, double_inline=True)


def plain(html: str) -> str:
    """The text of HTML, in one line."""
    html = re.sub(r"<annotation.*?</annotation>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


class Document:
    """A Markdown file, rendered.

    path: in the repository, such as docs/maml.md.
    address: of a path in the repository, relative to the page: a function of (path, fragment) that raises KeyError
        where there is no such file.
    """

    def __init__(self, path: str, text: str, address):
        self.path, self.headings = path, []
        parser = markdown()
        text = re.sub(r"^<!--.*?-->\n?", "", text, flags=re.MULTILINE | re.DOTALL)  # the marks of what is generated
        tokens = parser.parse(text)
        taken = set()
        for k, token in enumerate(tokens):
            if token.type == "heading_open":
                title = plain(parser.renderer.render(tokens[k + 1].children, parser.options, {}))
                token.attrSet("id", slug(tokens[k + 1].content.replace("`", ""), taken))
                self.headings.append((token.tag, token.attrGet("id"), title))
            for child in token.children or []:
                self.redirect(child, address)
        html = parser.renderer.render(tokens, parser.options, {})
        html = re.sub(r"<table>", '<div class="wide" tabindex="0"><table>', html).replace("</table>", "</table></div>")
        html = re.sub(r"<p>(<em>(?:(?!</?em>|</p>).)*</em>)</p>", r'<p class="caption">\1</p>', html, flags=re.DOTALL)
        self.title = self.headings[0][2] if self.headings else path
        self.html = html.replace("<eqn>", "").replace("</eqn>", "")

    def redirect(self, token, address):
        """Point a link or an image at the site's page or copy."""
        for name in ("href", "src"):
            target = token.attrGet(name)
            if target and not re.match(r"[a-z]+:", target) and not target.startswith("#"):
                path, _, fragment = target.partition("#")
                path = posixpath.normpath(posixpath.join(posixpath.dirname(self.path), path))
                token.attrSet(name, address(path, fragment))

    def sections(self) -> list[tuple[str, str, str]]:
        """(address of the heading, its title, the text below) for the search."""
        parts = re.split(r'<h[1-6] id="([^"]*)">(.*?)</h[1-6]>', self.html, flags=re.DOTALL)[1:]
        return [(parts[k], plain(parts[k + 1]), plain(parts[k + 2])) for k in range(0, len(parts), 3)]
