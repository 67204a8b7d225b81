"""One PPO run from top to bottom: build, train, evaluate, probe."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from lacer.agents.checkpoint import save_agent
from lacer.agents.evaluation import Cost, Evaluation, PPOConfig, Protocol, RunRequest, check_seeds
from lacer.agents.learner import CompositePPO, Diverged
from lacer.agents.parts import Kept, learn, take_weights
from lacer.agents.policy import CompositeExtractor, CompositePolicy, policy_kwargs
from lacer.agents.probing import Hopeless, Probing
from lacer.agents.vec import EncoderVecEnv
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import LacerError, TaskCard, task_card
from lacer.envs.vec import StartMethod, close_vec, make_vec

Report = Callable[[dict[str, Any]], None]

LONGEST_EPISODE = 50_000
"""Steps after which an evaluation episode is taken for one that never ends."""


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    names = ("lacer", "torch", "stable-baselines3", "gymnasium", "numpy", "eclipse-sumo", "sentence-transformers",
             "optuna", "pydantic-ai-slim", "wandb")
    out = {"python": platform.python_version()}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def make_model(spec: EncoderSpec, card: TaskCard, table: TextTable, env: Any, protocol: Protocol,
               seed: int) -> CompositePPO:
    """SB3's PPO with the composite encoder as features extractor."""
    p = protocol.ppo
    return make_ppo(CompositePolicy, policy_kwargs(spec, card, table, p.head, p.log_std_init), env, p, seed,
                    sources=spec.sources)


def make_ppo(policy: type[CompositePolicy], arguments: dict[str, Any], env: Any, p: PPOConfig, seed: int, *,
             sources: Collection[str] | None = None) -> CompositePPO:
    """SB3's PPO as configured. torch is seeded before the policy is built.

    Args:
        sources: those that rollouts keep for the updates; None: all.

    Shortcuts are for candidates' policies; supernets train without.
    """
    shortcuts = p.shortcuts if policy is CompositePolicy else ()
    if "fused_adam" in shortcuts:
        arguments = {**arguments, "optimizer_kwargs": {"eps": 1e-5, "fused": True}}  # eps as in SB3
    if "bf16" in shortcuts:
        arguments = {**arguments, "features_extractor_kwargs": {**arguments["features_extractor_kwargs"], "bf16": True}}
    model = CompositePPO(
        policy, env, parts=torch.get_num_threads() if "halves" in shortcuts else 1, overlap="overlap" in shortcuts,
        batched_ends="batched_ends" in shortcuts,
        microbatch=p.microbatch_size if "microbatches" in shortcuts else None,
        rollout_buffer_kwargs={"sources": sources, "channels_last": "channels_last" in shortcuts},
        n_steps=p.n_steps, batch_size=min(p.batch_size, p.n_steps * p.n_envs), n_epochs=p.n_epochs,
        learning_rate=p.learning_rate, gamma=p.gamma, gae_lambda=p.gae_lambda, clip_range=p.clip_range,
        ent_coef=p.ent_coef, vf_coef=p.vf_coef, max_grad_norm=p.max_grad_norm,
        use_sde=p.use_sde, sde_sample_freq=p.sde_sample_freq,
        policy_kwargs=arguments, seed=seed, device="auto", verbose=0)
    model.set_logger(Logger(None, []))  # the default one leaves a folder in the temporary directory
    return model


