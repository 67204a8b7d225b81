"""Search spaces: sampling, mutation, crossover, NCode, narrowing."""

from __future__ import annotations

import numpy as np
import pytest

from lacer.encoders import list_blocks
from lacer.envs import LacerError, task_card
from lacer.search.space import UNUSED, Decision, EncoderSpace, SearchSpace

CARD = task_card("lacer/KnownSources-v0", sources=("position", "trend", "picture", "words", "crowd", "noise"))
SMALL = {"*.block": ["mlp", UNUSED], "*.mlp.width": [16, 32], "*.mlp.depth": [1], "*.mlp.activation": ["relu"],
         "*.mlp.norm": [False], "fusion.block": ["concat"], "fusion.concat.width": [16, 32, 64],
         "fusion.concat.depth": [1], "fusion.concat.activation": ["relu"]}


def small() -> EncoderSpace:
    return EncoderSpace(task_card("lacer/KnownSources-v0", sources=("position", "noise")), SMALL)


def test_size_counts_every_point() -> None:
    space = small()
    points = list(space.points())
    assert len(points) == space.size() == (3 * 3 - 1) * 3
    assert len({space.to_spec(p).hash for p in points}) == len(points)
    assert len({space.to_ncode(p) for p in points}) == len(points)


def test_size_of_conditional_decisions() -> None:
    space = SearchSpace([Decision("a", (0, 1)), Decision("b", ("x", "y", "z"), ("a", 1)),
                         Decision("c", (1, 2), ("b", "z")), Decision("d", tuple(range(12)))])
    assert space.size() == len(list(space.points())) == (1 + (2 + 2)) * 12


def test_random_points_round_trip_and_stay_valid() -> None:
    space, rng = EncoderSpace(CARD), np.random.default_rng(0)
    previous = space.sample(rng)
    seen_blocks = set()
    for _ in range(300):
        point = space.sample(rng)
        spec = space.to_spec(point)
        assert space.from_spec(spec) == point
        assert space.from_ncode(space.to_ncode(point)) == point
        assert spec.sources, "at least one source is used"
        mutant = space.mutate(point, rng)
        changed = [k for k in point if k in mutant and mutant[k] != point[k]]
        assert len(changed) == 1
        dropped_or_new = set(point) ^ set(mutant)
        assert all(k.startswith(changed[0].removesuffix("block")) for k in dropped_or_new)
        child = space.check(space.crossover(point, previous, rng))
        assert all(v in (point.get(k), previous.get(k)) for k, v in child.items())
        previous = point
        seen_blocks |= {(CARD.sources[n].modality, b.block) for n, b in spec.sources.items()}
    assert seen_blocks == {k for k in list_blocks() if k[0] != "fusion"}


def test_neighbours_differ_in_one_decision() -> None:
    space = small()
    point = next(space.points())
    near = list(space.neighbours(point))
    assert len(near) == len({space.to_ncode(p) for p in near}) > 0
    for n in near:
        assert sum(n.get(k) != v for k, v in point.items() if k in n) == 1
        space.check(n)


def test_ncode_has_no_limit_of_ten_options() -> None:
    space = SearchSpace([Decision("many", tuple(range(37)))])
    assert space.from_ncode(space.to_ncode({"many": 36})) == {"many": 36}


@pytest.mark.parametrize("code", ["", "1", "99." * 3, "a.b", "0._", "-1.0.0"])
def test_bad_ncode(code: str) -> None:
    with pytest.raises(LacerError):
        SearchSpace([Decision("a", (0, 1)), Decision("b", (0, 1))]).from_ncode(code)


def test_true_is_not_one() -> None:
    space = SearchSpace([Decision("a", (1, True, 0, False))])
    assert space.to_ncode({"a": True}) == "1"
    assert space.to_ncode({"a": False}) == "3"


@pytest.mark.parametrize(("narrow", "message"), [
    ({"postion.block": ["mlp"]}, "did you mean 'position.block'"),
    ({"position.block": ["mlpp"]}, "did you mean 'mlp'"),
    ({"*.mlp.widht": [16]}, "did you mean"),
    ({"*.mlp.width": [3e9]}, "less than or equal"),
    ({"*.mlp.width": 16}, "must be a list"),
    ({"*.mlp.width": [16, 16]}, "must be different"),
    ({"fusion.block": []}, "must be a list"),
])
def test_bad_narrowing(narrow: dict, message: str) -> None:
    with pytest.raises(LacerError, match=message):
        EncoderSpace(CARD, narrow)


def test_check_names_the_mistake() -> None:
    space = small()
    point = space.sample(np.random.default_rng(0))
    with pytest.raises(LacerError, match="is missing"):
        space.check({k: v for k, v in point.items() if k != "fusion.concat.width"})
    with pytest.raises(LacerError, match="not in this search space"):
        space.check({**point, "fusion.concat.width": 7})
    with pytest.raises(LacerError, match="not part of the search space"):
        space.check({"position.block": UNUSED, "noise.block": UNUSED,
                     **{k: v for k, v in point.items() if k.startswith("fusion")}})
    with pytest.raises(LacerError, match="unknown decision"):
        space.check({**point, "fusion.concat.widht": 16})
