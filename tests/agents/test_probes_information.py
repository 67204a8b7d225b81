"""Mutual information against closed forms and against scikit-learn's estimators."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from lacer.agents.probes import FUSED, Sample, measure
from lacer.agents.probes.information import classes, distances, mutual_information


def mi(x: np.ndarray, y: np.ndarray, k: int = 4) -> float:
    return mutual_information(distances(x), distances(y), k)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9, -0.9])
@pytest.mark.parametrize("d", [1, 2])
def test_gaussians(rho: float, d: int, rng: np.random.Generator) -> None:
    """Normal variables share log(det Sx det Sy / det S) / 2 nats; of the sample's covariances, which vary less around
    what is estimated than the true -d/2 log(1 - rho^2) does."""
    got, want = [], []
    for k in (3, 4, 5, 3, 4, 5):
        x, z = rng.normal(size=(2, 500, d))
        y = rho * x + math.sqrt(1 - rho**2) * z
        both, parts = np.cov(x.T, y.T), (np.cov(v.T).reshape(d, d) for v in (x, y))
        want.append((sum(np.linalg.slogdet(s)[1] for s in parts) - np.linalg.slogdet(both)[1]) / 2)
        got.append(mi(x, y, k))
    assert np.mean(want) == pytest.approx(-d / 2 * math.log(1 - rho**2), abs=0.1)
    assert np.mean(got) == pytest.approx(np.mean(want), abs=0.03 + (d > 1) * 0.1 * np.mean(want))


def test_other_dimensions_take_nothing_away_and_bring_nothing(rng: np.random.Generator) -> None:
    x, z = rng.normal(size=(2, 1000))
    y = 0.8 * x + 0.6 * z
    wide = np.stack([x, rng.normal(size=1000)], 1)
    assert mi(wide, y) == pytest.approx(-math.log(0.6), abs=0.1)


def test_unit_and_order_of_the_arguments_do_not_matter(rng: np.random.Generator) -> None:
    x = rng.normal(size=(300, 2))
    y = x[:, :1] + rng.normal(size=(300, 1))
    assert mi(x, y) == mi(y, x) == pytest.approx(mi(1e6 * x - 5, 1e-4 * y + 7), abs=1e-9)


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_against_scikit_learn(noise: float, rng: np.random.Generator) -> None:
    x = rng.uniform(-2, 2, 400)
    y = np.sin(2 * x) + noise * rng.normal(size=400)
    theirs = mutual_info_regression(x[:, None], y, n_neighbors=4, random_state=0)[0]
    assert mi(x, y) == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, 1.0, 4.0])
def test_discrete_targets_against_scikit_learn(shift: float, rng: np.random.Generator) -> None:
    y = rng.integers(3, size=500)
    x = shift * y + rng.normal(size=500)
    theirs = mutual_info_classif(x[:, None], y, n_neighbors=4, random_state=0)[0]
    assert mutual_information(distances(x), classes(y[:, None])) == pytest.approx(theirs, abs=0.03)


def test_separate_classes_tell_their_entropy(rng: np.random.Generator) -> None:
    y = np.repeat(np.arange(4), 60)
    x = 100 * y + rng.normal(size=240)
    assert mutual_information(distances(x), classes(y[:, None])) == pytest.approx(math.log(4), abs=0.02)


@pytest.mark.parametrize("m", [2, 7])
def test_repeated_values_as_of_texts(m: int, rng: np.random.Generator) -> None:
    """Features that take few values: the entropy if they fix the other, nothing if they have nothing to do with it."""
    word = np.repeat(np.arange(m), 420 // m)
    features = rng.normal(size=(m, 3))[word]
    assert mi(features, word + 0.0) == pytest.approx(math.log(m), abs=0.01)
    assert mi(features, rng.permutation(word) + 0.0) < 0.06
    assert mi(features, rng.normal(size=len(word))) < 0.08


def test_nothing_to_tell(rng: np.random.Generator) -> None:
    x = rng.normal(size=(200, 3))
    assert [mi(np.ones((200, 2)), x), mi(x, np.zeros(200)), mi(np.ones(200), np.ones(200))] == pytest.approx([0] * 3)
    assert mi(x[:5], x[:5]) == 0, "too few rows"
    rare = np.arange(200)
    assert mutual_information(distances(x), classes(rare[:, None])) == 0, "no class has neighbours"
    assert mi(x, x) > 1.5


def test_rare_classes_are_left_out(rng: np.random.Generator) -> None:
    y = np.repeat([0, 1], 100)
    x = 50 * y + rng.normal(size=200)
    more = mutual_information(distances(np.append(x, [7, 9])), classes(np.append(y, [2, 3])[:, None]))
    assert more == pytest.approx(math.log(2), abs=0.02)


def test_probes_of_a_sample(rng: np.random.Generator) -> None:
    n = 400
    t, u = rng.normal(size=(2, n))
    a = np.stack([t, 0.1 * rng.normal(size=n)], 1)
    square = np.stack([t**2, 0.1 * rng.normal(size=n)], 1)
    got = measure(Sample({"a": a, "square": square, "b": rng.normal(size=(n, 2)), FUSED: np.stack([t, u], 1)},
                         returns=t + 0.5 * rng.normal(size=n), action=np.stack([t, 0 * t], 1)),
                  ["mi_return", "mi_action", "mi_redundancy", "redundancy"])
    assert got["a"]["mi_return"] > got["square"]["mi_return"] + 0.1
    assert got["square"]["mi_return"] > got["b"]["mi_return"] + 0.1
    assert got["b"]["mi_return"] < 0.1
    assert got["a"]["mi_action"] > 1
    assert got["b"]["mi_action"] < 0.1
    assert got["a"]["mi_redundancy"] == got["a"]["mi_redundancy/square"] == got["square"]["mi_redundancy"] > 1
    assert got["b"]["mi_redundancy"] < 0.1
    assert got["a"]["redundancy/square"] < 0.1, "which linear CKA does not see"
    chosen = measure(Sample({"a": a, "b": rng.normal(size=(n, 2)), FUSED: a}, action=(t > 0)[:, None].astype(int)),
                     ["mi_action"])
    assert chosen["a"]["mi_action"] == pytest.approx(math.log(2), abs=0.08)
    assert chosen["b"]["mi_action"] < 0.06
