"""The site, without a browser: what is on a page is what is in the files, and every link leads somewhere.

`make site` builds it in an environment of its own, .venv-docs, which `make test` sets up; where that is missing, only
what needs no more than the standard library is tested.
"""

import ast
import json
import re
import resource
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools.reader.siblings import changed
from tools.reader.source import SUFFIX, axis_key, read
from tools.reader.typeset import GREEK, typeset

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "algos").glob("*.py"))
PYTHON = ROOT / ".venv-docs/bin/python"
PAIRS = [
    ("maml", "fomaml"), ("maml", "reptile"), ("maml", "protonet"), ("maml_trpo", "promp"),
    ("maml_trpo", "multitask_ppo"), ("rl2_ppo", "rl2_transformer_ppo"), ("rl2_ppo", "varibad_ppo"), ("dpt", "ad"),
]  # fmt: skip
VOID = {"meta", "link", "img", "input", "br", "hr", "wbr"}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def __getitem__(self, name):
        return self.attributes.get(name) or ""

    @property
    def classes(self):
        return self["class"].split()

    @property
    def text(self):
        return "".join(x if isinstance(x, str) else x.text for x in self.children)

    def all(self, tag="", cls="", **attributes):
        for child in self.children:
            if isinstance(child, Element):
                fits = (not tag or child.tag == tag) and (not cls or cls in child.classes)
                if fits and all(child[name] == value for name, value in attributes.items()):
                    yield child
                yield from child.all(tag, cls, **attributes)

    def one(self, **wanted):
        (found,) = self.all(**wanted)
        return found


class Page(HTMLParser):
    """A page as a tree, by the standard library's parser."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.path = path
        self.root = self.at = Element("", {}, None)
        self.feed(path.read_bytes().decode())
        assert self.at is self.root, f"{path}: <{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        child = Element(tag, attributes, self.at)
        self.at.children.append(child)
        if tag not in VOID:
            self.at = child

    def handle_startendtag(self, tag, attributes):
        self.at.children.append(Element(tag, attributes, self.at))

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"{self.path}: </{tag}> ends a <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def dead_links(pages: dict[Path, Page], site: Path) -> list[str]:
    """Links, images, scripts and sheets of pages that lead nowhere, and those that need the network."""
    ids = {path: {x["id"] for x in page.root.all() if x["id"]} for path, page in pages.items()}
    dead = []
    for path, page in pages.items():
        for element in page.root.all():
            for name in {"a": ["href"], "img": ["src"], "script": ["src"], "link": ["href"]}.get(element.tag, []):
                if name not in element.attributes or element[name].startswith("data:"):
                    continue
                url = urlsplit(element[name])
                if url.scheme or url.netloc:
                    dead += [f"{path.name}: {element[name]}"] if element.tag != "a" or url.scheme != "https" else []
                    continue
                target = (path.parent / unquote(url.path)).resolve() if url.path else path
                found = target.is_file() and target.is_relative_to(site)
                if not found or (url.fragment and unquote(url.fragment) not in ids.get(target, set())):
                    dead.append(f"{path.name}: {element[name]}")
    return dead


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """(folder, its pages, CPU seconds of the build)."""
    if not PYTHON.exists():
        pytest.skip("no .venv-docs; `make site` sets it up")
    out = tmp_path_factory.mktemp("site") / "site"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([PYTHON, "-m", "tools.reader", out], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return out, {path: Page(path) for path in out.rglob("*.html")}, seconds


def page_of(site, name: str) -> Element:
    return site[1][site[0] / f"algos/{name}.html"].root


group = pytest.mark.xdist_group("site")


@group
def test_the_build_takes_less_than_a_minute_and_pages_are_small(site):
    _, pages, seconds = site
    assert seconds < 60
    assert {path.name: path.stat().st_size for path in pages if path.stat().st_size >= 1e6} == {}
    assert len(pages) >= len(FILES) + 3


@group
def test_every_link_leads_somewhere_and_nothing_needs_the_network(site):
    folder, pages, _ = site
    assert dead_links(pages, folder) == []
    for sheet in (folder / "assets").glob("*.css"):
        for url in re.findall(r"url\(([^)]*)\)", sheet.read_text()):
            assert (folder / "assets" / url).is_file(), url


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.html").write_text('<p id="there">x</p>')
    wrong = ["gone.html", "other.html#gone", "#gone", "../outside.html", "http://x.org"]
    right = ["other.html", "other.html#there", "#here", "https://x.org"]
    (tmp_path / "page.html").write_text(
        '<p id="here">' + "".join(f'<a href="{x}">x</a>' for x in wrong + right) + "</p>"
    )
    pages = {path: Page(path) for path in tmp_path.glob("*.html")}
    assert dead_links(pages, tmp_path) == [f"page.html: {x}" for x in wrong]


@group
def test_addresses_within_a_page_are_unique(site):
    for path, page in site[1].items():
        ids = Counter(x["id"] for x in page.root.all() if x["id"])
        assert {name: k for name, k in ids.items() if k > 1} == {}, path.name


@group
@each_file
def test_the_code_on_the_page_is_the_file(path, site):
    code = page_of(site, path.stem).one(id="file")
    assert code.text.encode() == path.read_bytes()
    lines = path.read_text().split("\n")
    for element in code.all(cls="l"):
        assert element.text.rstrip("\n") == lines[int(element["id"][1:]) - 1]
    assert [element["id"] for element in code.all(cls="l")] == [f"L{k}" for k in range(1, len(lines))]


@group
@each_file
def test_every_tag_is_lit(path, site):
    """By the text alone: a line with a tag in its comment lies in the step's places, and no place is without one."""
    page, text = page_of(site, path.stem), path.read_text()
    items = {x["id"]: x for x in page.one(cls="paper").all("li")}
    body = text.split('"""', 2)[2]
    start = text[: len(text) - len(body)].count("\n") + 1
    tagged = {}
    for k, line in enumerate(body.split("\n"), start):
        for number in re.findall(r"\[(\d+)\]", line.partition("#")[2]):
            tagged.setdefault(f"step-{number}", []).append(k)
    assert set(items) == set(tagged)
    for name, lines in tagged.items():
        places = [tuple(map(int, place.split("-"))) for place in items[name]["data-places"].split()]
        assert len(places) == len(lines)
        assert all(first <= line <= last for line, (first, last) in zip(lines, places, strict=True))
        assert next(items[name].all("a"))["href"] == f"#L{places[0][0]}"
    inside = [x["href"] for x in page.one(id="file").all("a", "tag")]
    assert Counter(x[1:] for x in inside) == Counter({name: len(lines) for name, lines in tagged.items()})


