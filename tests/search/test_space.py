"""Search spaces: sampling, mutation, crossover, NCode, narrowing."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from lacer.encoders import list_blocks
from lacer.envs import LacerError, Objective, SourceSpec, TaskCard, task_card
from lacer.search.space import (
    CONDITION,
    UNUSED,
    Decision,
    EncoderSpace,
    SearchSpace,
    TableSpace,
    load_space,
    read_space,
)

CARD = task_card("lacer/KnownSources-v0", sources=("position", "trend", "picture", "words", "crowd", "noise"))
SMALL = {"*.block": ["mlp", UNUSED], "*.mlp.width": [16, 32], "*.mlp.depth": [1], "*.mlp.activation": ["relu"],
         "*.mlp.norm": [False], "*.*.dropout": [0.0], "fusion.*.modality_dropout": [0.0], "fusion.*.norm": [False],
         "fusion.block": ["concat"], "fusion.concat.width": [16, 32, 64],
         "fusion.concat.depth": [1], "fusion.concat.activation": ["relu"]}


def above(space: SearchSpace, name: str) -> set[str]:
    """The decisions that decide whether one is asked."""
    d = space.by_name[name]
    return set() if d.condition is None else {d.condition[0], *above(space, d.condition[0])}


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
        assert all(changed[0] in above(space, k) for k in set(point) ^ set(mutant))
        child = space.check(space.crossover(point, previous, rng))
        assert all(v in (point.get(k), previous.get(k)) for k, v in child.items() if k != CONDITION)
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
    ({"vector:*.mlp.widht": [16]}, "did you mean 'vector:\\*.mlp.width'"),
    ({"vectr:*.mlp.width": [16]}, "did you mean 'vector:\\*.mlp.width'"),
    ({"*.*.dropuot": [0.0]}, "did you mean '\\*.\\*.dropout'"),
    ({"routing.condition": ["wrods"]}, "did you mean 'words'"),
    ({"position.block": ["unused"], "routing.condition": ["position"]}, "no option 'position'"),
    ({"position.block": ["linear"], "position.mlp.width": [16]}, "leaves its block out"),
    ({"trend.*.dropout": [1.5]}, "less than or equal"),
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


ROUTED = SMALL | {"fusion.block": ["concat", "film"], "fusion.film.width": [16, 32], "fusion.film.depth": [1],
                  "fusion.film.activation": ["relu"]}


def test_routing_is_a_decision_of_conditioned_fusions() -> None:
    space = EncoderSpace(task_card("lacer/KnownSources-v0", sources=("position", "noise", "echo")), ROUTED)
    points = list(space.points())
    assert len(points) == space.size() == (3**3 - 1) * 3 + 2 * (3 * 2 * 3**2)
    for p in points:
        assert (CONDITION in p) == (p["fusion.block"] == "film")
        assert CONDITION not in p or p[f"{p[CONDITION]}.block"] != UNUSED
        assert space.from_spec(space.to_spec(p)) == p
    assert len({space.to_ncode(p) for p in points}) == len({space.to_spec(p).hash for p in points}) == len(points)
    film = next(p for p in points if CONDITION in p and p["noise.block"] == UNUSED)
    with pytest.raises(LacerError, match="not part of the search space"):
        space.check({**film, CONDITION: "noise"})
    assert EncoderSpace(CARD, ROUTED | {"routing.condition": ["words"], "*.block": ["linear", UNUSED]} | {
        f"{n}.block": [b, UNUSED] for n, b in (("trend", "gru"), ("picture", "cnn"), ("words", "sentence_mlp"),
                                               ("crowd", "deepsets"))}
        | {"position.block": ["mlp", UNUSED]}).by_name[CONDITION].options == ("words",)


def test_a_field_without_effect_is_not_asked() -> None:
    space = EncoderSpace(CARD, {"*.block": [UNUSED], "picture.block": ["cnn"], "picture.cnn.channels": [8],
                                "picture.cnn.width": [32], "fusion.block": ["gated_sum"],
                                "fusion.gated_sum.width": [16], "fusion.*.modality_dropout": [0.0]})
    assert space.size() == len(list(space.points())) == 3 + 1
    spec = space.to_spec(space.from_ncode(space.to_ncode(list(space.points())[-1])))
    assert spec.to_dict()["sources"]["picture"]["head"] == "spatial_softmax"
    only = EncoderSpace(CARD, {"picture.cnn.head": ["spatial_softmax"]})
    assert "picture.cnn.grid" not in only.by_name
    point = only.sample(np.random.default_rng(0)) | {}
    assert only.from_spec(only.to_spec(point)) == point


def test_patterns_the_more_exact_wins() -> None:
    space = EncoderSpace(CARD, {"*.block": ["mlp"], "vector:*.block": ["mlp", "linear"], "noise.block": ["linear"],
                                "trend.block": ["gru"], "series:*.gru.width": [16], "picture.block": ["cnn"],
                                "text:*.block": ["sentence_mlp"], "crowd.block": ["deepsets"], "*.*.width": [32],
                                "*.linear.width": [8], "fusion.*.width": [64]})
    options = {d.name: d.options for d in space.decisions}
    assert options["position.block"] == ("mlp", "linear")
    assert options["noise.block"] == ("linear",)
    assert options["trend.gru.width"] == (16,)
    assert options["position.mlp.width"] == options["picture.cnn.width"] == (32,)
    assert options["noise.linear.width"] == (8,)
    assert options["fusion.film.width"] == (64,)
    assert EncoderSpace(task_card("lacer/KnownSources-v0", sources=("position",)), {"series:*.gru.width": [16]})


def test_uniform_sampling_is_uniform_and_plain_sampling_is_not() -> None:
    space = EncoderSpace(task_card("lacer/KnownSources-v0", sources=("position", "noise")), ROUTED)
    codes, n, rng = [space.to_ncode(p) for p in space.points()], 6000, np.random.default_rng(0)
    drawn = Counter(space.to_ncode(space.sample_uniform(rng)) for _ in range(n))
    expected = n / len(codes)
    chi2 = sum((drawn[c] - expected) ** 2 / expected for c in codes)
    assert set(drawn) == set(codes)
    assert chi2 < len(codes) + 4 * (2 * len(codes)) ** 0.5
    plain = Counter(space.to_ncode(space.sample(rng)) for _ in range(n))
    assert sum((plain[c] - expected) ** 2 / expected for c in codes) > 2 * chi2


def test_neighbours_and_mutation_reach_the_whole_space() -> None:
    space = EncoderSpace(task_card("lacer/KnownSources-v0", sources=("position", "noise")), ROUTED)
    codes = {space.to_ncode(p) for p in space.points()}
    seen, border = set(), [next(space.points())]
    while border:
        p = border.pop()
        if space.to_ncode(p) not in seen:
            seen.add(space.to_ncode(p))
            border += list(space.neighbours(p))
    assert seen == codes
    rng, p = np.random.default_rng(0), next(space.points())
    visited = set()
    for _ in range(2000):
        p = space.check(space.mutate(p, rng))
        visited.add(space.to_ncode(p))
    assert len(visited) > 0.9 * len(codes)


def paper_card(sequence: str = "series") -> TaskCard:
    """A task with the three sources of the paper's main experiment."""
    def box(*shape: int) -> spaces.Box:
        return spaces.Box(-1, 1, shape)

    sources = {"time": SourceSpec("time", "series", box(8, 3), "evolution"),
               "traffic": SourceSpec("traffic", "vector", box(12), "density"),
               "sequence": SourceSpec("sequence", sequence, box(10, 5), "vehicles")}  # type: ignore[arg-type]
    return TaskCard("test/Paper-v0", sources, spaces.Discrete(2), Objective("speed"), "drive")


