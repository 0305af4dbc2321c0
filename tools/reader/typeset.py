"""The plain-text mathematics of a docstring, set as HTML: `theta'_i` with a prime and a subscript, `grad` as nabla.

The docstrings have one way to write things, read here: Greek letters by name, single letters, primes, `_` and `^`
with a word or brackets behind, `<-`, `||`, `..`. What is a name in the code becomes a link to it. It is HTML and not
MathML, since formulas stand within sentences and break where those do.
"""

import re
from html import escape
from keyword import iskeyword

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eps": "ε", "eta": "η", "theta": "θ",
    "lambda": "λ", "mu": "μ", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "psi": "ψ",
    "omega": "ω",
}  # fmt: skip
NABLA = ("grad", "nabla")
UPRIGHT = ("mean", "sum", "softmax", "log", "min", "max", "KL", "net", "trace", "clip", "H")
OPERATORS = {
    "<->": "↔", "<-": "←", "->": "→", "<=": "≤", ">=": "≥", "||": "‖", "+-": "±", "..": "…", "~": "∼", " - ": " − ",
    " * ": " · ",
}  # fmt: skip
SCRIPT = r"\([^()]*\)|:?-?[A-Za-z0-9]+'*(?:[+-]\d+(?![\w.]))?"
BASES = "|".join(sorted((*GREEK, *NABLA, *UPRIGHT), key=len, reverse=True))
SYMBOL = (
    rf"(?<![\w'’`-])(?P<base>{BASES}|[A-Z]{{2,}}(?=_[a-z])|[A-Za-z])(?P<primes>'*)"
    rf"(?P<scripts>(?:[_^](?:{SCRIPT}))*)(?![\w`]|'[a-z])"
)
TOKENS = re.compile(
    r"(?P<code>`[^`]+`)"
    r"|(?P<url>https?://[^\s,;)]+[^\s,;).])"
    r"|(?P<arxiv>(?:arXiv:)?\b\d{4}\.\d{5}\b)"
    r"|(?P<file>\b(?:docs|algos|benchmark)/\w+\.(?:md|py)\b|\b\w+\.py\b)"
    r"|(?P<flag>(?<![\w-])--[a-z][a-z-]*[a-z])"
    r"|(?P<tag>\[\d+\])"
    r"|(?P<power>(?<=[)\]])\^-?\w+)"
    r"|(?P<times>(?<=\d) x (?=\d))"
    rf"|(?P<operator>{'|'.join(map(re.escape, OPERATORS))})"
    r"|(?P<minus>(?<![\w)\]'])-(?=[\w(\[|]))"
    rf"|(?P<symbol>{SYMBOL})"
    r"|(?P<name>[A-Za-z]\w+)"
)


def letter(base: str) -> str:
    """A symbol without its scripts."""
    if base in NABLA:
        return "∇"
    if base in GREEK:
        return f"<i>{GREEK[base]}</i>"
    return f"<i>{base}</i>" if len(base) == 1 else f'<span class="fn">{base}</span>'


def scripts(text: str) -> str:
    """Subscripts and superscripts, `_i^2`; a subscript of a subscript hangs lower, `_theta'_i`."""
    html, opened = "", 0
    for mark, body in re.findall(rf"([_^])({SCRIPT})", text):
        inside = mathematics(body[1:-1] if body.startswith("(") else body)
        if mark == "_":
            html += f"<sub>{inside}"
            opened += 1
        else:
            html += "</sub>" * opened + f"<sup>{inside}</sup>"
            opened = 0
    return html + "</sub>" * opened


def mathematics(text: str) -> str:
    """All of a script's text is mathematics."""
    html = ""
    for word, rest in re.findall(r"([A-Za-z]+)|([^A-Za-z]+)", text):
        html += letter(word) if word and (len(word) == 1 or word in GREEK) else word
        html += escape(rest, quote=False).replace("'", "′").replace("-", "−")
    return html


