"""Probes against closed forms and against a second computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lacer.agents.probes import MEANING, effective_rank, linear_cka, linear_probe, probe


def orthogonal(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """(n, d) with orthonormal columns of mean zero."""
    x = rng.normal(size=(n, d))
    return np.linalg.qr(x - x.mean(0))[0]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("d", [1, 2, 8, 50])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_orthogonal_features_have_full_rank(d: int, scale: float, rng: np.random.Generator) -> None:
    assert effective_rank(scale * orthogonal(200, d, rng) + 3) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("d", [1, 2, 8, 50])
def test_rank_one(d: int, rng: np.random.Generator) -> None:
    assert effective_rank(np.outer(rng.normal(size=100), rng.normal(size=d)) + rng.normal(size=d)) == pytest.approx(
        1 / d, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e-20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 1000])
def test_constant_features_have_rank_zero(value: float, dtype: type, n: int) -> None:
    assert effective_rank(np.full((n, 8), value, dtype)) == 0


@pytest.mark.parametrize("spectrum", [(1, 1, 0, 0), (4, 2, 1, 1), (1, 1e-3), (9, 3, 1)])
def test_known_spectrum(spectrum: tuple[float, ...], rng: np.random.Generator) -> None:
    """exp(entropy) of the singular values, turned by a rotation that must not matter."""
    d = len(spectrum)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    x = orthogonal(64, d, rng) * np.array(spectrum) @ turn + 5
    p = [s / sum(spectrum) for s in spectrum if s]
    assert effective_rank(x) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)) / d, rel=1e-6)


def test_two_equal_directions_of_eight_are_a_quarter(rng: np.random.Generator) -> None:
    x = np.zeros((50, 8), np.float32)
    x[:, 2:4] = orthogonal(50, 2, rng)
    assert effective_rank(x) == pytest.approx(0.25, rel=1e-4)


def episodes(n: int, length: int) -> np.ndarray:
    return np.repeat(1_000_000 + np.arange(n), length)


def test_perfect_and_useless_features(rng: np.random.Generator) -> None:
    groups = episodes(20, 30)
    y = rng.normal(size=600)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    good = np.stack([y, *rng.normal(size=(3, 600))], 1) @ turn
    assert linear_probe(good, {"y": y}, groups)["y"] > 0.999
    assert linear_probe(rng.normal(size=(600, 4)), {"y": y}, groups)["y"] < 0.03
    noisy = np.stack([y + rng.normal(size=600), *rng.normal(size=(3, 600))], 1) @ turn
    assert linear_probe(noisy, {"y": y}, groups)["y"] == pytest.approx(0.5, abs=0.1)


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


def test_the_order_of_rows_does_not_matter(rng: np.random.Generator) -> None:
    groups = episodes(8, 20)
    x = rng.normal(size=(160, 5))
    y = x @ rng.normal(size=5) + rng.normal(size=160)
    mix = rng.permutation(160)
    assert linear_probe(x[mix], {"y": y[mix]}, groups[mix])["y"] == pytest.approx(
        linear_probe(x, {"y": y}, groups)["y"], abs=1e-6)


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


def test_linear_cka(rng: np.random.Generator) -> None:
    x = rng.normal(size=(2000, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1)  # turns, scale and shift do not matter
    assert linear_cka(x, rng.normal(size=(2000, 4))) < 0.01
    assert linear_cka(x, np.ones((2000, 3))) == 0
    half = np.concatenate([x[:, :2], rng.normal(size=(2000, 2))], 1)
    assert linear_cka(x, half) == linear_cka(half, x) == pytest.approx(0.5, abs=0.05)
    got = probe({"a": x, "b": half, "c": rng.normal(size=(2000, 4)), "fused": x}, {}, episodes(20, 100))
    assert got["a"]["redundancy"] == got["a"]["redundancy/b"] == got["b"]["redundancy/a"]
    assert got["c"]["redundancy"] < 0.01
    assert "redundancy" not in got["fused"]


def test_probe_of_sources_and_fused(rng: np.random.Generator) -> None:
    groups = episodes(10, 20)
    y, z = rng.normal(size=(2, 200))
    features = {"sees": np.stack([y, z], 1).astype(np.float32), "half": np.stack([y, y], 1),
                "dead": np.zeros((200, 4), np.float32)}
    got = probe(features, {"y": y, "z": z, "flat": np.zeros(200)}, groups)
    assert list(got) == ["sees", "half", "dead"]
    assert set(got["sees"]) == {"effective_rank", "linear_probe", "linear_probe/y", "linear_probe/z", "redundancy",
                                "redundancy/half", "redundancy/dead"}
    assert set(MEANING) == {k for k in got["sees"] if "/" not in k}
    assert got["sees"]["linear_probe"] > 0.999
    assert got["half"]["linear_probe/y"] > 0.999
    assert got["half"]["linear_probe/z"] < 0.1
    assert got["half"]["linear_probe"] == pytest.approx(
        (got["half"]["linear_probe/y"] + got["half"]["linear_probe/z"]) / 2)
    assert got["half"]["effective_rank"] == pytest.approx(0.5, rel=1e-3)
    assert got["dead"]["effective_rank"] == 0
    assert got["dead"]["linear_probe"] < 0.01
    assert probe({"x": features["sees"]}, {}, groups) == {"x": {"effective_rank": got["sees"]["effective_rank"]}}
