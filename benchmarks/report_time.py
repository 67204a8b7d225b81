"""How long the report of a search takes to make, and how large it is: 12, 50 and 200 made-up candidates with learning
curves, probes, long rationales and prompts.

    python benchmarks/report_time.py

Processor seconds, the best of three; the share of the importance of decisions apart. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from lacer.search.insight import decision_importance
from lacer.search.report import render_report
from tests.search.test_report import make_outcome


def main() -> None:
    """Measures and prints."""
    out: dict[str, dict[str, float]] = {}
    for n in (12, 50, 200):
        rng = np.random.default_rng(0)
        outcome = make_outcome(n, text="A long story. " * 110)
        prompts = {t.number: (("request: user", "\n".join(f"{w} {rng.random():.4f}" for w in ("width", "score") * 400)),
                              ("request: reply", t.ncode)) for t in outcome.trials}
        outcome = replace(outcome, prompts=prompts)
        times, parts, page = [], [], ""
        for _ in range(3):
            start = time.process_time()
            page = render_report(outcome)
            times.append(time.process_time() - start)
            start = time.process_time()
            decision_importance(outcome.trials)
            parts.append(time.process_time() - start)
        out[str(n)] = {"seconds": round(min(times), 2), "importance": round(min(parts), 2),
                       "mb": round(len(page.encode()) / 1e6, 2)}
        print(f"{n:4} candidates: {min(times):5.2f} s, of it {min(parts):5.2f} s importance; {out[str(n)]['mb']} MB")
    print(json.dumps({"benchmark": "report_time", **out}))


if __name__ == "__main__":
    main()