@pytest.mark.parametrize("sequence", ["series", "set"])
def test_the_space_of_the_paper(sequence: str) -> None:
    space = load_space("paper", paper_card(sequence))
    assert space.size() == 81**4 == 43_046_721
    assert space.expert is not None
    assert space.to_spec(space.from_spec(space.expert)) == space.expert
    assert len([d for d in space.decisions if len(d.options) > 1]) == 16
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = space.sample(rng)
        assert space.from_ncode(space.to_ncode(point)) == point
    with pytest.raises(LacerError, match=r"unknown decision 'time\.block'"):
        load_space("paper", CARD)


def test_the_space_of_the_minigrid_appendix() -> None:
    card = task_card("lacer/KnownSources-v0", sources=("picture", "words"))
    assert load_space("minigrid", card).size() == (4 * 3 * 3 * 4) * (3 * 3 * 3 * 4) * (3 * 4 * 4)
    assert load_space("minigrid", CARD).expert is not None


def test_the_full_space_is_everything() -> None:
    assert load_space("full", CARD).decisions == EncoderSpace(CARD).decisions == load_space({}, CARD).decisions
    blocks = {k for k in list_blocks() if k[0] != "fusion"}
    full = load_space("full", CARD)
    assert {(s.modality, b) for n, s in CARD.sources.items() for b in full.by_name[f"{n}.block"].options
            if b != UNUSED} == blocks


