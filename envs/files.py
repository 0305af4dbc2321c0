"""Files that are whole at every moment, the old one or the new one."""

import os
from contextlib import suppress
from pathlib import Path


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