class Progress(Kept):
    """Learning curve, progress reports, and the check that the parameters are finite.

    Args:
        report: see :func:`run`.
        steps: environment steps planned.
        before: steps that were taken before this model's first.
    """

    def __init__(self, report: Report, steps: int, before: int = 0) -> None:
        super().__init__()
        self.report, self.steps, self.before = report, steps, before
        self.curve: list[tuple[int, float]] = []
        self._returns: list[float] = []
        self._start, self._begin, self._earlier = time.monotonic(), -1, 0.0

    def _on_training_start(self) -> None:
        if self._begin < 0:
            self._begin = self.num_timesteps

    def _on_step(self) -> bool:
        self._returns += [float(i["episode"]["r"]) for i in self.locals["infos"] if "episode" in i]
        return True

    def _on_rollout_end(self) -> None:
        # Looked at after each update of the parameters, hence also after the last: see `check`.
        self.check()
        now = self.before + self.num_timesteps
        if self._returns:
            self.curve.append((now, float(np.mean(self._returns))))
            self._returns = []
        self.report({"steps": now, "of": self.steps, "return": self.curve[-1][1] if self.curve else None,
                     "steps_per_second": (self.num_timesteps - self._begin) / (time.monotonic() - self._start)})

    def data(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self.seconds}

    def load(self, data: Mapping[str, Any]) -> None:
        self.curve = [(int(n), float(r)) for n, r in data["curve"]]
        self._earlier = float(data["seconds"])

    @property
    def seconds(self) -> float:
        """Wall time of the training, with that before an interruption."""
        return self._earlier + time.monotonic() - self._start

    def check(self) -> None:
        """Raises Diverged if a parameter is not finite."""
        for name, p in self.model.policy.named_parameters():
            if not torch.isfinite(p).all():
                raise Diverged(f"NaN or infinite values in {name} after {self.num_timesteps} steps")


def run(request: RunRequest, report: Report = lambda _: None, *, start_method: StartMethod | None = None) -> Evaluation:
    """Trains and evaluates one candidate.

    The same request gives the same result on the same machine. A run that diverges or whose environment fails comes
    back as a failed Evaluation with its reason; only errors of the request itself are raised.

    Args:
        request: what to run.
        report: called with ``{"steps", "of", "return", "steps_per_second"}`` after every rollout.
        start_method: how environment processes are started.

    Raises:
        LacerError: if the request is wrong (unknown environment, an encoder that does not fit, training seeds among the
            evaluation's, an environment without the objective's metric).
    """
    check_seeds(request.seed, request.protocol)
    card = task_card(request.env, **request.env_kwargs)
    spec = None if request.encoder is None else EncoderSpec.parse(request.encoder, card)
    # Embeddings' last bits depend on their batch, and what is in a batch here would depend on the threads' times.
    table = TextTable(request.text_model, singly=request.in_parts or "overlap" in request.protocol.ppo.shortcuts)
    stays = False
    try:
        result = attempt(lambda: _run(request, card, spec, table, report, start_method), request.seed)
        stays = request.keep_checkpoint or result.paused_at is not None
        return result
    finally:
        if request.checkpoint is not None and not stays:
            Path(request.checkpoint).unlink(missing_ok=True)


def attempt(training: Callable[[], Evaluation], seed: int) -> Evaluation:
    """What a training says, whatever goes wrong in it: NaN, environments that die. Raises LacerError only."""
    begin = time.monotonic()
    try:
        result = training()
    except Diverged as e:
        result = Evaluation.failure(f"diverged: {e}", seed)
    except (EOFError, ConnectionError):
        result = Evaluation.failure("an environment's process died; its error is in the log", seed)
    except LacerError:
        raise
    except ValueError as e:
        if "of distribution" in str(e):  # torch's check of the actions' distribution
            result = Evaluation.failure("diverged: the distribution of the actions is not finite", seed)
        else:
            traceback.print_exc()
            result = Evaluation.failure(f"ValueError: {e}", seed)
    except Exception as e:  # whatever it is, it is the result of this candidate, not the end of the search
        traceback.print_exc()
        result = Evaluation.failure(f"{type(e).__name__}: {e}", seed)
    result.cost.total_seconds = time.monotonic() - begin
    result.versions = versions()
    return result


