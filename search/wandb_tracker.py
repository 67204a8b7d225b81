"""Weights & Biases: one run per search, or one per candidate too, written by a thread of its own."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlparse

from lacer.search.drawing import clean, encoder_svg
from lacer.search.outcome import WINNER, Outcome
from lacer.search.study import Trial, score_of
from lacer.search.tracking import Media, Totals, decisions, key, scalars
from lacer.search.wandb_files import log_files, scan

log = logging.getLogger("lacer")

POLICY_FILES = ("policy.safetensors", "agent.json", "encoder.json")


class WandB:
    """Mirrors a search in W&B. Trials that an earlier session has logged are left out.

    The run of the search has a row per trial over ``trial``, every candidate's learning curve over ``env_steps``, and
    at the end a table of all candidates, pictures, and the best encoder and policy as artifacts: the run uses the
    encoder and makes the policy, which is how W&B's lineage graph connects them. With ``runs="candidate"`` each
    candidate has a run of its own too, whose configuration holds its decisions. All runs of a search share the group
    (the comparison), are tagged with designer and seed, and have both in their configuration.

    Calls return at once: a thread writes. So an unreachable server holds nothing up; if it cannot be reached at the
    start, the files are written offline, to be uploaded with ``lacer sync``.

    Args:
        folder: the run folder; files go to ``wandb/`` in it.
        mode: ``online`` or ``offline``.
        runs: ``search`` or ``candidate``.
        project, group, name: as W&B calls them.
        run_id: of the search's run, kept in the study, so that a resumed search continues it. Candidates' ids follow
            from it.
        config: the search's configuration as plain data, without secrets.
        designer: who proposes.
        metric: name of the objective.
        say: tells the user a line.
    """

    def __init__(self, folder: Path, mode: str, *, runs: Literal["search", "candidate"], project: str, group: str,
                 name: str, run_id: str, config: Mapping[str, Any], designer: str, metric: str,
                 say: Callable[[str], None]) -> None:
        self._folder, self._mode, self._runs, self._id, self._metric = folder, mode, runs, run_id, metric
        self._project, self._group, self._name, self._say = project, clean(group), clean(name), say
        self._config = {**_plain(config), "designer": clean(designer), "comparison": self._group}
        self._tags = [clean(designer)[:64], f"seed-{config['seed']}", clean(config["env"])[:64]]
        self._designer = clean(designer)
        self._run: Any = None
        self._step = 0
        self._logged: set[int] = set()
        self._ids = [run_id]
        self._since = time.time()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._busy = True
        self._exit_code = 0
        self._thread = threading.Thread(target=self._write, name="wandb", daemon=True)
        self._thread.start()

    def trial(self, trial: Trial, totals: Totals) -> None:
        """Logs a finished trial."""
        self._work.put(lambda: self._log_trial(trial, totals))

    def finish(self, outcome: Outcome, folder: Path, media: Media) -> None:
        """Logs the table of candidates, the artifacts, the pictures and the summary."""
        self._work.put(lambda: self._log_outcome(outcome, folder, media))

    def close(self, exit_code: int, timeout: float) -> None:
        """Ends the run; gives up waiting after ``timeout`` seconds."""
        self._exit_code = exit_code
        self._work.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %g s; its files stay in %s, see `lacer sync`", timeout,
                        self._folder / "wandb")

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._start()
            while (job := self._next()) is not None:
                job()
            self._run.finish(self._exit_code)
            self._wait_for_files()
        except BaseException as e:  # no disk, no network, a broken installation: the search goes on without W&B
            self._say(f"W&B is off: {type(e).__name__}: {str(e)[:200]}")
            while self._work.get() is not None:
                pass

    def _next(self) -> Callable[[], None] | None:
        self._busy = False
        job = self._work.get()
        self._busy = True
        return job

    def _start(self) -> None:
        try:
            self._run = self._new(self._id, self._name, "search", self._config)
        except Exception as e:
            if self._mode == "offline":
                raise
            # The failed attempt holds the id until the service ends; other runs of this process would end with it.
            import wandb

            if wandb.run is None:
                wandb.teardown()
            self._mode = "offline"
            self._say(f"W&B cannot be reached ({str(e).splitlines()[0][:160] if str(e) else type(e).__name__}). It is "
                      f"logged offline; later: lacer sync {self._folder}")
            self._run = self._new(self._id, self._name, "search", self._config)
        for name, by in (("*", "trial"), ("train/*", "env_steps"), ("final_winner/return", "env_steps"),
                         ("final_expert/return", "env_steps")):
            self._run.define_metric(name, step_metric=by, step_sync=False)  # rows bring their own
        earlier = [scan(p) for p in log_files(self._folder, self._id)]
        self._step = max([int(self._run.step), *(s.last_step + 1 for s in earlier)])
        self._logged = {n for s in earlier for n in s.trials}

    def _new(self, run_id: str, name: str, kind: str, config: Mapping[str, Any]) -> Any:
        import wandb

        # `create_new`: neither takes over a run that is open in this process nor ends it. The list of packages, which
        # takes longest to make, is in the search's run only; versions are in versions.json too.
        settings: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True,
                                    "x_disable_stats": True, "reinit": "create_new",
                                    "x_save_requirements": kind == "search"}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = 30
        return wandb.init(
            project=self._project, id=run_id, name=name, group=self._group, job_type=kind, tags=self._tags,
            resume="allow", dir=str(self._folder), mode=self._mode, config=_plain(config),  # type: ignore[arg-type]
            settings=wandb.Settings(**settings))

    def _log(self, row: Mapping[str, Any]) -> None:
        # Steps of our own go on over the sessions of a resumed search, also where no server knows the last one.
        self._run.log(_plain(row), step=self._step)
        self._step += 1

    def _log_trial(self, trial: Trial, totals: Totals) -> None:
        if trial.number in self._logged:
            return
        e = trial.evaluation
        values = scalars(e, self._metric) if e is not None else {}
        if self._runs == "candidate":
            self._log_candidate(trial, values)
        for step, value in e.curve if e is not None else []:
            self._log({f"train/return_{trial.number:04d}": value, "env_steps": step})
        self._log({"trial": trial.number, "status": trial.status, "ncode": trial.ncode,
                   "designer": trial.proposal.designer, **totals.scalars, **values,
                   **{key("llm", k): v for k, v in trial.usage.items()}})
        self._logged.add(trial.number)

    def _log_candidate(self, trial: Trial, values: Mapping[str, float]) -> None:
        self._ids.append(f"{self._id}-{trial.number:04d}")
        run = self._new(self._ids[-1], f"{self._name}-{trial.number:04d}", "candidate", {
            **{k: self._config[k] for k in ("env", "env_kwargs", "seed", "protocol", "comparison")},
            "designer": trial.proposal.designer, "search": self._id, "search_designer": self._designer,
            "trial": trial.number, "decisions": decisions(trial)})
        run.define_metric("*", step_metric="env_steps", step_sync=False)
        for step, value in trial.evaluation.curve if trial.evaluation is not None else []:
            run.log({"train/return": value, "env_steps": step})
        run.log(values)
        run.summary.update({"status": trial.status, "ncode": trial.ncode, "reason": clean(trial.reason)[:500],
                            "rationale": clean(trial.proposal.rationale)[:2000]})
        run.finish(0 if trial.status == "ok" else 1)

    def _log_outcome(self, outcome: Outcome, folder: Path, media: Media) -> None:
        import wandb

        self._log({"candidates": self._table(outcome)})
        for name, e in outcome.finals.items():
            for step, value in e.curve:
                self._log({key(f"final_{name}", "return"): value, "env_steps": step})
        pictures: dict[str, Any] = {
            key("media", source): [wandb.Image(str(p), caption=p.stem) for p in paths]
            for source, paths in media.frames.items()}
        if media.video is not None:
            pictures["media/video"] = wandb.Video(str(media.video), format=cast(Any, media.video.suffix[1:]))
        best = next((t for t in outcome.trials if t.number == outcome.winner), None)
        if best is not None and best.spec is not None:
            pictures["media/encoder"] = wandb.Html(encoder_svg(best.spec, outcome.card), inject=False)
        if pictures:
            self._log(pictures)
        summary: dict[str, Any] = {"winner": outcome.winner, "seconds": outcome.seconds,
                                   "candidates_ok": sum(t.status == "ok" for t in outcome.trials),
                                   "candidates_failed": sum(t.status == "failed" for t in outcome.trials),
                                   "candidates_pruned": sum(t.status == "pruned" for t in outcome.trials),
                                   "candidates_rejected": sum(t.status == "rejected" for t in outcome.trials)}
        for name, e in outcome.finals.items():
            summary |= {key(f"final_{name}", k): v for k, v in scalars(e, self._metric).items()}
        summary |= {key("llm", k): v for k, v in outcome.usage.items()}
        if best is not None:
            summary["best_decisions"] = decisions(best)
            self._artifacts(outcome, best, folder)
        self._run.summary.update(summary)

    def _table(self, outcome: Outcome) -> Any:
        import wandb

        sources = list(outcome.card.sources)
        table = wandb.Table(columns=[
            "trial", "status", "designer", self._metric, "return", "parameters", "env_steps", "seconds", "expected",
            *(f"block {s}" for s in sources), "fusion", *(f"linear probe {s}" for s in (*sources, "fused")),
            "rationale", "reason", "ncode", "encoder"], allow_mixed_types=True)
        for t in outcome.trials:
            e, spec = t.evaluation, t.spec
            probes = e.probes if e else {}
            expected = t.proposal.meta.get("expected")
            table.add_data(
                t.number, t.status, clean(t.proposal.designer), t.objective, e.mean_return if e else None,
                e.cost.parameters if e else None, e.cost.env_steps if e else None, e.cost.total_seconds if e else None,
                float(expected) if isinstance(expected, int | float) else None,
                *(spec.sources[s].block if spec and s in spec.sources else "" for s in sources),
                spec.fusion.block if spec else "",
                *(probes.get(s, {}).get("linear_probe") for s in (*sources, "fused")),
                clean(t.proposal.rationale), clean(t.reason), t.ncode, spec.to_json() if spec else "")
        return table

    def _artifacts(self, outcome: Outcome, best: Trial, folder: Path) -> None:
        import wandb

        assert best.spec is not None
        task = key(outcome.card.env_id.split("/")[-1])
        about = {"env": outcome.card.env_id, "trial": best.number, "designer": clean(best.proposal.designer),
                 "seed": self._config["seed"], "encoder_hash": best.spec.hash,
                 self._metric: score_of(best, outcome.trials)}
        encoder = wandb.Artifact(f"{task}-encoder", "encoder", metadata=about)
        with encoder.new_file("encoder.json", encoding="utf-8") as f:
            f.write(best.spec.to_json() + "\n")
        # `use_artifact` for an artifact of this very run. The public method refuses offline, though the record is the
        # same and W&B's own sync knows what to do with it; online it would wait for the server.
        self._run._log_artifact(encoder, aliases=["latest", "best"], is_user_created=True, use_after_commit=True)
        final = outcome.finals.get(WINNER)
        if final is None or not all((folder / "best" / name).is_file() for name in POLICY_FILES):
            return
        policy = wandb.Artifact(f"{task}-policy", "policy",
                                metadata={**about, "final": final.objective, "final_steps": final.cost.env_steps})
        for name in POLICY_FILES:
            policy.add_file(str(folder / "best" / name), policy="immutable", skip_cache=True)
        self._run.log_artifact(policy, aliases=["latest", "best"])

    def _wait_for_files(self, timeout: float = 20.0) -> None:
        """Until the offline files of this session hold the record of the exit: `finish` may return before."""
        if self._mode != "offline":
            return
        end = time.monotonic() + timeout
        left = [p for i in self._ids for p in log_files(self._folder, i, offline=True)
                if p.stat().st_mtime >= self._since - 2]
        if not left:
            raise OSError("W&B wrote no files")
        while left := [p for p in left if not scan(p).ended]:
            if time.monotonic() > end:
                raise OSError(f"{left[0]} is not complete; is the disk full?")
            time.sleep(0.05)


def _plain(data: Any) -> Any:
    """Data whose texts can be written as UTF-8: a model or an environment may say anything."""
    if isinstance(data, str):
        return clean(data)
    if isinstance(data, Mapping):
        return {clean(k): _plain(v) for k, v in data.items()}
    return [_plain(v) for v in data] if isinstance(data, list | tuple) else data


def wandb_mode(wanted: str) -> str:
    """``auto`` becomes ``online`` if there is a login (WANDB_API_KEY or netrc), else ``offline``."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return {"disabled": "off"}.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    return "online" if logged_in() else "offline"


def server() -> str:
    """Address of the W&B server: ``WANDB_BASE_URL``, or that of the public one."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def logged_in() -> bool:
    """Whether there is an API key for the server, in WANDB_API_KEY or netrc."""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(server()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return bool(os.environ.get("WANDB_API_KEY")) or known
