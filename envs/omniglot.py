"""The pictures of Omniglot, from the folders or zips of its official distribution."""

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SIDE = 28  # pixels
CLASSES = 1623  # characters of the 50 alphabets
PARTS = ("images_background", "images_evaluation")  # not images_background_small1: the same pictures again
NAMES = """
    Alphabet_of_the_Magi Anglo-Saxon_Futhorc Arcadian Armenian Asomtavruli_(Georgian) Balinese Bengali
    Blackfoot_(Canadian_Aboriginal_Syllabics) Braille Burmese_(Myanmar) Cyrillic Early_Aramaic Futurama Grantha
    Greek Gujarati Hebrew Inuktitut_(Canadian_Aboriginal_Syllabics) Japanese_(hiragana) Japanese_(katakana) Korean
    Latin Malay_(Jawi_-_Arabic) Mkhedruli_(Georgian) N_Ko Ojibwe_(Canadian_Aboriginal_Syllabics) Sanskrit
    Syriac_(Estrangelo) Tagalog Tifinagh Angelic Atemayar_Qelisayer Atlantean Aurek-Besh Avesta Ge_ez Glagolitic
    Gurmukhi Kannada Keble Malayalam Manipuri Mongolian Old_Church_Slavonic_(Cyrillic) Oriya Sylheti Syriac_(Serto)
    Tengwar Tibetan ULOG
"""
ALPHABETS = NAMES.split()  # of both parts, by their folders' names
WANTED = "no images_background/ALPHABET/characterNN/ folders there, nor images_background.zip (Omniglot's layout)"


class Character(NamedTuple):
    """Where the drawings of a character are."""

    part: Path  # a folder, or a zip
    name: str  # "Greek/character01"
    drawings: list[str]  # "0394_01.png", ..

    def __str__(self) -> str:
        return f"{self.part}/{self.name}"


def parts_of(data: str) -> list[Path]:
    """Omniglot's two parts, folders or zips, in this folder or in its omniglot-py/, as torchvision and learn2learn have
    it; ValueError if there are none."""
    for root in (Path(data), Path(data) / "omniglot-py"):
        found = [next((x for x in (root / part, root / f"{part}.zip") if x.exists()), None) for part in PARTS]
        if any(found):
            return [x for x in found if x]
    raise ValueError(f"{data}: {WANTED}")


def names_in(part: Path) -> list[str]:
    """What is in a part, by paths from there on; those of folders end in a slash."""
    if part.is_dir():
        paths = [path for path in part.rglob("*") if path.is_dir() or path.suffix == ".png"]
        return [path.relative_to(part).as_posix() + "/" * path.is_dir() for path in paths]
    try:
        with zipfile.ZipFile(part) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{part}: not a whole zip ({error})") from None
    return [name.removeprefix(f"{part.stem}/") for name in names if name.startswith(f"{part.stem}/")]


def characters_of(data: str) -> list[Character]:
    """All characters in the order of their names, those of the background's alphabets first.

    ValueError, naming what is wrong and where: no alphabets, one without characters or, where there are ten of the real
    Omniglot's 50, others of these missing; a character that is missing from an alphabet's numbering, one with other
    than the usual number of drawings.
    """
    characters = []
    present: list[str] = []
    for part in parts_of(data):
        alphabets: dict[str, dict[str, list[str]]] = {}
        for name in sorted(names_in(part)):
            words = name.rstrip("/").split("/")
            is_folder = name.endswith("/")
            if any(word.startswith(".") for word in words) or not words[0] or (len(words) == 1 and not is_folder):
                continue
            found = alphabets.setdefault(words[0], {})
            if len(words) > 1 and words[1].startswith("character") and (is_folder or len(words) == 3):
                drawings = found.setdefault(words[1], [])
                if not is_folder and name.endswith(".png"):
                    drawings.append(words[2])
        present += alphabets
        for alphabet, found in alphabets.items():
            if not found:
                raise ValueError(f"{part}/{alphabet}: no characterNN folders there")
            for number, name in enumerate(found, 1):
                if name != f"character{number:02d}":
                    raise ValueError(f"{part}/{alphabet}: character{number:02d} is missing (the next one is {name})")
                characters.append(Character(part, f"{alphabet}/{name}", found[name]))
    if not characters:
        raise ValueError(f"{data}: {WANTED}")
    missing = [alphabet for alphabet in ALPHABETS if alphabet not in present]
    if missing and len(ALPHABETS) - len(missing) >= 10:  # else it is a data set of one's own
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{data}: not the whole Omniglot: {', '.join(missing[:3])}{more} missing")
    if len(present) == 50 and len(characters) != CLASSES:
        raise ValueError(f"{data}: {len(characters)} characters in 50 alphabets; the whole Omniglot has {CLASSES}")
    usual = mode(len(character.drawings) for character in characters)
    for character in characters:
        if len(character.drawings) != usual or not usual:
            raise ValueError(f"{character}: {len(character.drawings)} drawings (.png), most characters have {usual}")
    return characters


def read_omniglot(data: str) -> Tensor:
    """Pictures [characters, drawings, 28, 28] (uint8, ink 255), in the order of their names.

    ValueError as in `characters_of`, and for a file that is no picture.
    """
    characters = characters_of(data)
    zips = {part: zipfile.ZipFile(part) for part in {x.part for x in characters} if not part.is_dir()}
    try:
        images = [
            [_read(character, file, zips.get(character.part)) for file in character.drawings]
            for character in characters
        ]
    finally:
        for file in zips.values():
            file.close()
    return torch.from_numpy(np.array(images))


def _read(character: Character, drawing: str, packed: zipfile.ZipFile | None) -> np.ndarray:
    try:
        if packed:
            content = packed.read(f"{character.part.stem}/{character.name}/{drawing}")
        else:
            content = (character.part / character.name / drawing).read_bytes()
        with Image.open(BytesIO(content)) as image:
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{character}/{drawing}: not a picture that can be read ({why})") from None
    return 255 - np.asarray(small)  # black ink on white paper becomes 255 on 0


def stamp(data: str) -> str:
    """What changes when a file of Omniglot does: names, sizes and times of change of the zips, or of all drawings."""
    digest = hashlib.sha256()
    for part in parts_of(data):
        files = [part] if part.is_file() else sorted(part.rglob("*"))
        for path in files:
            about = path.stat()
            size = 0 if path.is_dir() else about.st_size
            digest.update(f"{path.relative_to(part.parent)} {size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()
