"""The designer `ranker` on tables that its training never saw: search, ablations, calibration, speed.

    python benchmarks/ranker.py --seeds 100 --budget 48
    python benchmarks/ranker.py --tables composite --labels ranker,no-channels,shuffled,random,evolution,bo --budget 100
    python benchmarks/ranker.py --parts calibration,speed
    python benchmarks/ranker.py --parts synthetic --labels bo,ranker,top,plain --seeds 60

The table `composite_mean` is `composite` without luck: the mean of an encoder's trainings guides. Runs are kept in
FOLDER/runs.jsonl and are not repeated. Labels: `ranker`; `no-channels`, without probes, learning curves and costs;
`shuffled`, which sees the scores of its history in a random order; `generated`, which writes an encoder decision by
decision in place of choosing from a pool; `plain`, its Gaussian process alone; `top`, `quantile`, `thompson`, other
ways to choose among the predicted; `bo-4`, which begins with four random encoders as the ranker does, not six;
NAME=FILE, other weights; and names of other designers. The last line is JSON: by table and label the mean of the best
so far with its 95 % bootstrap interval, and over the tables the mean of the normalised one (0: mean of the table, 1:
its best); the share of scores within the predicted 80 % interval; milliseconds per proposal.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lacer.agents import Evaluation
from lacer.agents.stats import bootstrap
from lacer.envs import LacerError
from lacer.search.bench import play
from lacer.search.designers.base import Designer, fresh_sample, make_plain
from lacer.search.designers.bo import BO
from lacer.search.designers.ranker import RankerDesigner
from lacer.search.ranker.histories import Scale, draw_shapes
from lacer.search.ranker.synthetic import Task, make_task
from lacer.search.space import Decision, SearchSpace
from lacer.search.study import Proposal, Study
from lacer.search.tables import Table, read_table

DATA = Path(__file__).parent / "data"
HELD_OUT = 987_654_321
"""Seed of the synthetic tasks that a search is tried on."""
MICRO = ("class_object", "class_scene", "room_layout", "jigsaw", "segmentsemantic", "normal", "autoencoder")
PPO = "clip_eps,ent_coef,gae_lambda,learning_rate,max_grad_norm,minibatch_size,normalize_advantage,vf_clip_eps,vf_coef"


class Shuffled(RankerDesigner):
    """The ranker, misled: the scores of its history are in a random order."""

    def _read(self, coder: Any, codes: Any, z: Any, others: Any) -> Any:
        order = np.random.default_rng([self.seed, len(z)]).permutation(len(z))
        return super()._read(coder, codes, z[order], others)


class Generated(RankerDesigner):
    """The ranker, writing in place of ranking: a random encoder, each decision of which then takes the option that the
    network likes best, in two rounds. For spaces without conditions."""

    def _rank(self, study: Study, out: list[Proposal], n: int, rng: np.random.Generator) -> None:
        coder, codes, z, others, _ = self._history(study, rng)
        best = codes[np.argsort(-z, kind="stable")[:12]]
        with torch.inference_mode():
            reading = self._read(coder, codes, z, others)
            while len(out) < n:
                [code] = coder.encode([study.space.sample(rng)])
                for d in (*range(len(code)), *range(len(code))):
                    near = np.repeat(code[None], coder.sizes[d] - 1, 0)
                    near[:, d] = np.arange(len(near))
                    p = self._predict(reading, np.concatenate([near, best]))
                    code = near[self._gain(p, len(near), rng).argmax()]
                point = self._point(coder, code)
                new = study.seen(study.space.to_ncode(point)) is None
                out.append(Proposal(point if new else fresh_sample(study, out, rng), self.name))


class Plain(RankerDesigner):
    """The ranker without its Transformer: expected improvement by its Gaussian process alone."""

    def _predict(self, reading: Any, codes: Any) -> Any:
        p = super()._predict(reading, codes)
        return replace(p, weight=torch.ones_like(p.plain_mean)[..., None], mean=p.plain_mean[..., None],
                       deviation=p.plain_deviation[..., None])


def table(name: str) -> Table:
    """One of the tables by its short name."""
    if name in MICRO:
        return read_table(DATA / "tnb101_micro_val.csv.gz", score=name)
    if name == "macro":
        return read_table(DATA / "nasbench_macro.csv.gz", score="mean_acc")
    if name == "tnb101_macro":
        return read_table(DATA / "tnb101_macro_val.csv.gz", score="class_object", variable_length=True)
    if name == "arlbench":
        return read_table(DATA / "arlbench_ppo.csv.gz", PPO.split(","), "performance", bins=3, rank=True,
                          where={"env": "box2d_lunar_lander"})
    if name in ("composite", "composite_mean"):
        found = read_table(DATA / "composite_bench.parquet", ["ncode"], "objective", repeated=True)
        return found if name == "composite" else replace(
            found, scores={c: np.array([v]) for c, v in found.reported.items()}, details={})
    raise LacerError(f"no table {name!r}; there are macro, {', '.join(MICRO)}, tnb101_macro, arlbench, composite, "
                     "composite_mean")


def designer(label: str, seed: int) -> Designer:
    """A designer by its label."""
    if label == "ranker":
        return RankerDesigner(seed)
    if label == "no-channels":
        return RankerDesigner(seed, channels=False)
    if label == "plain":
        return Plain(seed)
    if label == "shuffled":
        return Shuffled(seed)
    if label == "generated":
        return Generated(seed)
    if label in ("top", "quantile", "thompson"):
        return RankerDesigner(seed, acquisition=label)  # type: ignore[arg-type]
    if label == "bo-4":
        return BO(seed, start=4)
    if "=" in label:
        return RankerDesigner(seed, weights=label.split("=", 1)[1])
    return make_plain(label, seed)


def search(tables: list[str], labels: list[str], seeds: range, budget: int, out: Path) -> dict[str, Any]:
    """Runs what is not there yet; figures at 12, 24, 48 and 100 evaluations, as far as the budget goes."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "runs.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["table"], r["label"], r["seed"]): r["best"] for r in rows if r["budget"] >= budget}
    points = [p for p in (12, 24, 48, 100, 200) if p <= budget]
    figures: dict[str, Any] = {}
    every: dict[str, list[np.ndarray]] = {}
    for name in tables:
        source = table(name)
        low, high = float(source.ordered.mean()), float(source.ordered[0])
        figures[name] = {"best": high}
        for label in labels:
            start = time.perf_counter()
            for seed in seeds:
                if (name, label, seed) not in done:
                    best = play(designer(label, seed), source, budget, seed, label).best
                    best += [best[-1]] * (budget - len(best))
                    done[name, label, seed] = best
                    with kept.open("a") as f:
                        f.write(json.dumps({"table": name, "label": label, "seed": seed, "budget": budget,
                                            "best": best}) + "\n")
            curves = np.array([done[name, label, s][:budget] for s in seeds], dtype=float)
            figures[name][label] = {p: interval(curves[:, p - 1]) for p in points}
            every.setdefault(label, []).append((curves - low) / (high - low))
            print(f"{name:16} {label:12} " + "  ".join(
                f"{p}: {m:.4f} [{a:.4f}, {b:.4f}]" for p, (m, a, b) in figures[name][label].items())
                + f"  {time.perf_counter() - start:.0f} s", flush=True)
    together = {label: {p: interval(np.mean([c[:, p - 1] for c in curves], 0)) for p in points}
                for label, curves in every.items()}
    for label, at in together.items():
        print(f"normalised mean  {label:12} " + "  ".join(
            f"{p}: {m:.4f} [{a:.4f}, {b:.4f}]" for p, (m, a, b) in at.items()))
    return {"tables": figures, "normalised": together}


