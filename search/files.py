"""Files of a run folder: whole or not there, and a cut one is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from lacer.envs import LacerError
from lacer.search.presets import read_yaml

END = "# end of the configuration\n"
"""Last line of ``config.yaml``: a file that was cut has none, though it may still be YAML."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it has the old or the new content, whatever happens. Raises OSError."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


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


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises LacerError naming the file if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LacerError(f"{path} is damaged: {e}. Restore it from a copy.") from None
    if not isinstance(data, dict):
        raise LacerError(f"{path} is damaged: expected an object.")
    return data
