"""W&B's transaction logs (``run-ID.wandb``): LevelDB's log format, each record a protobuf message."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32768, 7


@dataclass(frozen=True)
class Scan:
    """What a file holds.

    Attributes:
        ended: whether the run's end is in it; if not, the file is still written or was cut.
        rows: rows of history.
        last_step: the last row's step, -1 without rows.
        trials: what rows have under ``trial``.
    """

    ended: bool
    rows: int
    last_step: int
    trials: frozenset[int]


def log_files(folder: Path, run_id: str = "*", offline: bool = False) -> list[Path]:
    """The files of a run folder, oldest first; all, or those of one W&B run; those written offline only."""
    kinds = ("offline-run",) if offline else ("offline-run", "run")
    found = [p for k in kinds for p in folder.glob(f"wandb/{k}-*-{run_id}/run-{run_id}.wandb")]
    return sorted(found, key=lambda p: p.parent.name.removeprefix("offline-"))


def scan(path: Path) -> Scan:
    """Reads a file; a cut record ends it. Raises OSError."""
    ended, rows, last, trials = False, 0, -1, set()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows += 1
            last = max(last, int(record.history.step.num))
            trials |= {int(i.value_json) for i in record.history.item
                       if (i.key or ".".join(i.nested_key)) == "trial" and i.value_json.isdigit()}
        ended = ended or kind == "exit"
    return Scan(ended, rows, last, frozenset(trials))


def _records(data: bytes) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    place, parts = 7, b""
    while place + _HEAD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:  # too short for a header: padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        body = data[place + _HEAD:place + _HEAD + length]
        if not 1 <= kind <= 4 or len(body) < length:
            return
        place += _HEAD + length
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            record = Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            yield record