@group
@each_file
def test_every_function_folds(path, site):
    folds = {}
    for element in page_of(site, path.stem).one(id="file").all("button", "fold"):
        folds[int(element.parent["id"][1:])] = int(element["data-first"]), int(element["data-last"])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first, last = folds.pop(node.lineno)
            assert node.lineno < first <= last == node.end_lineno
    assert set(folds) == {1}, "what is left is the docstring"


@each_file
def test_every_axis_is_explained(path):
    source = read(path)
    tensors = [name for name in source.names if SUFFIX.search(name) and not name.isupper()]
    assert len(tensors) > 5
    letters = {letter for name in tensors for letter in SUFFIX.search(name)[1]}
    assert letters - {"1"} <= set(source.axes)
    assert all(source.axes.values())


def test_axes_are_read_from_a_sentence():
    text = "a suffix names a tensor's axes (x_N): N tasks, B = E * T samples, F and U features of a state, Q of a"
    key = axis_key(text + "\n    query; G heads of width D. Entries of parameter dicts gain N.")
    assert key == {"N": "tasks", "B": "= E * T samples", "F": "features of a state", "U": "features of a state",
                   "Q": "features of a query", "G": "heads of width D", "D": "width of the heads"}  # fmt: skip


@group
@each_file
def test_symbols_and_steps_link_to_names_of_the_code(path, site):
    text = path.read_text().split("\n")
    links = list(page_of(site, path.stem).one(cls="paper").all("a", "name"))
    for link in links:
        name = link["data-name"]
        assert link.text == name
        assert re.search(rf"\b{name}\b", text[int(link["href"][2:]) - 1])


