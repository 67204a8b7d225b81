"""The shipped weights, and reading and writing of weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lacer.envs import LacerError
from lacer.search.ranker.model import Ranker, Size

FORMAT = "2"
"""Version of the network that weights belong to; another one computes something else with the same names."""
KEY = "ranker"
"""Entry of the file's metadata that tells version, size and training."""
SHIPPED = Path(__file__).parent / "weights.safetensors"
SHA256 = Path(__file__).parent / "weights.json"
"""Version and SHA-256 of the shipped weights."""


def save(model: Ranker, path: Path, settings: dict[str, Any]) -> None:
    """Writes weights with the size of the network and the settings of the training."""
    temporary = path.with_suffix(".tmp")
    about = {"format": FORMAT, "size": asdict(model.size), "training": settings}
    # One entry: safetensors writes several in any order, and equal weights are to be equal files.
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary, {KEY: json.dumps(about)})
    temporary.chmod(0o644)
    temporary.replace(path)


def load(path: Path, sha256: str | None = None) -> Ranker:
    """A network with the weights of a file.

    Raises:
        LacerError: no such file, no safetensors, another version of the network, another hash than ``sha256``, or
            weights that do not fit.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise LacerError(f"cannot read the ranker's weights {path}: {e.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise LacerError(f"the ranker's weights {path} are not the ones that belong to this version (SHA-256 "
                         f"{found[:12]}…, expected {sha256[:12]}…): install the package again")
    try:
        with safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {}).get(KEY, "{}"))
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as e:
        raise LacerError(f"{path} is no safetensors file: {e}") from None
    if about.get("format") != FORMAT:
        raise LacerError(f"{path} holds weights of version {about.get('format', 'unknown')} of the ranker, this is "
                         f"version {FORMAT}: train anew with `lacer ranker train`")
    try:
        model = Ranker(Size(**about["size"]))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise LacerError(f"{path} does not fit the ranker: {str(e)[:200]}") from None
    return model.eval().requires_grad_(False)


@cache
def shipped() -> Ranker:
    """The network with the shipped weights. Raises LacerError as :func:`load`."""
    try:
        about = json.loads(SHA256.read_text())
    except OSError:
        raise LacerError("this installation has no weights of the ranker: install the package again") from None
    if about["version"] != FORMAT:
        raise LacerError(f"the ranker's shipped weights are of version {about['version']}, this is version {FORMAT}: "
                         "install the package again")
    return load(SHIPPED, about["sha256"])


def parameters(model: torch.nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in model.parameters())
