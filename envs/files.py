"""Files that are whole at every moment, the old one or the new one; and what is kept in one to be made only once."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor


class CannotWriteError(OSError):
    """The system does not let a run write its records."""


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at every moment it is whole, the old one or the new one; CannotWriteError if that fails."""
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()  # a full disk has room again for what is smaller
        raise CannotWriteError(f"{error}: {path}") from error


def cached(name: str, source: str, make: Callable[[], Tensor], beside: Path | None = None) -> Tensor:
    """The tensor that a file keeps, if it was made from this `source` and is whole; else `make()`, which is then kept.

    The file lies in the folder `beside`, or, where that cannot be written, in ~/.cache/cleanmeta (XDG_CACHE_HOME).
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanmeta"
    places = [folder / name for folder in (beside, home) if folder]
    for path in places:
        with suppress(Exception):  # whatever is wrong with it: it is made anew
            kept = torch.load(path, weights_only=True)
            if kept["source"] == source and kept["checksum"] == checksum(kept["images"]):
                return kept["images"]
    images = make()
    buffer = BytesIO()
    torch.save({"source": source, "checksum": checksum(images), "images": images}, buffer)
    for path in places:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, buffer.getbuffer())
            break
    return images


def checksum(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()