def synthetic_task(number: int) -> tuple[Task, SearchSpace]:
    """A task that no training sees, and its space: what acquisition and start are chosen by."""
    rng = np.random.default_rng([HELD_OUT, number])
    while True:
        [shape] = draw_shapes(rng, 1)
        if np.prod(shape.allowed.sum(1).astype(float)) > 150:
            break
    decisions: list[Decision] = []
    kept: dict[int, tuple[str, ...]] = {}
    for d in range(len(shape.sizes)):
        condition = None
        if (p := int(shape.parent[d])) >= 0:
            on = tuple(o for o in kept.get(p, ()) if shape.on[d][int(o.split(".")[1])])
            if not on:
                continue
            condition = (f"d{p}", on)
        name = f"g{shape.group[d]}" if (shape.group == shape.group[d]).sum() > 1 else f"o{d}"
        kept[d] = tuple(f"{name}.{o}" for o in np.flatnonzero(shape.allowed[d]))
        decisions.append(Decision(f"d{d}", kept[d], condition))
    return make_task(rng, shape), SearchSpace(decisions)


def synthetic(labels: list[str], numbers: range, budget: int, out: Path) -> dict[str, Any]:
    """Searches of held-out synthetic tasks: the true score of the best so far, 0: mean of 4,000 random points, 1: the
    best that is known; differences from the first label with standard errors over tasks."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "synthetic.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["label"], r["task"]): r["best"] for r in rows if r["budget"] >= budget}
    ends = np.empty((len(numbers), 2))
    for row, number in enumerate(numbers):
        task, space = synthetic_task(number)

        def code(point: Any, task: Task = task) -> np.ndarray:
            sizes = task.shape.sizes
            return np.array([[int(point[f"d{d}"].split(".")[1]) if f"d{d}" in point else sizes[d]
                              for d in range(len(sizes))]])

        some = task.score(task.sample(np.random.default_rng([number, 6]), 4000))
        every = [task.score(code(p))[0] for p in space.points()] if space.size() <= 4000 else [some.max()]
        ends[row] = some.mean(), max(some.max(), *every)
        for label in labels:
            if (label, number) in done:
                continue
            study, d, noise = Study(space), designer(label, number), np.random.default_rng([number, 5])
            best: list[float] = []
            top = (-np.inf, 0.0)
            for _ in range(min(budget, space.size())):
                t = study.start(d.propose(study, 1)[0])
                true = float(task.score(code(t.proposal.point))[0])
                seen = true + task.noise * noise.normal()
                d.observe(study.finish(t.number, Evaluation(objective=seen)))
                top = max(top, (seen, true))
                best.append(top[1])
            done[label, number] = best + [best[-1]] * (budget - len(best))
            with kept.open("a") as f:
                f.write(json.dumps({"label": label, "task": number, "budget": budget,
                                    "best": done[label, number]}) + "\n")
    curves = np.array([[done[label, n][:budget] for n in numbers] for label in labels])
    high = np.maximum(ends[:, 1], curves.max((0, 2)))
    curves = (curves - ends[:, :1]) / (high - ends[:, 0])[:, None]
    found: dict[str, Any] = {}
    for label, c in zip(labels, curves, strict=True):
        off = c - curves[0]
        found[label] = {p: [round(float(v), 4) for v in (
            c[:, p - 1].mean(), off[:, p - 1].mean(), off[:, p - 1].std() / np.sqrt(len(numbers)))]
            for p in (8, 12, 24, 48, 100) if p <= budget}
        print(f"synthetic {label:12} " + "  ".join(f"{p}: {m:.4f} ({x:+.4f} +- {s:.4f})"
                                                   for p, (m, x, s) in found[label].items()), flush=True)
    return found


def interval(values: np.ndarray) -> list[float]:
    """Mean and its 95 % bootstrap interval."""
    low, high = bootstrap(values)
    return [round(float(v), 5) for v in (values.mean(), low, high)]


def calibration(tables: list[str], seeds: range) -> dict[str, Any]:
    """Share of the reported scores of unseen architectures within the predicted 80 % interval: random ones, and those
    that the designer itself would look at next, for histories of its own."""
    found: dict[str, Any] = {}
    for name in tables:
        source = table(name)
        rows: dict[str, list[float]] = {"random": [], "promising": []}
        for seed in seeds:
            for n in (12, 24, 48):
                d, study = RankerDesigner(seed), Study(source.space)
                sign = 1.0 if source.direction == "maximize" else -1.0
                rng = np.random.default_rng([seed, n])
                codes = [source.space.to_ncode(source.space.sample(rng)) for _ in range(n)]
                for code in dict.fromkeys(codes):
                    t = study.start(Proposal(source.space.from_ncode(code), "random"))
                    e = source.evaluation(code, int(rng.integers(len(source.scores[code]))))
                    study.finish(t.number, e.model_copy(update={"objective": sign * float(e.objective or 0.0)}))
                if n > 12:  # the second half of the history is the designer's own
                    for _ in range(n // 2):
                        [p] = d.propose(study, 1)
                        t = study.start(p)
                        e = source.evaluation(t.ncode, int(rng.integers(len(source.scores[t.ncode]))))
                        study.finish(t.number, e.model_copy(update={"objective": sign * float(e.objective or 0.0)}))
                free = [c for c in source.reported if study.seen(c) is None]
                free = [free[i] for i in rng.permutation(len(free))[:300]]
                scale = Scale(np.array([t.objective for t in study.finished], dtype=float))
                truth = scale(sign * np.array([source.reported[c] for c in free]))
                p = d.predict(study, [source.space.from_ncode(c) for c in free])
                below = p.below(torch.as_tensor(truth, dtype=torch.float32)[None])[0].numpy()
                inside = (below > 0.1) & (below < 0.9)
                rows["random"].append(float(inside.mean()))
                best = np.argsort(-p.expected()[0].numpy())[:30]
                rows["promising"].append(float(inside[best].mean()))
        found[name] = {k: round(float(np.mean(v)), 4) for k, v in rows.items()}
        print(f"calibration {name:16} {found[name]}", flush=True)
    return found


def speed() -> dict[str, list[float]]:
    """Median milliseconds of a proposal, by the clock and of the processor, on one core: pool of 512, histories of 20,
    200 and 5,000 trials."""
    torch.set_num_threads(1)
    space = SearchSpace([Decision(f"d{i}", tuple(range(6))) for i in range(12)])
    out = {}
    for n in (20, 200, 5000):
        study, rng = Study(space), np.random.default_rng(0)
        for _ in range(n):
            t = study.start(Proposal(space.sample(rng), "random"))
            study.finish(t.number, Evaluation(objective=float(rng.normal())))
        d, taken = RankerDesigner(0), []
        d.propose(study, 1)
        for _ in range(9):
            start = time.perf_counter(), time.process_time()
            d.propose(study, 1)
            taken.append([1000 * (time.perf_counter() - start[0]), 1000 * (time.process_time() - start[1])])
        out[str(n)] = [round(float(v), 1) for v in np.median(taken, 0)]
    print("milliseconds per proposal by trials in the history:", out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="search,calibration,speed", help="also: synthetic, as many tasks as seeds")
    parser.add_argument("--tables", default=",".join(("macro", *MICRO)))
    parser.add_argument("--labels", default="ranker")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=48)
    parser.add_argument("--out", default="bench/ranker", help="folder (default: bench/ranker)")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    out: dict[str, Any] = {"benchmark": "ranker", "seeds": args.seeds, "budget": args.budget}
    parts, tables = args.parts.split(","), args.tables.split(",")
    if "search" in parts:
        out |= search(tables, args.labels.split(","), seeds, args.budget, Path(args.out))
    if "synthetic" in parts:
        out["synthetic"] = synthetic(args.labels.split(","), seeds, args.budget, Path(args.out))
    if "calibration" in parts:
        out["inside_80"] = calibration(tables, seeds[:10])
    if "speed" in parts:
        out["ms_per_proposal"] = speed()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
