"""Every registered probe, and the ones about ranks and linear maps against closed forms and a second computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lacer.agents import Protocol
from lacer.agents.probes import FUSED, MEANING, TOLD, Layer, Sample, list_probes, measure, register_probe
from lacer.agents.probes.base import _PROBES
from lacer.agents.probes.linear import linear_probe
from lacer.agents.probes.rank import decompose, effective_rank, srank
from lacer.agents.probes.similarity import linear_cka
from lacer.envs import LacerError


def orthogonal(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """(n, d) with orthonormal columns of mean zero."""
    x = rng.normal(size=(n, d))
    return np.linalg.qr(x - x.mean(0))[0]


def rank(x: np.ndarray) -> float:
    return effective_rank(decompose(x)[1], x.shape[1])


def small_rank(x: np.ndarray) -> float:
    return srank(decompose(x)[1], x.shape[1])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def episodes(n: int, length: int) -> np.ndarray:
    return np.repeat(1_000_000 + np.arange(n), length)


def complete(rng: np.random.Generator, n: int = 200, constant: bool = False) -> Sample:
    """A sample in which there is something for every probe."""
    make = (lambda *size: np.ones(size)) if constant else (lambda *size: rng.normal(size=size))
    parts = ("a", "b", FUSED)
    return Sample(
        features={"a": make(n, 4).astype(np.float32), "b": make(n, 1), FUSED: make(n, 8)},
        state={"x": make(n), "y": make(n)}, reward=make(n), returns=make(n), action=make(n, 2),
        groups=np.arange(n) // 10, layers={p: [Layer(abs(make(5)), abs(make(5)) + 1, 1.0)] for p in parts},
        permuted={"a": (0.1, 0.2), "b": (0.0, 0.0)}, gradient=dict.fromkeys(parts, 0.0 if constant else 2.0),
        permuted_return={"a": 1.0, "b": 0.0})


# -- every probe, new ones too -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(list_probes()))
def test_every_probe_gives_finite_numbers_of_known_parts(name: str, rng: np.random.Generator) -> None:
    got = measure(complete(rng), [name])
    assert list(got) == ["a", "b", FUSED]
    assert any(name in values for values in got.values()), "there is something for it to look at"
    for values in got.values():
        assert all(k.split("/")[0] == name and isinstance(v, float) and math.isfinite(v) for k, v in values.items())


@pytest.mark.parametrize("name", list(list_probes()))
@pytest.mark.parametrize("n", [1, 2, 40])
def test_every_probe_copes_with_constants_and_few_rows(name: str, n: int, rng: np.random.Generator) -> None:
    for sample in (complete(rng, n, constant=True), complete(rng, n)):
        for values in measure(sample, [name]).values():
            assert all(math.isfinite(v) for v in values.values())


@pytest.mark.parametrize("name", list(list_probes()))
def test_every_probe_gives_nothing_without_its_data(name: str, rng: np.random.Generator) -> None:
    """And without other sources to be compared with."""
    got = measure(Sample({FUSED: rng.normal(size=(20, 3))}), [name])
    assert set(got[FUSED]) <= {"effective_rank", "srank"}


@pytest.mark.parametrize("name", list(list_probes()))
def test_every_probe_has_a_meaning_of_one_line(name: str) -> None:
    text = MEANING[name]
    assert 40 < len(text) < 240
    assert "\n" not in text
    assert text[0].islower() or text.startswith("R2")
    assert not text.endswith(".")


@pytest.mark.parametrize("name", list(list_probes()))
def test_the_order_of_rows_does_not_matter(name: str, rng: np.random.Generator) -> None:
    a = complete(rng)
    mix = rng.permutation(200)
    assert a.reward is not None
    assert a.returns is not None
    assert a.action is not None
    assert a.groups is not None
    b = Sample({k: v[mix] for k, v in a.features.items()}, {k: v[mix] for k, v in a.state.items()}, a.reward[mix],
               a.returns[mix], a.action[mix], a.groups[mix], a.layers, a.permuted, a.gradient, a.permuted_return)
    x, y = measure(a, [name]), measure(b, [name])
    for part, values in x.items():
        assert values == pytest.approx(y[part], abs=1e-6)


def test_names_are_checked(rng: np.random.Generator) -> None:
    with pytest.raises(LacerError, match="did you mean 'effective_rank'"):
        measure(complete(rng), ["efective_rank"])
    with pytest.raises(ValueError, match="did you mean 'effective_rank'"):
        Protocol(probes=("efective_rank",))
    assert Protocol(probes=()).probes == ()
    assert all(values == {} for values in measure(complete(rng), ()).values())
    assert set(TOLD) < set(MEANING)


def test_a_new_probe_is_a_registration(rng: np.random.Generator) -> None:
    @register_probe("width", "number of features; wide features cost more, narrow ones hold less; try both")
    def width(sample: Sample) -> dict[str, dict[str, float]]:
        return {p: {"": f.shape[1], "nan": math.nan} for p, f in sample.features.items()}

    try:
        assert measure(complete(rng), ["width"]) == {"a": {"width": 4.0}, "b": {"width": 1.0}, FUSED: {"width": 8.0}}
        assert "width" in list_probes()
    finally:
        del _PROBES["width"]


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 8, 50])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_orthogonal_features_have_full_rank(d: int, scale: float, rng: np.random.Generator) -> None:
    x = scale * orthogonal(200, d, rng) + 3
    assert rank(x) == pytest.approx(1, abs=1e-4)
    assert small_rank(x) == 1


@pytest.mark.parametrize("d", [1, 2, 8, 50])
def test_rank_one(d: int, rng: np.random.Generator) -> None:
    x = np.outer(rng.normal(size=100), rng.normal(size=d)) + rng.normal(size=d)
    assert rank(x) == pytest.approx(1 / d, rel=1e-4)
    assert small_rank(x) == pytest.approx(1 / d)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e-20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 1000])
def test_constant_features_have_rank_zero(value: float, dtype: type, n: int) -> None:
    assert rank(np.full((n, 8), value, dtype)) == 0
    assert small_rank(np.full((n, 8), value, dtype)) == 0


@pytest.mark.parametrize(("spectrum", "directions"), [((1, 1, 0, 0), 2), ((4, 2, 1, 1), 4), ((1, 1e-3), 1),
                                                      ((9, 3, 1), 3), ((98, 1, 1), 2), ((99, 1), 1)])
def test_known_spectrum(spectrum: tuple[float, ...], directions: int, rng: np.random.Generator) -> None:
    """exp(entropy) of the singular values, and how many make up 99 %, turned by a rotation that must not matter."""
    d = len(spectrum)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    x = orthogonal(64, d, rng) * np.array(spectrum) @ turn + 5
    p = [s / sum(spectrum) for s in spectrum if s]
    assert rank(x) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)) / d, rel=1e-6)
    assert small_rank(x) == directions / d


def test_two_equal_directions_of_eight_are_a_quarter(rng: np.random.Generator) -> None:
    x = np.zeros((50, 8), np.float32)
    x[:, 2:4] = orthogonal(50, 2, rng)
    assert rank(x) == pytest.approx(0.25, rel=1e-4)
    assert small_rank(x) == 0.25


# -- linear maps -------------------------------------------------------------------------------------------------------


def test_perfect_and_useless_features(rng: np.random.Generator) -> None:
    groups = episodes(20, 30)
    y = rng.normal(size=600)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    good = np.stack([y, *rng.normal(size=(3, 600))], 1) @ turn
    assert linear_probe(good, {"y": y}, groups)["y"] > 0.999
    assert linear_probe(rng.normal(size=(600, 4)), {"y": y}, groups)["y"] < 0.03
    noisy = np.stack([y + rng.normal(size=600), *rng.normal(size=(3, 600))], 1) @ turn
    assert linear_probe(noisy, {"y": y}, groups)["y"] == pytest.approx(0.5, abs=0.1)


def test_targets_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    groups = episodes(10, 30)
    x = rng.normal(size=(300, 5))
    ys = {"a": x[:, 0] + rng.normal(size=300), "b": rng.normal(size=300), "nan": np.full(300, np.nan)}
    both = linear_probe(x, ys, groups)
    assert set(both) == {"a", "b"}
    for name in both:
        assert linear_probe(x, {name: ys[name]}, groups)[name] == pytest.approx(both[name], abs=1e-9)


def test_worse_than_the_mean_is_clipped_to_useless(rng: np.random.Generator) -> None:
    """What holds on the training episodes is turned round on the held-out ones."""
    groups = episodes(10, 40)
    y = rng.normal(size=400)
    x = np.where(groups % 2 == 0, y, -y)[:, None]
    assert linear_probe(x, {"y": y}, groups) == {"y": 0.0}


def test_constants_are_left_out(rng: np.random.Generator) -> None:
    groups = episodes(6, 10)
    x = rng.normal(size=(60, 3))
    varies = np.where(groups % 2 == 0, 1.0, x[:, 0])  # constant on the training episodes only
    other = np.where(groups % 2 == 1, 1.0, x[:, 0])  # and on the held-out ones only
    got = linear_probe(x, {"flat": np.full(60, 3.0), "y": x[:, 1], "a": varies, "b": other}, groups)
    assert set(got) == {"y"}


def test_held_out_by_episode(rng: np.random.Generator) -> None:
    """Features that only tell which episode it is explain a per-episode constant on seen episodes alone."""
    groups = episodes(12, 25)
    value = rng.normal(size=12)
    y = value[groups - groups.min()]
    x = np.eye(12)[groups - groups.min()] + 0.01 * rng.normal(size=(300, 12))
    assert linear_probe(x, {"y": y}, groups)["y"] < 0.05
    rows = np.arange(300)  # were rows held out instead of episodes, it would look perfect
    assert linear_probe(x, {"y": y}, rows)["y"] > 0.99


def test_one_episode_cannot_be_held_out(rng: np.random.Generator) -> None:
    assert linear_probe(rng.normal(size=(20, 2)), {"y": rng.normal(size=20)}, episodes(1, 20)) == {}


def test_against_least_squares(rng: np.random.Generator) -> None:
    """With many clean rows the ridge is tiny: an ordinary least-squares fit gives the same R2."""
    groups = episodes(40, 100)
    hidden = rng.normal(size=(4000, 6))
    x = np.concatenate([hidden @ rng.normal(size=(6, 10)) * np.logspace(-2, 2, 10), np.ones((4000, 1))], 1) + 7
    x = x + 1e-3 * rng.normal(size=x.shape) * np.abs(x).max(0)
    ys = {"linear": hidden @ rng.normal(size=6), "noisy": hidden[:, 0] + rng.normal(size=4000),
          "square": hidden[:, 1] ** 2, "mixed": hidden[:, 2] + np.sin(3 * hidden[:, 3])}
    got = linear_probe(x, ys, groups)
    test = groups % 2 == 1
    design = np.concatenate([(x - x[~test].mean(0)) / x[~test].std(0), np.ones((4000, 1))], 1)
    for name, y in ys.items():
        w = np.linalg.lstsq(design[~test], y[~test], rcond=None)[0]
        r2 = 1 - np.mean((design[test] @ w - y[test]) ** 2) / y[test].var()
        assert got[name] == pytest.approx(max(0.0, r2), abs=5e-3), name
    assert got["linear"] > 0.99
    assert 0.4 < got["noisy"] < 0.6


def test_reward_and_return_are_targets_of_their_own(rng: np.random.Generator) -> None:
    x = rng.normal(size=(400, 3))
    sample = Sample({"a": x, FUSED: x[:, 1:]}, {"s": x[:, 2]}, reward=x[:, 0],
                    returns=x[:, 1] + rng.normal(size=400), groups=episodes(20, 20))
    got = measure(sample, ["linear_probe", "reward_probe", "return_probe"])
    assert got["a"]["reward_probe"] > 0.99
    assert got["a"]["linear_probe"] == got["a"]["linear_probe/s"] > 0.99
    assert got["a"]["return_probe"] == pytest.approx(0.5, abs=0.12)
    assert got[FUSED]["reward_probe"] < 0.05


def test_unique_r2(rng: np.random.Generator) -> None:
    """Of four orthogonal state variables: one only in ``own``, one in both twins, one half in ``half``, one nowhere."""
    v = orthogonal(2000, 5, rng) * 45
    own, twin, half = v[:, :1], v[:, 1:2], v[:, 2:3] + v[:, 4:5]
    got = measure(Sample({"own": own, "twin": twin, "other": np.repeat(twin, 3, 1), "half": half,
                          "noise": rng.normal(size=(2000, 2)), FUSED: v}, {f"v{i}": v[:, i] for i in range(4)},
                         groups=episodes(100, 20)), ["unique_r2"])
    assert {k: x["unique_r2"] for k, x in got.items() if x} == pytest.approx(
        {"own": 0.25, "twin": 0, "other": 0, "half": 0.125, "noise": 0}, abs=0.01)


# -- similarity --------------------------------------------------------------------------------------------------------


def test_linear_cka(rng: np.random.Generator) -> None:
    x = rng.normal(size=(2000, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1)  # turns, scale and shift do not matter
    assert linear_cka(x, rng.normal(size=(2000, 4))) < 0.01
    assert linear_cka(x, np.ones((2000, 3))) == 0
    columns = orthogonal(100, 6, rng)
    assert linear_cka(columns[:, :3], columns[:, 3:]) == pytest.approx(0, abs=1e-12)
    half = np.concatenate([x[:, :2], rng.normal(size=(2000, 2))], 1)
    assert linear_cka(x, half) == linear_cka(half, x) == pytest.approx(0.5, abs=0.05)
    got = measure(Sample({"a": x, "b": half, "c": rng.normal(size=(2000, 4)), "fused": x}), ["redundancy"])
    assert got["a"]["redundancy"] == got["a"]["redundancy/b"] == got["b"]["redundancy/a"]
    assert got["c"]["redundancy"] < 0.01
    assert got["fused"] == {}


def test_cka_against_the_kernel_form(rng: np.random.Generator) -> None:
    """HSIC of centred Gram matrices (Kornblith et al. 2019, eq. 2 and 3), N x N, instead of cross-products."""
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 9))
    y[:, :2] += x[:, :2]
    h = np.eye(60) - 1 / 60
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    assert linear_cka(x, y) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
