"""What a designer must keep to, as tests to inherit.

::

    from lacer.search.testing import DesignerConformance

    class TestMine(DesignerConformance):
        designer = "mine"

With pytest, that is a test module. The designer is made by its registered name; override ``make`` for one that needs
more than a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from lacer.agents import Evaluation
from lacer.search.designers.base import Designer, designer_class, make_plain
from lacer.search.space import Decision, Point, SearchSpace, TableSpace
from lacer.search.study import Proposal, Study, Trial

Outcome = Callable[[int, Point], Evaluation]


def conditional() -> SearchSpace:
    """Decisions below decisions, two levels deep; 3 + 4 * 2 + 4 * 3 = 23 points."""
    return SearchSpace([
        Decision("kind", ("a", "b", "c")), Decision("size", (1, 2, 3, 4), ("kind", ("b", "c"))),
        Decision("b.flag", (False, True), ("kind", "b")), Decision("c.x", (0.1, 0.2, 0.3), ("kind", "c")),
        Decision("a.mode", ("m", "n", "o"), ("kind", "a"))])


def spaces() -> dict[str, SearchSpace]:
    """Spaces of every shape: conditional, one decision, 10^12 points, 200 decisions, a table with holes."""
    return {
        "conditional": conditional(),
        "one decision": SearchSpace([Decision("only", tuple(range(30)))]),
        "10^12 points": SearchSpace([Decision(f"d{i}", tuple(range(10))) for i in range(12)]),
        "200 decisions": SearchSpace([Decision(f"d{i}", ("x", "y")) for i in range(200)]),
        "table": TableSpace(f"{i:05b}"[: 3 + i % 3] for i in range(32)),
    }


def distance_score(space: SearchSpace) -> Outcome:
    """A smooth score: minus the number of decisions that differ from a hidden point, conditional ones included."""
    hidden = space.sample(np.random.default_rng(99))

    def score(_: int, point: Point) -> Evaluation:
        return Evaluation(objective=-float(sum(point.get(k) != v for k, v in hidden.items())))

    return score


def play(designer: Designer, study: Study, n: int, outcome: Outcome, batch: int = 1) -> list[str]:
    """Asks for ``n`` proposals, ``batch`` at a time, and answers each; their NCodes.

    Raises:
        AssertionError: a proposal is not part of the space, none came, or more came than were asked for.
    """
    out: list[str] = []
    while len(out) < n:
        ask = min(batch, n - len(out))
        proposals = designer.propose(study, ask)
        assert 1 <= sum(not p.rejected for p in proposals) <= ask, "between one and the number asked for"
        for p in proposals:
            if p.rejected:
                study.reject(p)
                continue
            assert p.point is not None
            assert study.space.check(p.point) == p.point, "a point of the space, in its order"
            trial = study.start(p)
            out.append(trial.ncode)
            designer.observe(study.finish(trial.number, outcome(len(out), p.point)))
    return out


class DesignerConformance:
    """Inherit, set :attr:`designer`, and run with pytest.

    Attributes:
        designer: its registered name, with its variant if it has some.
        length: proposals of the longer tests.
    """

    designer: ClassVar[str]
    length: ClassVar[int] = 14

    def make(self, seed: int) -> Designer:
        """A new designer."""
        return make_plain(self.designer, seed)

    def spaces(self) -> dict[str, SearchSpace]:
        """Spaces that it must cope with, by name."""
        return spaces()

    def space(self) -> SearchSpace:
        """One with some hundred points at least, for the tests that need just one."""
        return SearchSpace([Decision("kind", ("a", "b", "c")), Decision("size", tuple(range(8)), ("kind", ("b", "c"))),
                            *(Decision(f"d{i}", tuple(range(4))) for i in range(4))])

    def small_space(self) -> SearchSpace:
        """One with four points, to be exhausted."""
        return SearchSpace([Decision("a", (1, 2)), Decision("b", (1, 2))])

    def test_says_what_it_is(self) -> None:
        cls = designer_class(self.designer)
        assert cls.summary()
        assert cls.paper, "where it comes from"

    def test_proposes_points_of_any_space(self) -> None:
        for name, space in self.spaces().items():
            n = min(self.length, space.size())
            codes = play(self.make(0), Study(space), n, distance_score(space), batch=3)
            assert len(set(codes)) == n, f"{name}: an encoder is proposed twice"

    def test_same_seed_same_proposals(self) -> None:
        first, again, other = (play(self.make(seed), Study(self.space()), self.length, distance_score(self.space()))
                               for seed in (3, 3, 4))
        assert first == again
        assert first != other

    def test_resumes_from_the_study_alone(self) -> None:
        whole = play(self.make(3), Study(self.space()), self.length, distance_score(self.space()))
        study, half = Study(self.space()), self.length // 2
        first = play(self.make(3), study, half, distance_score(self.space()))
        resumed, copy = self.make(3), Study(self.space(), trials=study.trials)
        for trial in copy.trials:
            if trial.status != "rejected":
                resumed.observe(trial)
        assert first + play(resumed, copy, self.length - half, distance_score(self.space())) == whole

    def test_batches_without_repeats(self) -> None:
        for batch in (1, 16):
            codes = play(self.make(0), Study(self.space()), 32, distance_score(self.space()), batch)
            assert len(set(codes)) == 32, f"batches of {batch}"

    def test_what_is_invalid_does_not_come_again(self) -> None:
        study, designer, bad = Study(self.space()), self.make(0), set[str]()
        for i in range(2 * self.length):
            for p in designer.propose(study, 1):
                assert p.point is not None
                code = study.space.to_ncode(p.point)
                assert code not in bad, "it was told that this encoder is invalid"
                if i % 2:
                    bad.add(code)
                    study.reject(Proposal(p.point, p.designer, rejected="too large", meta=p.meta))
                else:
                    trial = study.start(p)
                    designer.observe(study.finish(trial.number, distance_score(study.space)(i, p.point)))
        assert len(bad) == self.length

    def test_failed_pruned_and_nan(self) -> None:
        score = distance_score(self.space())

        def outcome(i: int, point: Point) -> Evaluation:
            return (score(i, point), Evaluation.failure("out of memory"),
                    Evaluation(status="pruned", reason="hopeless"), Evaluation(objective=math.nan))[i % 4]

        study = Study(self.space())
        codes = play(self.make(0), study, 2 * self.length, outcome)
        assert len(set(codes)) == 2 * self.length
        assert study.count("failed") >= self.length // 2 <= 2 * study.count("pruned")

    def test_nothing_but_failures(self) -> None:
        def outcome(_: int, point: Point) -> Evaluation:
            return Evaluation.failure("the simulator crashed")

        assert len(set(play(self.make(0), Study(self.space()), self.length, outcome))) == self.length

    def test_all_scores_equal(self) -> None:
        def outcome(_: int, point: Point) -> Evaluation:
            return Evaluation(objective=1.0)

        assert len(set(play(self.make(0), Study(self.space()), self.length, outcome))) == self.length

    def test_running_trials_are_not_proposed_again(self) -> None:
        study, designer = Study(self.space()), self.make(0)
        codes = []
        for _ in range(self.length):  # as many workers, none of them done
            for p in designer.propose(study, 1):
                codes.append(study.start(p).ncode)
        assert len(set(codes)) == self.length
        done: list[Trial] = [study.finish(i, distance_score(study.space)(i, study[i].proposal.point or {}))
                             for i in range(0, self.length, 2)]
        for trial in done:
            designer.observe(trial)
        [p] = designer.propose(study, 1)
        assert p.point is not None
        assert study.space.to_ncode(p.point) not in codes

    def test_an_exhausted_space_still_gets_an_answer(self) -> None:
        space = self.small_space()
        study, designer = Study(space), self.make(0)
        assert len(set(play(designer, study, 4, distance_score(space)))) == 4
        for p in designer.propose(study, 3):
            assert p.point is not None
            space.check(p.point)

    def test_lower_can_be_better(self) -> None:
        from lacer.envs import Objective

        space, score = self.space(), distance_score(self.space())

        def negated(i: int, point: Point) -> Evaluation:
            return Evaluation(objective=-float(score(i, point).objective or 0.0))

        up = play(self.make(5), Study(space), self.length, score)
        down = play(self.make(5), Study(space, Objective("loss", "", "minimize")), self.length, negated)
        assert up == down, "the same search, seen from below"
