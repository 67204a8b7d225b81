"""Reads W&B's offline files back: LevelDB-framed protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """All records of a ``run-*.wandb`` file; raises if one is cut."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < 7:  # the rest of a block that holds no header is padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0 and length == 0:
            break
        body = data[place + 7:place + 7 + length]
        assert len(body) == length, "cut record"
        place += 7 + length
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def read(folder: Path, run: str = "*") -> dict[str, Any]:
    """Rows of history, config, summary, ids, group, tags, artifacts (name, type, whether the run uses it, files) and
    whether the run ended, over the offline files of a run folder: all, or those of one W&B run."""
    out: dict[str, Any] = {"rows": [], "config": {}, "summary": {}, "ids": set(), "exited": [], "artifacts": [],
                           "groups": set(), "kinds": set(), "tags": set(), "axes": {}}
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")):
        exited = False
        for r in records(path):
            if r.HasField("run"):
                out["ids"].add(r.run.run_id)
                out["groups"].add(r.run.run_group)
                out["kinds"].add(r.run.job_type)
                out["tags"] |= set(r.run.tags)
                out["config"] |= {c.key: json.loads(c.value_json) for c in r.run.config.update}
            elif r.HasField("history"):
                out["rows"].append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
                                   | {"_step": r.history.step.num})
            elif r.HasField("summary"):
                out["summary"] |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.summary.update}
            elif r.HasField("artifact"):
                a = r.artifact
                files = sorted(e.path for e in a.manifest.contents)
                out["artifacts"].append((a.name, a.type, a.use_after_commit, files))
            elif r.HasField("metric"):
                out["axes"][r.metric.name or r.metric.glob_name] = r.metric.step_metric
            elif r.HasField("exit"):
                exited = True
        out["exited"].append(exited)
    return out
