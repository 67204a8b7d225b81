"""Files of a run folder: whole or not there, and a cut one is noticed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lacer.envs import LacerError
from lacer.search.presets import read_yaml

END = "# end of the configuration\n"
"""Last line of ``config.yaml``: a file that was cut has none, though it may still be YAML."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it has the old or the new content, whatever happens, also if several processes write it at
    once. Raises OSError."""
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with new.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Writes ``config.yaml``. Raises OSError."""
    write_whole(path, yaml.safe_dump(config, sort_keys=False) + END)


def read_config(path: Path) -> dict[str, Any]:
    """Reads ``config.yaml``. Raises LacerError if it is not there, cut, or no YAML."""
    data = read_yaml(path)
    if not path.read_text(encoding="utf-8").endswith(END):
        raise LacerError(f"{path} is damaged: its end is missing ({END.strip()!r}). Restore it from a copy; the file "
                         "was left as it is.")
    return data


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a file's lock while the context lasts; gives whether it could, since one process at a time can."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_locked(path: Path, shared: bool = False) -> bool:
    """Whether a process of this machine holds the lock of a file; ``shared``: also one that shares it with others."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, (fcntl.LOCK_EX if shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises LacerError naming the file if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LacerError(f"{path} is damaged: {e}. Restore it from a copy.") from None
    if not isinstance(data, dict):
        raise LacerError(f"{path} is damaged: expected an object.")
    return data
