"""Cut the site's typefaces to Latin, Greek and mathematics, once, into the fonts/ of the environment it runs in.

python -m tools.reader.fonts       (`make site` does it when it sets up .venv-docs)
"""

import sys
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from fontTools.varLib import instancer

FONTS = {
    "SourceSerif4": ("fontpkg_source_serif_4", "SourceSerif4[opsz,wght].ttf"),
    "SourceSerif4-Italic": ("fontpkg_source_serif_4", "SourceSerif4-Italic[opsz,wght].ttf"),
    "SourceSans3": ("fontpkg_source_sans_3", "SourceSans3[wght].ttf"),
    "JetBrainsMono": ("fontpkg_jetbrains_mono", "JetBrainsMono[wght].ttf"),
    "JetBrainsMono-Italic": ("fontpkg_jetbrains_mono", "JetBrainsMono-Italic[wght].ttf"),
}
RANGES = [(0x20, 0x17F), (0x370, 0x3FF), (0x2010, 0x203F), (0x2070, 0x209F), (0x2100, 0x214F), (0x2190, 0x22FF)]


def cut(package: str, name: str, out: Path):
    """Write a font with these letters only, as woff2; of optical sizes the one for reading."""
    options = subset.Options()
    options.layout_features += ["tnum", "lnum"]
    font = subset.load_font(str(files(package) / "files" / name), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[x for first, last in RANGES for x in range(first, last + 1)])
    subsetter.subset(font)
    small = BytesIO()
    font.save(small)
    font = TTFont(small, lazy=False)
    if "opsz" in name:
        font = instancer.instantiateVariableFont(font, {"opsz": 14})
    font.flavor = "woff2"
    font.save(out)


if __name__ == "__main__":
    folder = Path(sys.prefix) / "fonts"
    folder.mkdir(exist_ok=True)
    for target, (package, name) in FONTS.items():
        cut(package, name, folder / f"{target}.woff2")
    for package in sorted({package for package, _ in FONTS.values()}):
        (folder / f"{package}.LICENSE.txt").write_bytes((files(package) / "LICENSE").read_bytes())
