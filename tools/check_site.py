"""Use the site as a reader does, in a headless Chromium: `make check-site`.

python tools/check_site.py [FOLDER] [--pictures]      FOLDER: site/ unless another is named, as `make site` writes it

Needs Chromium (Debian: apt-get install chromium; or `CHROMIUM=/path/to/it`). Every check is a line of the output; the
exit status says whether all hold. --pictures also writes the pictures of docs/images that show the site.
"""

import os
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.reader.source import read  # noqa: E402

IMAGES = ROOT / "docs/images"
WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}


def lit_lines(page: Page) -> list[int]:
    """Numbers of the lines that are lit for good."""
    return page.eval_on_selector_all("#file .pinned", "lines => lines.map(x => Number(x.id.slice(1)))")


def in_view(page: Page, selector: str) -> bool:
    """Whether an element stands within the window."""
    return page.eval_on_selector(
        selector,
        "x => { const b = x.getBoundingClientRect(); return b.height > 0 && b.top >= 0 && b.bottom <= innerHeight; }",
    )


def steps_light_lines(page: Page, name: str, wanted: dict[str, set[int]]) -> list[str]:
    """Click every [k] of a page: the lines of the statements that carry it are lit, no others, the first in sight."""
    wrong = []
    for number, lines in wanted.items():
        page.click(f"#step-{number} > .tag")
        if set(lit_lines(page)) != lines:
            wrong.append(f"{name} [{number}] lights {lit_lines(page)}, not {sorted(lines)}")
        if not in_view(page, f"#L{min(lines)}"):
            wrong.append(f"{name} [{number}]: line {min(lines)} is out of sight")
        page.keyboard.press("Escape")
        if lit_lines(page):
            wrong.append(f"{name} [{number}]: Escape does not put it out")
    return wrong


def tagged_lines(path: Path) -> dict[str, set[int]]:
    """Tag -> the lines that carry it, by the text alone: what a click has to light at least."""
    found = {}
    text = path.read_text()
    body = text.split('"""', 2)[2]
    first = text[: len(text) - len(body)].count("\n") + 1
    for k, line in enumerate(body.split("\n")):
        for number in re.findall(r"\[(\d+)\]", line.partition("#")[2]):
            found.setdefault(number, set()).add(first + k)
    return found


