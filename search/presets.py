"""YAML files by path, and those that are shipped by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lacer.envs import LacerError, did_you_mean


def presets(folder: str = "") -> dict[str, str]:
    """Shipped YAML files of ``configs/`` or a folder in it: text by name. The expert's encoder is not among them."""
    files = resources.files("lacer.configs") / folder if folder else resources.files("lacer.configs")
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8")
            for f in sorted(files.iterdir(), key=lambda f: f.name)
            if f.name.endswith(".yaml") and f.name != "expert.yaml"}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, folder: str = "", what: str = "configuration") -> dict[str, Any]:
    """A YAML mapping from a file or, for a bare name such as ``quick``, from the presets of that folder.

    Raises:
        LacerError: no such file (lists the presets), or no YAML mapping.
    """
    known = presets(folder)
    try:
        text = known[str(path)] if str(path) in known else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise LacerError(f"cannot read the {what} {path}: {e.strerror if isinstance(e, OSError) else e}"
                         f"{did_you_mean(str(path), known)} Presets: {', '.join(known)}.") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        at = f", line {e.problem_mark.line + 1}, column {e.problem_mark.column + 1}" if e.problem_mark else ""
        raise LacerError(f"{path} is not YAML{at}: {e.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise LacerError(f"{path} is not YAML: {str(e)[:200]}") from None
    if not isinstance(data, dict):
        raise LacerError(f"{path}: expected keys and values at the top")
    return data
