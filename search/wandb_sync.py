"""``lacer sync RUN``: uploads what a search logged offline, with W&B's own ``wandb sync``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lacer.envs import LacerError
from lacer.search.wandb_files import log_files, scan
from lacer.search.wandb_tracker import logged_in, server


def sync(folder: Path, timeout: float = 3600) -> str:
    """Uploads the offline files of a run folder that are not uploaded yet; a resumed search's parts in their order.

    Args:
        folder: the run folder.
        timeout: seconds after which it is given up; W&B tries an unreachable server for hours.

    Returns:
        what was done, in a sentence.

    Raises:
        LacerError: no run there, nothing logged offline, no login, or W&B could not take (all of) it.
    """
    if not (folder / "config.yaml").is_file():
        raise LacerError(f"{folder} is no run: it has no {'config.yaml' if folder.is_dir() else 'such folder'}")
    files = log_files(folder, offline=True)
    if not files:
        online = " It was logged online." if log_files(folder) else " W&B was off (--wandb off)."
        raise LacerError(f"{folder} has nothing to upload to W&B.{online}")
    left = [p for p in files if not _done(p)]
    if not left:
        return f"All {len(files)} W&B files of {folder} were uploaded before."
    if not logged_in():
        raise LacerError(f"no W&B account: run `wandb login` or set WANDB_API_KEY, for the server {server()} "
                         "(WANDB_BASE_URL chooses another one)")
    cut = [p for p in left if not scan(p).ended]
    # `wandb sync` also exits with 0 where it failed; what it uploaded is told by the markers it leaves.
    output = _run([sys.executable, "-m", "wandb", "sync", *(str(p.parent) for p in left)], timeout)
    failed = [p for p in left if not _done(p)]
    if failed:
        said = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in said if "rror" in line or "ailed" in line] or said[-3:]
        raise LacerError(f"{len(failed)} of {len(left)} W&B files of {folder} were not uploaded to {server()}; what is "
                         "missing can be uploaded by the same command again. W&B says:\n" + "\n".join(errors[:5]))
    note = f" {len(cut)} of them end in the middle, because the search was killed." if cut else ""
    return f"Uploaded {len(left)} W&B file{'s' if len(left) != 1 else ''} of {folder} to {server()}.{note}"


def _run(command: list[str], timeout: float) -> str:
    """What a command prints; it is ended after ``timeout`` seconds."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as e:
        return (e.output or b"").decode(errors="replace") + f"\nno answer within {timeout:g} s"
    return done.stdout.decode(errors="replace")


def _done(path: Path) -> bool:
    return path.with_name(path.name + ".synced").exists()
