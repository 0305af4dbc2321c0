"""`make site`: the repository as a static site, on which a paper's lines and the lines of code light each other up.

python -m tools.reader [FOLDER]        FOLDER is site/ unless another is named

Every algorithm has a page: the docstring's pseudo-code, symbols and axes on the left, the file on the right, a
comparison with its closest siblings, and its page of docs/. All of it is read from the files. The pages need neither
network nor server; links are relative.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from tools.reader.documents import Document, markdown, plain
from tools.reader.listing import highlight, listing, marked
from tools.reader.siblings import changed, closest, compare, likeness
from tools.reader.source import Source, read
from tools.reader.typeset import typeset

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

SHORT = 30  # lines of a definition that only one of two files has, up to which it is open at first


class Lane(NamedTuple):
    """A row of the map."""

    id: str  # its class in reader.css, which gives it a colour
    name: str
    text: str  # what changes in a new task
    files: list[str]


class Site:
    """The repository, read once, and the folder that the pages go to."""

    def __init__(self, out: Path):
        self.out = out
        self.sources = {path.stem: read(path) for path in sorted((ROOT / "algos").glob("*.py"))}
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        self.tracked = set(tracked.splitlines())
        self.folders = {str(parent) for path in self.tracked for parent in Path(path).parents}
        self.wanted = set()  # files that a page links to
        self.index = []  # what the search finds: (title, where, address, text)
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=select_autoescape(),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        names = list(self.sources)
        self.likenesses = {
            frozenset(pair): likeness(*(self.sources[name] for name in pair)) for pair in combinations(names, 2)
        }
        self.readme = (ROOT / "README.md").read_text()
        self.rows = self.table_of_readme()
        self.lanes = self.map_of_readme()
        with open(ROOT / "benchmark/headlines.toml", "rb") as file:
            rows = [row for row in tomllib.load(file)["row"] if row["figure"]]
        self.headlines = {row["file"]: row for row in reversed(rows)}  # of each file the first that has been measured
        self.documents = {}
        for path in sorted((ROOT / "docs").glob("*.md")):
            folder = "algos" if path.stem in self.sources else "docs"
            self.documents[path.stem] = Document(f"docs/{path.name}", path.read_text(), self.addresses(f"{folder}/"))

    def table_of_readme(self) -> dict[str, list[str]]:
        """File -> what is meta-learned and how it adapts, of the README's table of algorithms."""
        rows = re.findall(r"^\| \[`(\w+)\.py`\]\(algos/\w+\.py\) \| (.*) \|$", self.readme, re.MULTILINE)
        found = {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in rows}
        if missing := set(self.sources) - set(found):
            raise SystemExit(f"README.md: no row of the table for {', '.join(sorted(missing))}")
        return found

    def map_of_readme(self) -> list[Lane]:
        """The README's map, "How methods learn to learn"."""
        part = re.search(r"^## How methods learn to learn\n(.*?)^## ", self.readme, re.MULTILINE | re.DOTALL)
        rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \| (`[^|]*) \|$", part[1] if part else "", re.MULTILINE)
        lanes = []
        for name, text, files in rows:
            name = name.strip("* ")
            lanes.append(Lane(re.match(r"\w+", name)[0], name.capitalize(), text, re.findall(r"`(\w+)`", files)))
        if missing := set(self.sources) ^ {name for lane in lanes for name in lane.files}:
            raise SystemExit(f"README.md: its map and algos/ disagree about {', '.join(sorted(missing))}")
        return lanes

    def lane_of(self, name: str) -> Lane:
        return next(lane for lane in self.lanes if name in lane.files)

    def page_of(self, path: str) -> str:
        """The page, from the site's root, of a path in the repository; a file that has none gets one."""
        stem = Path(path).stem
        if path.startswith("docs/images/") and path in self.tracked:
            return path.removeprefix("docs/")
        if path == "README.md" or path == ".":
            return "readme.html"
        if path == "CONTRIBUTING.md" and path in self.tracked:
            return "contributing.html"
        if re.fullmatch(r"docs/\w+\.md", path) and path in self.tracked:
            return f"algos/{stem}.html" if stem in self.sources else f"docs/{stem}.html"
        if path == f"algos/{stem}.py" and stem in self.sources:
            return f"algos/{stem}.html"
        if path in self.tracked or path in self.folders:
            self.wanted.add(path)
            return f"source/{path}.html"
        raise SystemExit(f"a page links to {path}, which is not in the repository")

    def addresses(self, page: str):
        """Addresses as seen from a page."""

        def address(path: str, fragment: str) -> str:
            relative = os.path.relpath(self.page_of(path), os.path.dirname(page) or ".")
            return relative + ("#" + fragment if fragment else "")

        return address

    def write(self, page: str, template: str, **values):
        root = "../" * page.count("/")
        html = self.templates.get_template(template).render(root=root, kind=template.removesuffix(".html"), **values)
        path = self.out / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(html.encode())

    def inline(self, text: str) -> Markup:
        """A cell of a Markdown table without its links."""
        return Markup(
            re.sub(r"</?a[^>]*>", "", markdown().renderInline(re.sub(r"\[([^\]]*)\](\[[^\]]*\])?", r"\1", text)))
        )

    def heading(self, name: str) -> str:
        return self.documents[name].title

    def steps(self, source: Source, page: str = "") -> list[dict]:
        """The pseudo-code for a template; page: of the file, for links from another page."""
        return [
            {
                "number": step.number,
                "depth": step.depth,
                "text": step.text,
                "html": Markup(typeset(step.text, source.names).replace('href="#', f'href="{page}#')),
                "first": step.places[0][0],
                "places": " ".join(f"{first}-{last}" for first, last in step.places),
            }
            for step in source.steps
        ]

    def algorithm(self, source: Source):
        """The page of an algorithm."""
        document, page = self.documents[source.name], f"algos/{source.name}.html"
        address = self.addresses(page)
        files = {f"{name}.py": f"{name}.html" for name in self.sources}
        files |= {f"docs/{name}.md": address(f"docs/{name}.md", "") for name in self.documents}
        files[f"docs/{source.name}.md"] = "#results-panel"
        files |= {
            path: address(path, "") for path in re.findall(r"benchmark/\w+\.py", "".join(source.sections.values()))
        }

        def text(part: str, **options) -> Markup:
            return Markup(typeset(part, source.names, files, **options))

        heading = next((x for x in document.headings if x[0] == "h1"), ("h1", "top", source.name))
        commands = [re.split(r"\s{3,}", line, maxsplit=1) for line in source.sections["Run"].split("\n")]
        definitions = [fold for fold in source.folds[1:] if fold.name in {x.name for x in source.segments}]
        example = re.search(r"\((\w+)\)", source.sections["Shapes"])
        lines = highlight(source.text)
        self.write(
            page,
            "algorithm.html",
            title=heading[2],
            description=source.summary,
            heading=heading[2],
            heading_id=heading[1],
            path=f"algos/{source.name}.py",
            group=self.lane_of(source.name),
            year=self.year(source),
            lines=source.text.count("\n"),
            summary=text(source.summary),
            paper=text(source.sections["Paper"]),
            result=text(source.sections["Result"].replace("\n", " ")),
            run=[
                (command, text(remark.strip("()")) if (remark := "".join(rest)) else "") for command, *rest in commands
            ],
            lead=text(source.lead),
            steps=self.steps(source),
            notes=[text(note) for note in filter(None, source.sections["Algorithm"].split("\n"))],
            symbols=text(source.sections["Symbols"], link_names=True),
            axes=[(letter, text(meaning.removeprefix("= "))) for letter, meaning in source.axes.items()],
            example=example[1] if example else "",
            differs_from=source.qualifiers["Differs"],
            differs=text(source.sections["Differs"]),
            outline=[(fold.name, fold.head) for fold in definitions],
            listing=Markup(listing(lines, source.folds)),
            siblings=[self.sibling(source, self.sources[x]) for x in self.siblings(source)],
            contents=[x for x in document.headings if x[0] in ("h2", "h3")],
            document=Markup(re.sub(r"<h1.*?</h1>", "", document.html, count=1, flags=re.DOTALL)),
        )
        self.index.append((heading[2], "algorithm", page, source.summary + " " + plain(text(source.sections["Paper"]))))
        for step in source.steps:
            title = re.sub(r"<[^>]+>", "", text(step.text))
            self.index.append(
                (f"[{step.number}] {unescape(title)}", heading[2], f"{page}#step-{step.number}", step.text)
            )
        for fold in definitions:
            body = source.lines[fold.head : fold.first - 1]
            self.index.append((fold.name, heading[2], f"{page}#L{fold.head}", " ".join(body).strip(' "')[:160]))
        self.add_sections(document, page)

    def siblings(self, source: Source) -> list[str]:
        return closest(source, self.likenesses, list(self.sources))

    def sibling(self, here: Source, there: Source) -> dict:
        """What a page tells of another file."""
        same, parts = compare(here, there)
        last = ("docstring", "imports and constants", "main")  # of least interest
        parts.sort(key=lambda part: part.name in last)
        lines_here, lines_there = highlight(here.text), highlight(there.text, page=f"{there.name}.html")
        ours, theirs = ([step.text for step in source.steps] for source in (here, there))
        remarks = {"differs": "", "only here": f"only in {here.name}.py", "only there": f"only in {there.name}.py"}

        spans = {}
        for a, b in [pair for part in parts for pair in part.pairs()]:
            spans["-", a], spans["+", b] = changed(here.lines[a - 1], there.lines[b - 1])

        def row(mark: str, a: int, b: int) -> str:
            if mark == "…":
                return '<span class="d gap"></span>'
            kind = {"-": "minus", "+": "plus", " ": "both"}[mark]
            numbers = "".join(f'<i data-no="{k}"></i>' if k else "<i></i>" for k in (a, b))
            line = marked(lines_here[a - 1] if a else lines_there[b - 1], spans.get((mark, a or b), []))
            return f'<span class="d {kind}">{numbers}{line}\n</span>'

        return {
            "name": there.name,
            "heading": self.heading(there.name),
            "steps": self.steps(there, page=f"{there.name}.html"),
            "same": [name for name in same if name.isidentifier() and name != "docstring"],
            "same_here": {step.number for step in here.steps if step.text in theirs},
            "same_there": {step.number for step in there.steps if step.text in ours},
            "parts": [
                {
                    "name": part.name,
                    "remark": remarks[part.kind],
                    "minus": part.minus,
                    "plus": part.plus,
                    "is_open": part.name not in last and (part.kind == "differs" or len(part.rows) <= SHORT),
                    "html": Markup("".join(row(*x) for x in part.rows)),
                }
                for part in parts
            ],
        }

    def add_sections(self, document: Document, page: str):
        for anchor, title, text in document.sections():
            self.index.append((title, document.title, f"{page}#{anchor}", text[:1200]))

    def year(self, source: Source) -> int:
        return int(re.search(r"\b(?:19|20)\d\d\b", source.sections["Paper"])[0])

    def study(self, name: str):
        """The page of a document of docs/ that is no algorithm's."""
        document, page = self.documents[name], f"docs/{name}.html"
        self.document(document, page)

    def document(self, document: Document, page: str):
        contents = [x for x in document.headings if x[0] in ("h2", "h3")]
        first = re.search(r"<p>(.*?)</p>", document.html, re.DOTALL)
        self.write(
            page,
            "document.html",
            title=document.title,
            description=plain(first[1])[:150] if first else document.title,
            contents=contents if len(contents) > 2 else [],
            document=Markup(document.html),
        )
        self.add_sections(document, page)

    def home(self):
        """The index, with the map."""
        years = {name: self.year(source) for name, source in self.sources.items()}
        span = range(min(years.values()), max(years.values()) + 1)

        def node(name: str) -> dict:
            paper = self.sources[name].sections["Paper"]
            authors = re.match(r"(?:[^:]{3,25}: )?([A-Z][\w-]+)(,| et al\.| \d{4})", paper)
            several = authors and not authors[2].strip().isdigit()
            return {
                "name": name,
                "heading": self.heading(name).split(":")[0],
                "file": Markup(f"{name}.py".replace("_", "_<wbr>")),
                "summary": self.sources[name].summary,
                "year": years[name],
                "authors": (authors[1] + " et al." * several) if authors else "",
                "minutes": self.minutes(name),
            }

        lanes = [
            lane._asdict() | {"cells": [[node(x) for x in lane.files if years[x] == year] for year in span]}
            for lane in self.lanes
        ]
        studies = []
        for name, document in self.documents.items():
            if name not in self.sources:
                first = re.search(r"<p>(.*?)</p>", document.html, re.DOTALL)
                text = plain(first[1]) if first else ""
                text = text if len(text) < 170 else text[:170].rsplit(" ", 1)[0] + " …"
                studies.append({"href": f"docs/{name}.html", "title": document.title, "text": text})
        what = re.search(r"\n\n(\*\*.*?)\n\n", self.readme, re.DOTALL)[1].replace("\n", " ")
        self.write(
            "index.html",
            "index.html",
            title="Meta-reinforcement learning, one file per algorithm",
            description=plain(markdown().renderInline(what)),
            what=Markup(markdown().renderInline(what)),
            years=list(span),
            lanes=lanes,
            table=[self.row(name) for lane in self.lanes for name in lane.files],
            studies=studies,
            headlines=self.page_of("benchmark/headlines.toml"),
        )

    def minutes(self, name: str) -> str:
        row = self.headlines.get(name)
        return f"{row['minutes']:.2g}" if row and row["minutes"] else ""

    def row(self, name: str) -> dict:
        _, learned, adapts, *_ = self.rows[name]
        row = self.headlines.get(name, {})
        return {
            "name": name,
            "heading": self.heading(name),
            "group": self.lane_of(name).id,
            "learned": self.inline(learned),
            "adapts": self.inline(adapts),
            "run": row.get("name"),
            "figure": " / ".join(f"{x:.4g}".replace("-", "−") for x in row.get("figure", [])),
            "paper": row.get("paper", "").replace("-", "−"),
            "minutes": self.minutes(name),
        }

    def source(self, path: str):
        """A file (or the list of a folder's files) that a page links to."""
        page = f"source/{path}.html"
        if path in self.folders:
            text = "".join(f"{x}\n" for x in sorted(self.tracked) if x.startswith(f"{path}/"))
        else:
            text = (ROOT / path).read_bytes().decode(errors="replace")
        lines = highlight(text, path if path in self.tracked else "x.txt")
        self.write(page, "source.html", title=path, description=path, path=path, listing=Markup(listing(lines, [])))

    def assets(self):
        folder = self.out / "assets"
        shutil.copytree(HERE / "static", folder)
        shutil.copytree(ROOT / "docs/images", self.out / "images")
        fonts = Path(sys.prefix) / "fonts"  # cut by tools/reader/fonts.py
        if fonts.is_dir():
            shutil.copytree(fonts, folder / "fonts")
        index = [list(entry) for entry in self.index]
        (folder / "search.js").write_text(f"window.searchIndex = {json.dumps(index, ensure_ascii=False)};\n")

    def build(self):
        if self.out.exists():
            shutil.rmtree(self.out)
        for source in self.sources.values():
            self.algorithm(source)
        for name in self.documents:
            if name not in self.sources:
                self.study(name)
        for path, page in (("README.md", "readme.html"), ("CONTRIBUTING.md", "contributing.html")):
            if path in self.tracked:
                self.document(Document(path, (ROOT / path).read_text(), self.addresses(page)), page)
        self.home()
        for path in sorted(self.wanted):
            self.source(path)
        self.assets()


def main(arguments: list[str]):
    if len(arguments) > 1 or any(x.startswith("-") for x in arguments):
        raise SystemExit("usage: python -m tools.reader [FOLDER]")
    out = Path(arguments[0]) if arguments else ROOT / "site"
    if out.exists() and any(out.iterdir()) and not (out / "assets/reader.css").exists():
        raise SystemExit(f"{out} is not empty, and no site: nothing is deleted there")
    Site(out.resolve()).build()
    pages = list(out.rglob("*.html"))
    print(f"{out}: {len(pages)} pages, the largest {max(x.stat().st_size for x in pages) / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
