"""TensorBoard and Weights & Biases mirror the study; they are never the source of truth and never stop a search."""

from __future__ import annotations

import logging
import netrc
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lacer.agents import Evaluation
from lacer.search.outcome import Outcome
from lacer.search.study import Trial

log = logging.getLogger("lacer")


def scalars(evaluation: Evaluation, metric: str) -> dict[str, float]:
    """What both trackers show of an evaluation, under the same names."""
    out = {metric: evaluation.objective, "return": evaluation.mean_return, "parameters": evaluation.cost.parameters,
           "seconds": evaluation.cost.total_seconds, "env_steps": evaluation.cost.env_steps,
           "steps_per_second": evaluation.cost.steps_per_second}
    for source, probes in evaluation.probes.items():
        out |= {f"probes/{source}/{name}": value for name, value in probes.items() if "/" not in name}
    return {k: float(v) for k, v in out.items() if v is not None}


class TensorBoard:
    """One event folder per trial (learning curve over environment steps) and one for the search (over trials)."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._new: Callable[[str], Any] = lambda name: SummaryWriter(str(folder / name), flush_secs=10)
        self._search = self._new("search")

    def trial(self, trial: Trial, metric: str, best: float | None) -> None:
        """Writes a finished trial."""
        if trial.evaluation is None:
            return
        writer = self._new(f"trial-{trial.number:04d}")
        for step, value in trial.evaluation.curve:
            writer.add_scalar("train/return", value, step)
        writer.add_text("encoder", trial.spec.short() if trial.spec else "", 0)
        for name, value in scalars(trial.evaluation, metric).items():
            writer.add_scalar(name, value, trial.evaluation.cost.env_steps)
            self._search.add_scalar(name, value, trial.number)
        for name, value in trial.usage.items():
            self._search.add_scalar(f"llm/{name}", value, trial.number)
        writer.close()
        if best is not None:
            self._search.add_scalar("best", best, trial.number)
        self._search.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._search.close()


class WandB:
    """One W&B run per search: a row per trial, a table of all candidates at the end.

    Args:
        run_id: kept in the study, so a resumed search continues the same run.
        mode: ``online`` or ``offline``.
    """

    def __init__(self, folder: Path, mode: str, project: str, run_id: str, name: str, config: Mapping[str, Any],
                 group: str) -> None:
        import wandb

        self._wandb = wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(
            project=project, id=run_id, name=name, group=group, resume="allow", dir=str(folder), mode=mode,  # type: ignore[arg-type]
            config=dict(config), settings=wandb.Settings(silent=True, console="off", init_timeout=30,
                                                         disable_git=True, x_disable_stats=True))
        self.run.define_metric("trial")
        self.run.define_metric("*", step_metric="trial")

    def trial(self, trial: Trial, metric: str, best: float | None) -> None:
        """Logs a finished trial as one row."""
        row: dict[str, Any] = {"trial": trial.number, "status": trial.status, "ncode": trial.ncode}
        if trial.evaluation is not None:
            row |= scalars(trial.evaluation, metric)
        row |= {f"llm/{name}": value for name, value in trial.usage.items()}
        if best is not None:
            row["best"] = best
        self.run.log(row)

    def finish(self, outcome: Outcome) -> None:
        """Logs the table of candidates and the summary."""
        metric = outcome.card.objective.metric
        table = self._wandb.Table(columns=["trial", "status", "designer", "encoder", metric, "return", "parameters",
                                           "rationale", "reason"])
        for t in outcome.trials:
            e = t.evaluation
            table.add_data(t.number, t.status, t.proposal.designer, t.spec.to_json() if t.spec else "",
                           e.objective if e else None, e.mean_return if e else None, e.cost.parameters if e else None,
                           t.proposal.rationale, t.reason)
        self.run.log({"candidates": table})
        for name, evaluation in outcome.finals.items():
            self.run.summary[f"final/{name}/{metric}"] = evaluation.objective
        for name, value in outcome.usage.items():
            self.run.summary[f"llm/{name}"] = value
        self.run.summary["winner"] = outcome.winner

    def close(self, exit_code: int, timeout: float) -> None:
        """Ends the run; gives up waiting after ``timeout`` seconds."""
        ending = threading.Thread(target=self.run.finish, args=(exit_code,), daemon=True)
        ending.start()
        ending.join(timeout)
        if ending.is_alive():
            log.warning("W&B did not finish within %g s; its files stay in the run folder", timeout)


def wandb_mode(wanted: str) -> str:
    """``auto`` becomes ``online`` if there is a login (WANDB_API_KEY or netrc), else ``offline``."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return {"disabled": "off"}.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if os.environ.get("WANDB_API_KEY") or known else "offline"
