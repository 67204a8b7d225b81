"""ENAS in the PPO loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lacer.agents import Evaluation
from lacer.envs import LacerError
from lacer.search.designers.base import register_designer
from lacer.search.designers.training import RANKED, TrainingDesigner
from lacer.search.space import EncoderSpace
from lacer.search.trainer import Trainer

if TYPE_CHECKING:
    from lacer.agents.training import Session

SHARE = 0.9
"""Part of the steps that train; the rest compares encoders that the controller draws then."""


@register_designer
class Enas(TrainingDesigner):
    """ENAS: a controller learns which encoders do well with shared weights while PPO trains these

    ENAS (Pham et al. 2018, 1802.03268): for every rollout the controller (:class:`lacer.search.controller.Controller`:
    an LSTM, REINFORCE with a moving-average baseline) draws an encoder; it acts with its part of the weights that all
    share, PPO trains that part on the rollout, and the controller learns from the reward. In the end encoders that the
    controller draws are compared with shared weights, and the best are trained from scratch as candidates.

    Deviations: weights and controller alternate rollout by rollout, not epoch by epoch, because every environment step
    counts; the controller's reward is the mean reward of a step in that rollout, over its moving spread (an episode may
    be longer than a rollout). No tanh and temperature on the logits.

    Args:
        seed: seed of the training.
        trainer: where it trains.
        compared: encoders that are compared at the end.
        episodes: greedy episodes of each of these.
        rollout: steps of a rollout, per environment; None: PPO's. The controller learns once a rollout, so shorter
            ones give it more to learn from, and PPO less at a time.

    Raises:
        LacerError: for options out of range.
    """

    name: ClassVar[str] = "enas"
    paper: ClassVar[str] = "ENAS, 1802.03268"
    function: ClassVar[str] = "lacer.search.designers.enas:train"

    def __init__(self, seed: int = 0, *, trainer: Trainer | None = None, compared: int = 10, episodes: int = 4,
                 rollout: int | None = None) -> None:
        super().__init__(seed, trainer=trainer)
        if compared < 1 or episodes < 1 or (rollout is not None and rollout < 2):
            raise LacerError(f"enas: compared and episodes must be at least 1, rollout at least 2, not {compared}, "
                             f"{episodes} and {rollout}")
        self.compared, self.episodes, self.rollout = compared, episodes, rollout

    def options(self) -> dict[str, Any]:
        """Its options, for the training."""
        return {"compared": self.compared, "episodes": self.episodes, "rollout": self.rollout}


def train(session: Session) -> Evaluation:
    """The training: finds ``ranked`` encoders, those that were compared first, and ``controller``: by decision, how
    often each option is among 50 encoders that it draws in the end."""
    import torch

    from lacer.agents.training import (
        Part,
        SupernetPolicy,
        load_optimizer,
        optimizer_tensors,
        pack,
        train_supernet,
        unpack,
    )
    from lacer.encoders.supernet import SharedSupernet, SupernetOptions
    from lacer.search.controller import Controller, Sample

    if (rollout := session.job.options["rollout"]) is not None:
        ppo = session.job.protocol.ppo.model_copy(update={"n_steps": rollout})
        session.job = session.job.model_copy(update={"protocol": session.job.protocol.model_copy(update={"ppo": ppo})})
    job = session.job
    space = EncoderSpace(session.card, job.decisions)
    held = SupernetOptions.from_decisions(session.card, job.decisions)
    torch.manual_seed(session.seed(2))
    controller = Controller(space)

    class Draw(Part):
        """An encoder for every rollout, and its reward for the controller."""

        def _on_rollout_start(self) -> None:
            policy = self.model.policy
            assert isinstance(policy, SupernetPolicy)
            assert isinstance(policy.supernet, SharedSupernet)
            self._sample, self._rewards = draw(policy.supernet), list[float]()

        def _on_step(self) -> bool:
            self._rewards.append(float(self.locals["rewards"].mean()))
            return True

        def _on_rollout_end(self) -> None:
            controller.learn(self._sample, sum(self._rewards) / len(self._rewards))

        def tensors(self) -> dict[str, torch.Tensor]:
            return {**pack("controller", controller.state_dict()),
                    **pack("adam", optimizer_tensors(controller.optimizer))}

        def load(self, tensors: Any) -> None:
            controller.load_state_dict(unpack("controller", tensors))
            load_optimizer(controller.optimizer, unpack("adam", tensors))

    def draw(net: SharedSupernet) -> Sample:
        """An encoder that can be built, made the active one."""
        for _ in range(100):
            sample = controller.sample()
            try:
                net.set_active(space.to_spec(sample.point))
            except LacerError as e:
                error = e
            else:
                return sample
        raise error

    model = train_supernet(session, lambda: SharedSupernet(session.card, held, session.table), Draw(), share=SHARE)
    assert isinstance(model.policy, SupernetPolicy)
    net = model.policy.supernet
    assert isinstance(net, SharedSupernet)
    torch.manual_seed(session.seed(3))
    drawn: dict[str, Sample] = {}
    often: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for _ in range(RANKED):
            sample = controller.sample()
            drawn.setdefault(space.to_ncode(sample.point), sample)
            for name, option in sample.point.items():
                of = often.setdefault(name, {})
                of[str(option)] = of.get(str(option), 0) + 1 / RANKED
    sign = session.card.objective.signed
    scores: dict[str, float] = {}
    for code, sample in list(drawn.items()):
        if len(scores) == job.options["compared"] or (scores and session.steps >= job.steps):
            break
        try:
            net.set_active(space.to_spec(sample.point))
        except LacerError:  # it cannot be built
            del drawn[code]
            continue
        scores[code] = session.evaluate(model, job.options["episodes"], job.protocol.eval_seed)
    if not scores:
        raise LacerError("none of the encoders that the controller drew can be built")
    best = sorted(scores, key=lambda code: -sign(scores[code]))
    others = sorted((c for c in drawn if c not in scores), key=lambda c: -float(drawn[c].log_probability))
    metric = session.card.objective.metric
    return session.result(scores[best[0]], {
        "controller": {name: {o: round(share, 2) for o, share in of.items()} for name, of in often.items()},
        "ranked": [*((c, f"{metric} {scores[c]:.3g} with shared weights") for c in best),
                   *((c, f"drawn by the controller, probability {float(drawn[c].log_probability.exp()):.2g}")
                     for c in others)]})