@pytest.mark.parametrize(("content", "message"), [
    ("{decision: {}}", "unknown key 'decision'; did you mean 'decisions'"), ("[1]", "expected keys and values"),
    ("a: [", "is not YAML"), ("{decisions: [1]}", "decisions must be a mapping"),
    ("{optional_sources: 3}", "must be true or false"), ("{decisions: {'*.mlp.widht': [3]}}", "did you mean"),
    ("{expert: {vector: {block: mlp}}}", "no block for the source 'trend'"),
    ("{decisions: {position.block: [linear]}, expert: {vector: {block: mlp}, series: {block: gru}, image: "
     "{block: cnn}, text: {block: sentence_mlp}, set: {block: deepsets}, fusion: {block: concat}}}",
     "position.block = 'mlp' is not in this search space"),
])
def test_bad_space_files_name_the_file_and_the_mistake(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(content)
    with pytest.raises(LacerError, match=message) as e:
        load_space(path, CARD)
    assert str(path) in str(e.value)


def test_space_files_and_mappings(tmp_path: Path) -> None:
    with pytest.raises(LacerError, match=r"did you mean 'minigrid'.*Presets: full, minigrid, paper"):
        load_space("minigird", CARD)
    path = tmp_path / "space.yaml"
    path.write_text("{optional_sources: false, decisions: {'*.*.width': [32]}, expert: {position: unused, "
                    "vector: {block: linear, width: 32}, series: {block: gru}, image: {block: cnn, width: 32}, "
                    "text: {block: sentence_mlp}, set: {block: deepsets}, fusion: {block: film}, "
                    "routing: {condition: words}}}")
    with pytest.raises(LacerError, match=r"position\.block = 'unused' is not in"):
        load_space(path, CARD)
    path.write_text(path.read_text().replace("false", "true"))
    space = load_space(path, CARD)
    assert space.expert is not None
    assert (space.expert.condition, set(space.expert.sources)) == ("words", set(CARD.sources) - {"position"})
    again = load_space(read_space(path), CARD)
    assert (again.decisions, again.expert) == (space.decisions, space.expert)
    flat = load_space({"*.*.width": [32]}, CARD)
    assert flat.decisions == space.decisions
    assert flat.expert is None


TABLE = Path(__file__).parents[2] / "benchmarks" / "data"


def read_table(name: str) -> list[dict[str, Any]]:
    with gzip.open(TABLE / name, "rt") as f:
        return list(csv.DictReader(f))


def test_spaces_of_tables() -> None:
    space = SearchSpace.from_table(["00", "01", "10", "12", "012", "2101"])
    assert isinstance(space, TableSpace)
    assert [d.options for d in space.decisions] == [(2, 3, 4), ("0", "1", "2"), ("0", "1", "2"), ("0", "2"), ("1",)]
    assert [d.condition for d in space.decisions] == [None, None, None, ("length", (3, 4)), ("length", (4,))]
    points = list(space.points())
    assert sorted(map(space.to_string, points)) == sorted(space.strings)
    assert len(points) == space.size() == 6
    rng = np.random.default_rng(0)
    for p in points:
        assert space.from_string(space.to_string(p)) == p == space.check(p) == space.from_ncode(space.to_ncode(p))
        for _ in range(5):
            space.check(space.mutate(p, rng))
            space.check(space.crossover(p, points[0], rng))
        assert all(space.check(n) != p for n in space.neighbours(p))
    assert space.to_ncode(space.from_string("01")) == "0.0.1._._"
    with pytest.raises(LacerError, match="not in the table"):
        space.from_string("11")
    with pytest.raises(LacerError, match="not part of"):
        space.check({"length": 2, "place 1": "1", "place 2": "1"})
    assert "length" not in SearchSpace.from_table(["ab", "cd"]).by_name
    for bad in ([], [""], ["a", ""]):
        with pytest.raises(LacerError, match="at least one string"):
            SearchSpace.from_table(bad)


def test_nasbench_macro() -> None:
    strings = [r["arch"] for r in read_table("nasbench_macro.csv.gz")]
    space = SearchSpace.from_table(strings)
    assert space.size() == 3**8 == SearchSpace(space.decisions).size()
    assert len(space.decisions) == 8
    p = space.from_string("22212202")
    assert space.to_ncode(p) == "2.2.2.1.2.2.0.2"
    assert len(list(space.neighbours(p))) == 16


def test_tnb101_macro_has_strings_of_several_lengths() -> None:
    strings = [r["arch"] for r in read_table("tnb101_macro_val.csv.gz")]
    space, rng = SearchSpace.from_table(strings), np.random.default_rng(0)
    assert space.size() == 3256 == len(strings)
    assert space.decisions[0] == Decision("length", (4, 5, 6))
    lengths = Counter()
    p = space.sample(rng)
    for _ in range(300):
        p = space.check(space.mutate(p, rng))
        lengths[len(space.to_string(p))] += 1
        assert space.from_ncode(space.to_ncode(p)) == p
    assert set(lengths) == {4, 5, 6}
    assert Counter(len(space.to_string(q)) for q in space.points()) == Counter(map(len, strings))


def test_options_that_are_equal() -> None:
    with pytest.raises(LacerError, match="must be different"):
        SearchSpace([Decision("x", (1, 1.0))])
    space = SearchSpace([Decision("x", (1, True))])
    assert [space.to_ncode({"x": o}) for o in (1, True, 1.0)] == ["0", "1", "0"]