def _run(request: RunRequest, card: TaskCard, spec: EncoderSpec | None, table: TextTable, report: Report,
         start_method: StartMethod | None) -> Evaluation:
    protocol = request.protocol
    cost = Cost()
    model: CompositePPO | None = None
    curve: list[tuple[int, float]] = []
    probing = Probing(protocol)
    if spec is not None:
        # SB3's seeding covers the model; torch must be seeded before the encoder is built, which PPO does with `seed`.
        env = EncoderVecEnv(make_vec(request.env, protocol.ppo.n_envs, request.env_kwargs, seed=request.seed,
                                     start_method=start_method), card, table)
        hopeless, began = "", None
        try:
            model = make_model(spec, card, table, env, protocol, request.seed)
            if request.warm_start is not None:
                began = take_weights(model.policy, request.warm_start)
            progress = Progress(report, protocol.steps)
            learn(model, request, table, [progress, probing])
            progress.check()
        except Hopeless as e:
            hopeless = str(e)
        except LacerError as e:
            if model is None:
                raise
            return Evaluation.failure(str(e), request.seed, cost=Cost(env_steps=model.num_timesteps))
        finally:
            close_vec(env)
        curve = progress.curve
        assert model is not None
        model.free()  # evaluation and probes need the policy alone
        encoder = _encoder(model)
        cost.probe_seconds = probing.seconds
        cost.train_seconds = progress.seconds - probing.seconds
        cost.env_steps = model.num_timesteps
        cost.steps_per_second = model.num_timesteps / cost.train_seconds
        cost.parameters_by_module = encoder.parameters_by_module()
        cost.parameters = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
        if hopeless:
            return Evaluation(status="pruned", reason=hopeless, curve=curve, probe_curve=probing.curve, cost=cost,
                              warm_start=began, seed=request.seed)
        if request.until is not None:
            return _paused(request, card, table, model, Evaluation(
                curve=curve, probe_curve=probing.curve, cost=cost, warm_start=began, seed=request.seed,
                paused_at=model.num_timesteps), start_method)
    start = time.monotonic()
    eval_kwargs = {**request.env_kwargs, **request.eval_env_kwargs}
    episodes = evaluate(model, card, table, request.env, eval_kwargs, protocol, start_method)
    cost.env_steps += len(episodes.rows["reward"])
    cost.eval_seconds = time.monotonic() - start
    objective = float(np.mean(episodes.metrics[card.objective.metric]))
    result = Evaluation(
        objective=objective, mean_return=float(np.mean(episodes.returns)),
        returns=episodes.returns, metrics=episodes.metrics, episode_seeds=episodes.seeds, curve=curve,
        probe_curve=probing.curve, cost=cost, warm_start=began if model is not None else None, seed=request.seed)
    if not np.isfinite([*episodes.returns, objective]).all():
        return Evaluation.failure("the evaluation's return or metric is not finite", request.seed, cost=cost)
    if model is not None:
        start = time.monotonic()
        result.probes = probing.at_the_end(model.policy, episodes, lambda policy, n: evaluate(
            policy, card, table, request.env, eval_kwargs, protocol.model_copy(update={"eval_episodes": n}),
            start_method))
        cost.env_steps += probing.steps
        cost.probe_seconds += time.monotonic() - start
        if request.save_to is not None:
            assert spec is not None
            save_agent(request.save_to, model.policy, spec, card, table, request, result)
    return result


def _paused(request: RunRequest, card: TaskCard, table: TextTable, model: PPO, result: Evaluation,
            start_method: StartMethod | None) -> Evaluation:
    """A run at a pause, with a short evaluation if the request asks for one."""
    if not request.pause_episodes:
        return result
    start = time.monotonic()
    episodes = evaluate(model, card, table, request.env, {**request.env_kwargs, **request.eval_env_kwargs},
                        request.protocol.model_copy(update={"eval_episodes": request.pause_episodes}), start_method)
    cost = result.cost.model_copy(update={"env_steps": result.cost.env_steps + len(episodes.rows["reward"]),
                                          "eval_seconds": time.monotonic() - start})
    objective = float(np.mean(episodes.metrics[card.objective.metric]))
    if not np.isfinite([*episodes.returns, objective]).all():
        return Evaluation.failure("the evaluation's return or metric is not finite", request.seed, cost=cost)
    return result.model_copy(update={
        "objective": objective, "mean_return": float(np.mean(episodes.returns)), "returns": episodes.returns,
        "metrics": episodes.metrics, "episode_seeds": episodes.seeds, "cost": cost})