def check(site: Path, page: Page) -> dict[str, list[str]]:
    """Check -> what is wrong."""
    results = {}
    algorithms = sorted((ROOT / "algos").glob("*.py"))
    wrong = []
    for path in algorithms:
        page.goto(f"{(site / 'algos' / path.stem).as_uri()}.html")
        same = page.evaluate("document.querySelector('#file').textContent") == path.read_bytes().decode()
        wrong += [] if same else [f"{path.name}: the code in the browser is not the file's"]
    results["the code in the browser is the file's"] = wrong
    wrong = []
    for name in ("maml", "maml_trpo", "dpt"):
        path = ROOT / f"algos/{name}.py"
        wanted = {
            step.number: {k for first, last in step.places for k in range(first, last + 1)} for step in read(path).steps
        }
        wrong += [f"{name} [{k}]: not {lines}" for k, lines in tagged_lines(path).items() if not lines <= wanted[k]]
        page.goto(f"{(site / 'algos' / name).as_uri()}.html")
        wrong += steps_light_lines(page, name, wanted)
    results["a click on [k] lights its lines, Escape puts them out"] = wrong

    page.goto((site / "algos/maml.html").as_uri())
    wrong = []
    page.focus("#step-3 > .tag")
    page.keyboard.press("Enter")
    if not lit_lines(page) or not page.evaluate("document.querySelector('#step-3').matches('.pinned')"):
        wrong.append("Enter on [3] lights nothing")
    page.keyboard.press("Escape")
    page.click("#file .c .tag")
    if page.evaluate("document.querySelectorAll('.steps .pinned').length") != 1:
        wrong.append("a click on a tag in the code lights no step")
    results["by keyboard, and from the code"] = wrong

    wrong = []
    page.click("#tab-compare")
    page.click(".chip[data-sibling=reptile]")
    if not page.is_visible("#diff-reptile") or page.is_visible("#diff-fomaml"):
        wrong.append("the diff to reptile.py does not open")
    if not page.locator("#diff-reptile .d.plus:visible").count():
        wrong.append("the diff to reptile.py shows no line")
    page.goto((site / "algos/maml.html").as_uri() + "#speed")
    if not page.is_visible("#results-panel") or not in_view(page, "#speed"):
        wrong.append("#speed does not open the results")
    page.wait_for_function("[...document.images].every(x => x.complete)")
    if page.evaluate("[...document.images].some(x => !x.naturalWidth)"):
        wrong.append("an image is not there")
    page.goto((site / "algos/maml.html").as_uri() + "#L20")
    if not in_view(page, "#L20"):
        wrong.append("#L20, in the folded docstring, is not shown")
    results["tabs and addresses"] = wrong

    wrong = []
    page.goto((site / "algos/maml_trpo.html").as_uri())
    rows = "document.querySelectorAll('#file .l:not(.folded)').length"
    before = page.evaluate(rows)
    page.click("#fold-all")
    if not page.evaluate(rows) < before / 3:
        wrong.append("Fold all folds little")
    page.click("#fold-all")
    page.hover("#file .n:has-text('obs_NETO') b >> nth=0")
    told = page.inner_text("#tip")
    wrong += [
        f"the hint of obs_NETO is {told!r}"
        for word in ("tasks", "episodes", "steps", "observation")
        if word not in told
    ]
    page.click(".paper a.name >> nth=0")
    if not page.locator("#file .seen").count():
        wrong.append("a symbol does not show its name in the code")
    results["folds, hints, symbols"] = wrong

    wrong = []
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("conjugate gradient")
    page.wait_for_selector("#found a")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/algos/*.html#*")
    if not page.locator("#file .l").count():
        wrong.append("the first result is no page of code")
    page.set_viewport_size(PHONE)
    for address in ("index.html", "algos/maml_trpo.html", "docs/curves.html"):
        page.goto((site / address).as_uri())
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        wrong += [f"{address} is {over} pixels wider than a phone"] if over > 0 else []
    page.set_viewport_size(WIDE)
    results["search, and a phone"] = wrong
    return results


def without_scripts(site: Path, browser) -> list[str]:
    """A browser that runs no script shows all views, and a tag leads to its line."""
    page = browser.new_page(viewport=WIDE, java_script_enabled=False)
    page.goto((site / "algos/maml.html").as_uri())
    wrong = [
        f"{x} is hidden" for x in ("#code", "#compare", "#results-panel", "#diff-reptile") if not page.is_visible(x)
    ]
    page.click("#step-3 > .tag")
    line = min(read(ROOT / "algos/maml.py").steps[2].places[0])
    wrong += [] if page.url.endswith(f"#L{line}") else [f"[3] leads to {page.url}"]
    page.close()
    return wrong


def save(page: Page, path: Path):
    """What the window shows."""
    Image.open(BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)


def pictures(site: Path, browser):
    """The reader and the map, light and dark, small enough for the repository."""
    for theme in ("light", "dark"):
        page = browser.new_page(viewport=WIDE, color_scheme=theme, reduced_motion="reduce")
        page.goto((site / "algos/maml_trpo.html").as_uri() + "#step-4")
        page.wait_for_function("document.fonts.ready.then(() => true)")
        page.wait_for_timeout(300)
        save(page, IMAGES / f"site_maml_trpo_{theme}.png")
        page.set_viewport_size({"width": 1440, "height": 1320})
        page.goto((site / "index.html").as_uri())
        page.wait_for_timeout(300)
        save(page, IMAGES / f"site_map_{theme}.png")
        page.close()


def main(arguments: list[str]):
    folders = [x for x in arguments if not x.startswith("-")]
    if len(folders) > 1 or not set(arguments) - set(folders) <= {"--pictures"}:
        raise SystemExit("usage: python tools/check_site.py [FOLDER] [--pictures]")
    site = Path(folders[0] if folders else ROOT / "site").resolve()
    if not (site / "index.html").is_file():
        raise SystemExit(f"{site}: no site there; `make site` writes it")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        raise SystemExit("no Chromium: apt-get install chromium, or name one by CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=WIDE, reduced_motion="reduce")  # no smooth scrolling to wait for
        said = []
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(f"not loaded: {request.url}"))
        results = check(site, page) | {
            "without scripts": without_scripts(site, browser),
            "nothing in the console": said,
        }
        if "--pictures" in arguments:
            pictures(site, browser)
        browser.close()
    for name, wrong in results.items():
        print("ok  " if not wrong else "FAIL", name, *(f"\n       {line}" for line in wrong))
    raise SystemExit(any(results.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
