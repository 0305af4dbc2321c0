"""What a run shows. Nothing that happens to the screen, or to a log in its place, ever ends a run.

A dead pipe, a closed terminal, a full disk: what cannot be written is dropped, and the run goes on.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody will ever read what is written there


class Lenient:
    """A text stream, or None where there is none, that drops what cannot be written."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: in a signal's handler, amidst a write
            if getattr(error, "errno", None) in GONE:
                self.discard()
        return len(text)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError, RuntimeError) as error:
            if getattr(error, "errno", None) in GONE:
                self.discard()

    def close(self) -> None:
        """Flush for the last time; Python would end with an error for what then is still to be written."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError, RuntimeError):
            self.discard()

    def discard(self) -> None:
        """From now on the stream leads nowhere, which always works."""
        with suppress(OSError, ValueError, AttributeError):
            number = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            self.stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return self.stream.isatty()
        return False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Standard output and standard error that drop what cannot be written, whoever writes to them."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lenient(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lenient):
                stream.close()
        sys.stdout, sys.stderr = before


def fill_standard_streams() -> None:
    """Give closed ones of the files 0 to 2 an end that leads nowhere, before another file takes their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number


def say(text: str) -> None:
    """A line on standard error, if it can be written."""
    stream = Lenient(sys.stderr)
    stream.write(f"{text}\n")
    stream.flush()


class Progress:
    """What a run is doing: a line in the terminal that is always up to date, or in a file a new line now and then.

    Lines in a file come ever more rarely, at least 10 s and a twentieth of the time since the start apart, so that the
    file stays small.
    """

    def __init__(self, name: str, total: int, done: int):
        from tqdm import tqdm

        self.name, self.total, self.done = name, total, done
        self.metrics: dict[str, str] = {}
        self.activity = ""
        self.is_closed = False
        self.since = time.monotonic()
        self.next = self.since
        options = {"initial": done, "unit": "it", "dynamic_ncols": True, "desc": name}
        self.bar = tqdm(total=total, file=sys.stderr, **options) if Lenient(sys.stderr).isatty() else None

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Show what is going on, and how much of it is done."""
        self.activity = f"{what} {done:,} / {of:,}" if of else what
        self.show()

    def end_iteration(self, line: dict[str, float]) -> None:
        """Count an iteration, and show some of its metrics; those of the last evaluation stay until the next."""
        names = [name for name in line if name.endswith(("_pre", "_post", "_trial")) or "_k" in name]
        names = [name for name in names if not name.endswith("ci95")]
        self.metrics |= {name: f"{line[name]:.3g}" for name in names[:3] + names[-1:]}
        self.activity = ""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        self.show()

    def show(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        text = ", ".join(filter(None, (self.activity, *(f"{name}={x}" for name, x in self.metrics.items()))))
        if self.bar is not None:
            self.next = now + 0.1
            self.bar.set_postfix_str(text)
        else:
            self.next = now + max(10, (now - self.since) / 20)
            say(f"{self.name}: {self.done:,} / {self.total:,} iterations, {now - self.since:.0f} s: {text}")

    def write(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.clear()
        say(text)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Show the last metrics."""
        if not self.is_closed:
            self.is_closed = True
            self.next = 0
            self.show()
            if self.bar is not None:
                self.bar.close()