def is_article(text: str, match: re.Match) -> bool:
    """Whether a lone "a" or "A" is the word: followed by a word, and at the beginning of a sentence where it is "A"."""
    if match["symbol"] not in ("a", "A") or not re.match(r" (?:[A-Za-z]{2}|`)", text[match.end() :]):
        return False
    before = text[: match.start()].rstrip()
    if match["symbol"] == "A":
        return not before or before[-1] in ".:"
    return not re.search(r"[=|]$", before)


def typeset(text: str, names: dict[str, int], files: dict[str, str] | None = None, link_names: bool = False) -> str:
    """A docstring's text as HTML.

    names: identifier -> line in the file, to link those in backticks (and, with link_names, all that a reader could
    take for code: those with an underscore, and those behind "=") to.
    files: name of a file -> address of its page.
    """
    html, end = "", 0
    for match in TOKENS.finditer(text):
        between = text[end : match.start()]
        html += escape(between)
        end = match.end()
        kind, token = match.lastgroup, match[0]
        if match["symbol"]:
            kind, token = "symbol", match["symbol"]
        if kind == "code":
            html += code(token.strip("`"), names)
        elif kind == "url":
            html += f'<a href="{escape(token)}">{escape(token.split("//")[1])}</a>'
        elif kind == "arxiv":
            html += f'<a href="https://arxiv.org/abs/{token.removeprefix("arXiv:")}">{token}</a>'
        elif kind == "file" and (files or {}).get(token):
            html += f'<a href="{files[token]}">{token}</a>'
        elif kind in ("file", "flag"):
            html += f"<code>{token}</code>"
        elif kind == "tag":
            html += f'<a class="tag" href="#step-{token[1:-1]}">{token}</a>'
        elif kind == "power":
            html += scripts(token)
        elif kind == "times":
            html += " × "
        elif kind == "operator":
            html += OPERATORS[token]
        elif kind == "minus":
            html += "−"
        elif kind == "symbol":
            html += symbol(text, match, names)
            end += int(match["base"] in NABLA and text[end : end + 2].strip() != "" and text[end] == " ")  # close up
        if kind == "name" or (kind == "symbol" and link_names and html.endswith(token)):
            html = html.removesuffix(token) if kind == "symbol" else html
            behind = link_names and re.search(r"=\s*(?:[\w.]+,? (?:and )?)?$", text[: match.start()])
            is_code = token in names and not iskeyword(token) and ("_" in token or behind)
            html += code(token, names) if is_code else escape(token)
    return html + escape(text[end:])


def symbol(text: str, match: re.Match, names: dict[str, int]) -> str:
    """A symbol with its primes and scripts; a word that only looks like one, as it is."""
    token, base = match["symbol"], match["base"]
    is_word = len(base) > 1 and base not in GREEK and base not in NABLA
    if is_article(text, match) or (len(base) == 1 and re.match(r"-[A-Za-z]{2}", text[match.end() :])):
        return token
    if re.search(r"\.\w*$", text[: match.start()][-8:]) and re.search(r"\w\.$", text[: match.start()]):
        return token  # "i.e."
    if token in ("s", "k", "M") and re.search(r"\d $", text[: match.start()]):
        return token  # a unit: 0.01 s
    if is_word and not match["scripts"]:
        return f'<span class="fn">{base}</span>' if text[match.end() : match.end() + 1] in ("(", "[") else token
    if "_" in token and token in names and base not in GREEK:
        return code(token, names)
    html = letter(base) + "′" * len(match["primes"]) + scripts(match["scripts"])
    return html


def code(token: str, names: dict[str, int]) -> str:
    """A piece of code; a link to where it stands in the file if it is a name there."""
    if token in names:
        return f'<a class="name" href="#L{names[token]}" data-name="{token}"><code>{token}</code></a>'
    return f"<code>{escape(token)}</code>"
