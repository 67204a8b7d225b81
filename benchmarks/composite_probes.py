"""Probes of CompositeBench's runs in mid-training: after 256, 512, 768 and 1,024 of 2,048 steps.

The table (`data/composite_bench.parquet`) holds probes of trained agents only. Probes do not disturb a training, so its
runs are repeated up to 1,024 steps with probes on the way; each learning curve is compared with the table's, and a run
whose curve differs ends the program: the table then has to be made anew on this machine. 1,926 runs, 40 core minutes;
or the first so many, seed by seed.

    python benchmarks/composite_probes.py
    python benchmarks/composite_probes.py runs=642 out=probes.jsonl

With `out`, rows are kept as they come and a program that was ended goes on. When all are there they are written to
`data/composite_probes.parquet`: `ncode`, `seed`, `step`, `probe/PART/NAME`.

In the file that lies there, `reward_probe` looked at rewards to which PPO had added the value of what a truncated
episode would have gone on to; nothing reads that column.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lacer.agents import Protocol, RunRequest, run
from lacer.search.tables import METADATA, arrow

DATA = Path(__file__).parent / "data"
TABLE, PROBES = DATA / "composite_bench.parquet", DATA / "composite_probes.parquet"
TAKEN = ("linear_probe", "unique_r2", "reward_probe", "return_probe", "effective_rank")
STEPS = 1024


def measured(row: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The probes of one run of the table, a row for each step."""
    protocol = Protocol(**{**config["protocol"], "steps": STEPS, "eval_episodes": 1, "probes": TAKEN,
                           "probe_at": (0.2499, 0.4999, 0.7499, 0.9999)})
    e = run(RunRequest(env=config["env"], encoder=json.loads(row.encoder), protocol=protocol, seed=int(row.seed),
                       text_model=config["text_model"]))
    if not np.array_equal([r for _, r in e.curve], row.curve_returns[:len(e.curve)]):
        raise SystemExit(f"{row.ncode}, seed {row.seed}: the learning curve is not the table's ({e.reason})")
    return [{"ncode": row.ncode, "seed": int(row.seed), "step": step} | {
        f"probe/{part}/{name}": value for part, found in probes.items() for name, value in found.items()
        if "/" not in name} for step, probes in e.probe_curve]


def main(out: str = "", runs: str = "1926") -> None:
    torch.set_num_threads(1)
    _, parquet = arrow()
    config = json.loads(parquet.read_schema(TABLE).metadata[METADATA])["config"]
    frame = pd.read_parquet(TABLE, columns=["ncode", "encoder", "seed", "curve_returns"]).sort_values(
        "seed", kind="stable").head(int(runs))
    file = Path(out) if out else None
    lines = file.read_text().splitlines() if file and file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    have = {(r["ncode"], r["seed"]) for r in rows if r["step"] == STEPS}
    for row in frame.itertuples():
        if (row.ncode, row.seed) not in have:
            new = measured(row, config)
            rows += new
            have.add((row.ncode, row.seed))
            if file:
                with file.open("a") as f:
                    f.writelines(json.dumps(r) + "\n" for r in new)
            print(f"{len(have)} of {len(frame)}", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows).sort_values(["ncode", "seed", "step"]).reset_index(drop=True)
    values = [c for c in table.columns if c.startswith("probe/")]
    table[values] = table[values].astype(np.float32)
    table.to_parquet(PROBES, index=False, compression="zstd")
    print(f"{len(table)} rows in {PROBES}")


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
