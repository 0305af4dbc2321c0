"""Weights & Biases, for runs with --track; never imported without it."""

import os
import socket
from urllib.parse import urlparse

from .processes import refusal
from .screen import say


class Tracker:
    """A run of Weights & Biases; what goes wrong there once it has begun is told, and ends nothing.

    Args:
        args: a run's flags.
        name: what the run is called.
        number: W&B's own name of a run that is to go on; empty for a new one.
    SystemExit where W&B is not installed, would ask for a login, or cannot be reached.
    """

    def __init__(self, args, name: str, number: str = ""):
        try:
            import wandb

            wandb.init  # noqa: B018, a folder of that name can be imported, too
        except (ImportError, AttributeError):
            raise refusal("--track: wandb is not installed: pip install wandb") from None
        if args.wandb_mode == "online":
            if not wandb.api.api_key:  # W&B itself would prompt for it
                raise refusal("--track: no W&B login; run `wandb login`, or pass --wandb-mode offline")
            check_network(wandb.Settings().base_url)
        settings = wandb.Settings(init_timeout=30, mode=args.wandb_mode)
        known = {"id": number, "resume": "allow"} if number else {}
        try:
            self.run = wandb.init(
                project="cleanmeta", name=name, config=vars(args), settings=settings, reinit="create_new", **known
            )
        except Exception as error:
            hint = "--wandb-mode offline keeps the run here, `wandb sync` sends it later"
            raise refusal(
                f"--track: W&B did not start ({(str(error) or repr(error)).splitlines()[0]}); {hint}"
            ) from None
        self.number = self.run.id
        self.has_failed = False

    def log(self, line: dict[str, float]) -> None:
        """Send an iteration's metrics."""
        self._try(lambda: self.run.log(line, step=line["iteration"]))

    def finish(self, failed: bool = False) -> None:
        """Send what is still to be sent, and whether the run has failed; this process may then begin another one."""
        self._try(lambda: self.run.finish(exit_code=int(failed)))

    def _try(self, action) -> None:
        try:
            action()
        except Exception as error:
            if not self.has_failed:
                say(f"--track: W&B: {error!r}; the run goes on, and metrics.jsonl has everything")
            self.has_failed = True


def check_network(address: str) -> None:
    """SystemExit if nobody answers there: W&B would take a minute to say so. Unknown behind a proxy."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return
    url = urlparse(address)
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        hint = "--wandb-mode offline keeps the run here, `wandb sync` sends it later"
        raise refusal(f"--track: {url.hostname} cannot be reached ({error}); {hint}") from None