def _encoder(model: PPO) -> Any:
    extractor = model.policy.features_extractor
    assert isinstance(extractor, CompositeExtractor)
    return extractor.encoder


class Episodes:
    """What an evaluation saw: per episode the seed, return and metrics; per step the observation, state and reward."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.returns: list[float] = []
        self.metrics: dict[str, list[float]] = {}
        self.rows: dict[str, list[Any]] = {"obs": [], "state": [], "reward": [], "episode": []}


def evaluate(model: Any, card: TaskCard, table: TextTable, env_id: str, env_kwargs: dict[str, Any],
             protocol: Protocol, start_method: StartMethod | None = None) -> Episodes:
    """Plays the protocol's evaluation episodes with greedy actions.

    Args:
        model: anything with SB3's ``predict``; None plays the task's no-op, or random actions if it has none.

    Raises:
        LacerError: if the environment reports no metrics at the end of an episode, or its episodes do not end.
    """
    seeds = [protocol.eval_seed + i for i in range(protocol.eval_episodes)]
    n = min(protocol.ppo.n_envs, len(seeds))
    env = EncoderVecEnv(make_vec(env_id, n, env_kwargs, episode_seeds=seeds, start_method=start_method), card, table)
    left = [len(seeds[i::n]) for i in range(n)]
    out = Episodes()
    by_seed: dict[int, tuple[float, dict[str, float]]] = {}
    total = np.zeros(n)
    card.action_space.seed(protocol.eval_seed)
    played = 0  # steps since the last end of an episode
    try:
        obs = env.reset()
        states = [dict(i.get("state", {})) for i in env.venv.reset_infos]  # environments may change theirs in place
        while any(left):
            if model is not None:
                action, _ = model.predict(obs, deterministic=True)
            elif card.noop is not None:
                action = np.stack([card.noop] * n)
            else:
                action = np.stack([card.action_space.sample() for _ in range(n)])
            before, known = obs, states
            obs, reward, done, infos = env.step(action)  # type: ignore[assignment]
            states = [dict(i.get("state", {})) for i in infos]
            total += reward
            played = 0 if done.any() else played + 1
            if played >= LONGEST_EPISODE:
                raise LacerError(f"{env_id}: no episode ended within {LONGEST_EPISODE:,} steps; let it end, e.g. by "
                                 "max_episode_steps in its arguments")
            for i in range(n):
                if not left[i]:
                    continue
                out.rows["obs"].append({k: v[i] for k, v in before.items()})
                out.rows["state"].append(known[i])
                out.rows["reward"].append(float(reward[i]))
                out.rows["episode"].append(int(infos[i]["episode_seed"]))
                if done[i]:
                    metrics = infos[i].get("metrics")
                    if metrics is None or card.objective.metric not in metrics:
                        raise LacerError(f"{env_id}: info[\"metrics\"] at the end of an episode must hold the "
                                         f"objective {card.objective.metric!r}")
                    by_seed[int(infos[i]["episode_seed"])] = (
                        float(total[i]), {k: float(v) for k, v in metrics.items()})
                    total[i] = 0.0
                    left[i] -= 1
                    # After an automatic reset the observation belongs to the new episode, and so must the state.
                    states[i] = dict(env.venv.reset_infos[i].get("state", {}))
    finally:
        close_vec(env)
    for seed in seeds:
        value, metrics = by_seed[seed]
        out.seeds.append(seed)
        out.returns.append(value)
        for key, v in metrics.items():
            out.metrics.setdefault(key, []).append(v)
    out.metrics = {k: v for k, v in out.metrics.items() if len(v) == len(seeds)}  # others belong to no episode's seed
    return out
