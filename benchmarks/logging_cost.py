"""What logging takes of a search's time: TensorBoard and W&B (offline), measured inside one run of `lacer search`.

    python benchmarks/logging_cost.py [candidates=8] [steps=4096] [runs=search] [workers=2]

Counted are the wall time that the driver spends in calls of the trackers (their start included, the wait for W&B at the
end too), the processor time of W&B's thread, and that of its service. The first is what a user waits for at most; the
others compete with the candidates for the cores. Both are given as shares of the run's wall time, and of its core
seconds (wall time times cores).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def service_seconds() -> float:
    """Processor time of W&B's service, a child of this process."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        name, rest = text[text.index("(") + 1:text.rindex(")")], text[text.rindex(")") + 2:].split()
        if name.startswith("wandb-core") and int(rest[1]) == os.getpid():
            total += int(rest[11]) + int(rest[12])
    return total / os.sysconf("SC_CLK_TCK")


def main(arguments: dict[str, str]) -> None:
    """Runs a search and prints the shares."""
    from lacer.search import loop
    from lacer.search.wandb_files import log_files, scan
    from lacer.search.wandb_tracker import WandB

    spent = {"driver": 0.0, "thread": 0.0, "service": 0.0}

    # `_start_trackers` and `_close` call `_track` themselves; it is timed where the driver calls it directly.
    depth = 0

    def outermost(cls: Any, name: str) -> None:
        whole = getattr(cls, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    spent["driver"] += time.perf_counter() - start
        setattr(cls, name, call)

    for name in ("_start_trackers", "_track", "_close"):
        outermost(loop._Driver, name)
    write = WandB._write

    def timed_write(self: Any) -> None:
        try:
            write(self)
        finally:
            spent["thread"] = time.thread_time()
            spent["service"] = service_seconds()
    WandB._write = timed_write  # type: ignore[method-assign]

    n, steps = int(arguments.get("candidates", 8)), int(arguments.get("steps", 4096))
    workers = int(arguments.get("workers", 2))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = loop.search(
            "lacer/KnownSources-v0", designer="random", candidates=n, workers=workers, text_model="hash",
            out=Path(folder) / "run", quiet=True, wandb="offline", wandb_runs=arguments.get("runs", "search"),
            protocol={"steps": steps}, final_steps=steps, final_episodes=10)
        wall = time.perf_counter() - start
        files = [scan(p) for p in log_files(result.folder)]
    cores = len(os.sched_getaffinity(0))
    work = spent["driver"] + spent["thread"] + spent["service"]
    rows = sum(f.rows for f in files)
    print(f"{n} candidates x {steps:,} steps, {wall:.1f} s; W&B: {len(files)} files, {rows:,} rows, "
          f"{'all whole' if all(f.ended for f in files) else 'NOT WHOLE'}; threads left: {threading.active_count()}")
    for name, seconds in spent.items():
        print(f"  {name:8} {seconds:7.2f} s  {seconds / wall:6.2%} of the wall time")
    print(f"  all of it as a share of {cores} cores: {work / wall / cores:.2%}")
    print(json.dumps({"candidates": n, "steps": steps, "runs": arguments.get("runs", "search"), "wall": round(wall, 1),
                      **{k: round(v, 3) for k, v in spent.items()}, "driver_share": round(spent["driver"] / wall, 4),
                      "core_share": round(work / wall / cores, 4), "rows": rows}))


if __name__ == "__main__":
    main(dict(a.split("=", 1) for a in sys.argv[1:]))