@group
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_siblings_of_an_idea_are_compared(pair, site):
    here, there = pair
    for name, other in ((here, there), (there, here)):
        chips = [x["data-sibling"] for x in page_of(site, name).one(id="compare").all("button", "chip")]
        assert other in chips or (name, other) in {(b, a) for a, b in PAIRS}, "at least from the first to the second"


@group
@each_file
def test_a_comparison_holds_all_that_differs(path, site):
    """Less what is marked as removed, a file has the lines of its sibling less what is marked as added."""
    panel = page_of(site, path.stem).one(id="compare")
    here = path.read_text().split("\n")
    siblings = [x["data-sibling"] for x in panel.all("button", "chip")]
    assert len(siblings) >= 2
    for name in siblings:
        there = (ROOT / f"algos/{name}.py").read_text().split("\n")
        diff = panel.one(id=f"diff-{name}")
        left, right = Counter(filter(str.strip, here)), Counter(filter(str.strip, there))
        for row in diff.all("span", "d"):
            line = row.text.removesuffix("\n")
            a, b = ([int(x["data-no"] or 0) for x in row.all("i")] + [0, 0])[:2]
            assert not a or here[a - 1] == line
            assert not b or there[b - 1] == line
            left[line] -= "minus" in row.classes and bool(line.strip())
            right[line] -= "plus" in row.classes and bool(line.strip())
        assert +left == +right
        assert min(*left.values(), *right.values()) >= 0


@group
def test_the_search_finds_pages_functions_and_steps(site):
    folder, pages, _ = site
    text = (folder / "assets/search.js").read_text()
    entries = json.loads(text.removeprefix("window.searchIndex = ").rstrip(";\n"))
    addresses = {entry[2] for entry in entries}
    ids = {path: {x["id"] for x in page.root.all()} for path, page in pages.items()}
    for address in addresses:
        path, _, fragment = address.partition("#")
        assert not fragment or fragment in ids[folder / path], address
    assert {f"algos/{path.stem}.html" for path in FILES} <= addresses
    assert any(title == "conjugate_gradient" and where == "MAML-TRPO" for title, where, _, _ in entries)


@group
def test_the_map_has_every_algorithm_once(site):
    folder, pages, _ = site
    nodes = [x["href"] for x in pages[folder / "index.html"].root.one(cls="map").all("a", "node")]
    assert sorted(nodes) == sorted(f"algos/{path.stem}.html" for path in FILES)


@pytest.mark.parametrize(
    ("here", "there", "marks"),
    [
        ("x = f(a, 1)", "x = f(b, 1)", (["a"], ["b"])),
        ("return x", "return x + 1", ([], [" + 1"])),
        ("inner_lr = 2", "inner_lr_2 = 2", (["inner_lr"], ["inner_lr_2"])),
        ("while True:", "y = 3", ([], [])),
    ],
)
def test_words_that_differ_are_found(here, there, marks):
    spans = changed(here, there)
    assert tuple([x[a:b] for a, b in side] for x, side in zip((here, there), spans, strict=True)) == marks


def unmarked(element: Element):
    """The texts of an element outside its marks."""
    for child in element.children:
        if isinstance(child, str):
            yield child
        elif child.tag != "mark":
            yield from unmarked(child)


@group
def test_marks_lie_on_what_differs(site):
    """Two lines that took each other's place are the same without the marked words."""
    found = 0
    for here, there in PAIRS:
        rows = list(page_of(site, here).one(id="compare").one(id=f"diff-{there}").all("span", "d"))
        kinds = "".join((set(row.classes) & {"minus", "plus"} or {"0"}).pop()[0] for row in rows)
        for match in re.finditer("(?<!m)mp(?!p)", kinds):  # a single line for a single one
            old, new = rows[match.start() : match.end()]
            if old.parent is new.parent:
                marks = [[x.text for x in row.all("mark")] for row in (old, new)]
                rest = ["".join(unmarked(row)) for row in (old, new)]
                if marks[0] or marks[1]:
                    found += 1
                    assert rest[0] == rest[1]
    assert found > 10


