// The page lives without this file: tags and symbols are links. It adds light, folds, tabs, hints and search.
"use strict";

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);
const line = (number) => document.getElementById(`L${number}`);
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

// ---- light or dark ---------------------------------------------------------------------------------------------

one("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* not kept */ }
});

// ---- tabs ------------------------------------------------------------------------------------------------------

const tabs = all("[role=tab]");

function openTab(tab) {
  for (const other of tabs) {
    const isOpen = other === tab;
    other.setAttribute("aria-selected", isOpen);
    other.tabIndex = isOpen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !isOpen;
  }
}

tabs.forEach((tab, k) => {
  tab.addEventListener("click", () => {
    openTab(tab);
    const panel = tab.getAttribute("aria-controls");
    const pressed = one(".chip[aria-pressed=true]");
    history.replaceState(null, "", panel === "code" ? location.pathname : panel === "compare" ? `#diff-${pressed.dataset.sibling}` : `#${panel}`);
    const below = one(".tabs").offsetTop - one(".top").offsetHeight;
    if (scrollY > below) scrollTo(0, below);
  });
  tab.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = tabs[(k + by + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
});

// ---- folds -----------------------------------------------------------------------------------------------------

const folds = all(".fold");

function showFolds() {
  const hidden = new Set();
  for (const fold of folds) {
    const isClosed = fold.getAttribute("aria-expanded") === "false";
    const head = fold.closest(".l");
    const [first, last] = [Number(fold.dataset.first), Number(fold.dataset.last)];
    head.classList.toggle("closed", isClosed);
    head.dataset.hidden = `${last - first + 1} lines`;
    if (isClosed) for (let k = first; k <= last; k++) hidden.add(k);
  }
  all("#file > .l").forEach((element, k) => element.classList.toggle("folded", hidden.has(k + 1)));
}

function setFold(fold, isOpen) {
  fold.setAttribute("aria-expanded", isOpen);
}

for (const fold of folds) {
  fold.addEventListener("click", () => {
    setFold(fold, fold.getAttribute("aria-expanded") === "false");
    showFolds();
  });
}

function unfold(number) {
  let changed = false;
  for (const fold of folds) {
    if (Number(fold.dataset.first) <= number && number <= Number(fold.dataset.last)) {
      changed ||= fold.getAttribute("aria-expanded") === "false";
      setFold(fold, true);
    }
  }
  if (changed) showFolds();
}

one("#fold-all")?.addEventListener("click", (event) => {
  const isPressed = event.target.getAttribute("aria-pressed") === "true";
  event.target.setAttribute("aria-pressed", !isPressed);
  event.target.textContent = isPressed ? "Fold all" : "Unfold all";
  folds.forEach((fold) => setFold(fold, isPressed));
  showFolds();
});

one("#outline")?.addEventListener("change", (event) => {
  if (event.target.value) location.hash = event.target.value;
  event.target.value = "";
});

// ---- the paper and the code light each other up ----------------------------------------------------------------

const steps = new Map(all(".paper .steps li").map((item) => {
  const places = item.dataset.places.split(" ").map((place) => place.split("-").map(Number));
  const lines = places.flatMap(([first, last]) => Array.from({ length: last - first + 1 }, (_, k) => first + k));
  return [item.id.slice(5), { item, places: places.map(([first]) => first), lines: lines.map(line) }];
}));
const stepOfLine = new Map();
for (const [number, step] of steps) for (const element of step.lines) stepOfLine.set(element, number);
let pinned = null, turn = 0;

function light(number, kind, isOn) {
  const step = steps.get(number);
  for (const element of [step.item, ...step.lines]) element.classList.toggle(kind, isOn);
}

function clear() {
  if (pinned) light(pinned, "pinned", false);
  pinned = null;
  all(".seen").forEach((name) => name.classList.remove("seen"));
  one("#where").textContent = "";
}

function scrollWithin(box, element) { // wherever the box itself is at the moment
  const top = element.offsetTop, bottom = top + element.offsetHeight;
  if (top < box.scrollTop || bottom > box.scrollTop + box.clientHeight) {
    box.scrollTo({ top: top - box.clientHeight / 3, behavior: calm ? "auto" : "smooth" });
  }
}

function pin(number, from) {
  const step = steps.get(number);
  if (!step) return;
  const again = pinned === number;
  clear();
  pinned = number;
  turn = again && from === "paper" ? (turn + 1) % step.places.length : 0;
  light(number, "pinned", true);
  step.places.forEach(unfold);
  const several = step.places.length > 1 ? `, place ${turn + 1} of ${step.places.length}` : "";
  one("#where").textContent = `[${number}] line ${step.places[turn]}${several}`;
  if (from !== "code") line(step.places[turn]).scrollIntoView({ block: "center", behavior: calm || from === "address" ? "auto" : "smooth" });
  if (from === "address") one(".paper").scrollTop = 0; // the browser has scrolled it to the step already
  scrollWithin(one(".paper"), step.item);
  history.replaceState(null, "", `#step-${number}`);
}

if (steps.size) {
  one(".paper .steps").addEventListener("click", (event) => {
    if (event.target.closest("a:not(.tag)")) return;
    const own = event.target.closest("li");
    const inner = event.target.closest("div .tag");
    if (!own) return;
    event.preventDefault();
    pin(inner ? inner.textContent.slice(1, -1) : own.id.slice(5), "paper");
  });
  one("#file").addEventListener("click", (event) => {
    const tag = event.target.closest(".tag");
    if (tag) {
      event.preventDefault();
      pin(tag.textContent.slice(1, -1), "code");
    }
  });
  for (const [number, step] of steps) {
    for (const element of [step.item, ...step.lines]) {
      element.addEventListener("mouseenter", () => light(stepOfLine.get(element) ?? number, "lit", true));
      element.addEventListener("mouseleave", () => light(stepOfLine.get(element) ?? number, "lit", false));
    }
    one(".tag", step.item).addEventListener("focus", () => light(number, "lit", true));
    one(".tag", step.item).addEventListener("blur", () => light(number, "lit", false));
  }
}

// ---- names: where else one stands, and what its axes are -------------------------------------------------------

const words = all("#file .n");

function see(name) {
  clear();
  const found = words.filter((word) => word.textContent === name);
  found.forEach((word) => word.classList.add("seen"));
  one("#where").textContent = found.length ? `${name}: ${found.length} times` : "";
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a.name");
  if (link) {
    see(link.dataset.name);
  } else if (event.target.closest("#file .n") && !String(getSelection())) {
    see(event.target.closest(".n").textContent);
  }
});

const axes = new Map(all(".axes > div").map((row) => [one("dt", row).textContent, row]));
const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

function hint(event) {
  const suffix = event.target.closest?.(".n b");
  axes.forEach((row) => row.classList.remove("lit"));
  tip.hidden = !suffix || !axes.size;
  if (tip.hidden) return;
  const table = document.createElement("table");
  for (const letter of suffix.textContent.slice(1)) {
    const row = table.insertRow();
    const head = document.createElement("th");
    head.textContent = letter;
    row.append(head);
    row.insertCell().textContent = letter === "1" ? "an axis of size 1" : one("dd", axes.get(letter))?.textContent ?? "";
    axes.get(letter)?.classList.add("lit");
  }
  tip.replaceChildren(table);
  const box = suffix.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${box.bottom + tip.offsetHeight + 10 > innerHeight ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
}

document.addEventListener("mouseover", hint);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// ---- compare ---------------------------------------------------------------------------------------------------

function chooseSibling(name) {
  all(".chip").forEach((chip) => chip.setAttribute("aria-pressed", chip.dataset.sibling === name));
  all(".diff").forEach((diff) => { diff.hidden = diff.id !== `diff-${name}`; });
}

all(".chip").forEach((chip) => chip.addEventListener("click", () => {
  chooseSibling(chip.dataset.sibling);
  history.replaceState(null, "", `#diff-${chip.dataset.sibling}`);
}));

// ---- copy ------------------------------------------------------------------------------------------------------

all(".copy").forEach((button) => button.addEventListener("click", async () => {
  const said = button.textContent;
  const text = button.dataset.copy ?? one("#file").textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = "not allowed here";
  }
  setTimeout(() => { button.textContent = said; }, 1500);
}));

// ---- addresses: #L12, #step-4, #diff-fomaml, #speed ------------------------------------------------------------

function arrive() {
  const id = decodeURIComponent(location.hash.slice(1));
  if (!id) return;
  if (id.startsWith("diff-")) chooseSibling(id.slice(5));
  const target = document.getElementById(id);
  const panel = target?.closest("[role=tabpanel]");
  if (panel) openTab(document.getElementById(panel.getAttribute("aria-labelledby")));
  if (id.startsWith("step-")) return pin(id.slice(5), "address");
  if (/^L\d+$/.test(id)) unfold(Number(id.slice(1)));
  if (panel && target !== panel) target.scrollIntoView({ block: id.startsWith("L") ? "center" : "start" });
}

if (folds.length) {
  setFold(folds[0], false); // the docstring stands at the left already
  showFolds();
}
addEventListener("hashchange", arrive);
arrive();

// ---- search ----------------------------------------------------------------------------------------------------

const field = one("#search"), found = one("#found"), root = document.documentElement.dataset.root;
let chosen = -1;

function loadIndex() {
  if (window.searchIndex || one("#index")) return;
  const script = document.createElement("script"); // a script and not a fetch, which file:// does not allow
  script.id = "index";
  script.src = `${root}assets/search.js`;
  script.onload = search;
  document.head.append(script);
}

function score(entry, terms) {
  const [title, where, , text] = entry.map((x) => x.toLowerCase());
  let sum = 0;
  for (const term of terms) {
    if (title === term) sum += 12;
    else if (title.startsWith(term)) sum += 7;
    else if (title.includes(term)) sum += 4;
    else if (where.includes(term)) sum += 2;
    else if (text.includes(term)) sum += 1;
    else return 0;
  }
  return sum + (where === "algorithm" ? 6 : 0);
}

function search() {
  const terms = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  chosen = -1;
  field.removeAttribute("aria-activedescendant");
  found.hidden = !terms.length;
  field.setAttribute("aria-expanded", !found.hidden);
  if (found.hidden || !window.searchIndex) return;
  const best = window.searchIndex.map((entry) => [score(entry, terms), entry]).filter(([points]) => points)
    .sort((a, b) => b[0] - a[0]).slice(0, 12);
  found.replaceChildren(...best.map(([, [title, where, address, text]], k) => {
    const item = document.createElement("li"), link = document.createElement("a");
    const name = document.createElement("b"), place = document.createElement("i"), some = document.createElement("p");
    item.setAttribute("role", "option");
    item.id = `found-${k}`;
    link.href = root + address;
    link.tabIndex = -1;
    name.textContent = title;
    place.textContent = where;
    const at = Math.max(0, text.toLowerCase().indexOf(terms[0]) - 50);
    some.textContent = (at ? "… " : "") + text.slice(at, at + 180);
    link.append(name, place, ...(title.startsWith("[") ? [] : [some])); // a step says all by itself
    item.append(link);
    return item;
  }));
  if (!best.length) {
    const item = document.createElement("li");
    item.className = "nothing";
    item.textContent = "Nothing has all of these words.";
    found.append(item);
  }
}

field.addEventListener("focus", loadIndex);
field.addEventListener("input", search);
field.addEventListener("keydown", (event) => {
  const links = all("a", found);
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    chosen = (chosen + (event.key === "ArrowDown" ? 1 : -1) + links.length) % (links.length || 1);
    links.forEach((link, k) => {
      link.classList.toggle("on", k === chosen);
      link.parentElement.setAttribute("aria-selected", k === chosen);
    });
    field.setAttribute("aria-activedescendant", `found-${chosen}`);
    links[chosen]?.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Enter" && links.length) {
    links[Math.max(0, chosen)].click();
    found.hidden = true;
  }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest(".search") || event.target.closest("#found a")) found.hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    found.hidden = true;
    tip.hidden = true;
    if (steps.size) {
      clear();
      if (location.hash.startsWith("#step-")) history.replaceState(null, "", location.pathname);
    }
    if (document.activeElement === field) field.blur();
  } else if (event.key === "/" && !event.target.closest("input, select, textarea")) {
    event.preventDefault();
    field.focus();
  }
});