TYPESET = {
    "theta'_i = theta - alpha grad L(theta; D_i)":
        "<i>θ</i>′<sub><i>i</i></sub> = <i>θ</i> − <i>α</i> ∇<i>L</i>(<i>θ</i>; <i>D</i><sub><i>i</i></sub>)",
    "a batch, pi(a|s) of a Gaussian, action a": "a batch, <i>π</i>(<i>a</i>|<i>s</i>) of a Gaussian, action <i>a</i>",
    "(G - v)^2 and e^-p": "(<i>G</i> − <i>v</i>)<sup>2</sup> and <i>e</i><sup>−<i>p</i></sup>",
    "theta_(t+1) <- x, KL(p || q) <= delta":
        "<i>θ</i><sub><i>t</i>+1</sub> ← <i>x</i>, KL(<i>p</i> ‖ <i>q</i>) ≤ <i>δ</i>",
    "pi_theta'_i": "<i>π</i><sub><i>θ</i>′<sub><i>i</i></sub></sub>",
    "0.01 s a step, the task's E-MAML": "0.01 s a step, the task&#x27;s E-MAML",
    "K = inner_steps": '<i>K</i> = <a class="name" href="#L7" data-name="inner_steps"><code>inner_steps</code></a>',
    "lines [2] to [4]":
        'lines <a class="tag" href="#step-2">[2]</a> to <a class="tag" href="#step-4">[4]</a>',
    "x < b": "<i>x</i> &lt; <i>b</i>",
}  # fmt: skip


@pytest.mark.parametrize(("text", "html"), TYPESET.items())
def test_formulas_are_set(text, html):
    plain = html.replace('<span class="fn">KL</span>', "KL")
    assert typeset(text, {"inner_steps": 7}).replace('<span class="fn">KL</span>', "KL") == plain


def letters(text: str, symbols: dict[str, str]) -> str:
    """Letters and digits alone, with one sign for each name of a Greek letter."""
    text = re.sub(r"(?<![A-Za-z])(grad|nabla)(?![A-Za-z])", "∇", text)
    for name in sorted(symbols, key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z`]){name}(?![A-Za-z])", symbols[name], text)
    return re.sub(r"[^A-Za-z0-9∇α-ω]", "", text)


@each_file
def test_no_letter_of_a_docstring_is_lost(path):
    source = read(path)
    for text in (*source.sections.values(), *(step.text for step in source.steps), source.lead):
        html = typeset(text, source.names, link_names=True).replace("×", "x").replace("&#x27;", "'")
        shown = re.sub(r"<[^>]+>", "", html).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
        wanted = re.sub(r"(?<![\w-])https?://", "", text)
        assert letters(shown, GREEK) == letters(wanted, GREEK)


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme):
    """WCAG 2.2 AA, 4.5 to 1, for all colours of text on what they stand on."""
    css = (ROOT / "tools/reader/static/reader.css").read_text()
    start = css.index(":root {" if theme == "light" else ":root[data-theme=dark] {")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css[start : css.index("\n}", start)]))
    code = ("ink", "kw", "fn", "str", "num", "bi", "doc", "axis")
    lines = dict.fromkeys(("code", "lamp-soft", "minus", "plus"), (*code, "com"))  # where code stands
    grounds = {
        "paper": ("ink", "soft", "link", "tag", "axis"),
        "sheet": ("ink", "soft", "link", "minus-ink", "plus-ink"),
        "lamp": (*code, "link"),  # comments are in ink there
        "tag-sheet": ("tag",),
        "sunk": ("ink", "soft"),
    }
    grounds |= lines
    poor = {
        f"{front} on {back}": round(contrast(colours[front], colours[back]), 2)
        for back, fronts in grounds.items()
        for front in fronts
        if contrast(colours[front], colours[back]) < 4.5
    }
    assert poor == {}


def test_both_ways_to_be_dark_are_the_same():
    css = (ROOT / "tools/reader/static/reader.css").read_text()
    system, chosen = (
        css[start : css.index("\n}", start)].split("{")[-1].replace("} }", "").split()
        for start in (css.index(":root:not([data-theme=light])"), css.index(":root[data-theme=dark] {"))
    )
    assert system == chosen
