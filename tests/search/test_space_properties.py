"""Properties of every search space of every registered environment: what it proposes can be built and trained."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lacer.agents.vec import encode_batch
from lacer.encoders import EncoderSpec, TextTable, build
from lacer.envs import TaskCard, list_envs, task_card
from lacer.search.space import CONDITION, UNUSED, EncoderSpace, SearchSpace, load_space

ENVS: dict[str, dict[str, Any]] = {
    "lacer/KnownSources-v0": {"sources": ("position", "trend", "picture", "words", "crowd", "echo", "noise")},
}
"""Constructor arguments with which an environment shows all it has."""
NAMES = [e for e in list_envs() if e.startswith("lacer/")]  # those of other tests are odd on purpose
PRESETS = {"lacer/KnownSources-v0": ("full", "minigrid", "quick"), "lacer/MixedTraffic-v0": ("full", "quick")}
CASES = [(env, space) for env in NAMES for space in PRESETS.get(env, ("full",))]
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=60)


@cache
def card(env: str) -> TaskCard:
    return task_card(env, **ENVS.get(env, {}))


@cache
def space_of(env: str, space: str) -> EncoderSpace:
    return load_space(space, card(env))


@cache
def table() -> TextTable:
    return TextTable("hash", ["keep left", "", "mind the lane drop ahead, please"])


@cache
def batch(env: str) -> dict[str, Tensor]:
    """Observations drawn from the environment's space, as the policy hands them to the encoder."""
    c, rows = card(env), []
    c.observation_space.seed(0)
    for i in range(3):
        obs = c.observation_space.sample()
        for name, s in c.sources.items():
            if s.modality == "text":
                obs[name] = table().strings[i]
            elif s.modality == "set":
                obs[name][:, 0] = np.arange(len(obs[name])) <= 2 * i
        rows.append(obs)
    stacked = {n: [r[n] for r in rows] if s.modality == "text" else np.stack([r[n] for r in rows])
               for n, s in c.sources.items()}
    return {n: torch.as_tensor(x).float() for n, x in encode_batch(stacked, c, table()).items()}


def below(space: SearchSpace, name: str) -> set[str]:
    """Decisions that are asked or not depending on this one, directly or not."""
    out: set[str] = set()
    for d in space.decisions:
        if d.condition is not None and d.condition[0] in {name, *out}:
            out.add(d.name)
    return out


def differences(a: Any, b: Any, at: str = "") -> set[str]:
    """Places where two plain values differ, e.g. ``sources.noise.width``."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return set() if a == b else {at}
    return {d for k in {*a, *b} for d in differences(a.get(k), b.get(k), f"{at}.{k}" if at else k)}


@pytest.mark.parametrize(("env", "name"), CASES)
@given(seed=seeds)
@few
def test_builds_and_trains(env: str, name: str, seed: int) -> None:
    space, rng = space_of(env, name), np.random.default_rng(seed)
    spec = space.to_spec(space.sample(rng) if seed % 2 else space.sample_uniform(rng))
    torch.manual_seed(seed % 1000)
    module, obs = build(spec, card(env), table()), {k: v.clone() for k, v in batch(env).items()}
    for source in obs:
        if source not in spec.sources:
            obs[source][:] = float("nan")  # an unused source has no influence at all
    for bf16 in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            state = module(obs)
        assert state.shape == (3, module.dim)
        assert state.isfinite().all(), spec.to_json()
        (state.float() * torch.randn(3, module.dim)).sum().backward()
        for n, p in module.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), (n, spec.to_json())
    assert set(module.blocks) == set(spec.sources)
    dropout = any(getattr(b, f, 0) for b in (*spec.sources.values(), spec.fusion)
                  for f in ("dropout", "modality_dropout"))
    for n, block in module.blocks.items():
        reached = any(p.grad is not None and bool(p.grad.any()) for p in block.parameters())
        assert reached or dropout, (n, spec.to_json())
    module.eval()
    with torch.no_grad():
        assert module({n: x[:0] for n, x in obs.items()}).shape == (0, module.dim)
        torch.testing.assert_close(module({n: x[:1] for n, x in obs.items()}), module(obs)[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("env", "name"), CASES)
@given(seed=seeds)
@many
def test_round_trips(env: str, name: str, seed: int) -> None:
    space, rng = space_of(env, name), np.random.default_rng(seed)
    point = space.sample(rng) if seed % 2 else space.sample_uniform(rng)
    spec = space.to_spec(point)
    assert space.check(point) == point
    assert list(space.check(point)) == list(point)
    assert space.from_ncode(space.to_ncode(point)) == point
    assert space.from_spec(spec) == point
    again = EncoderSpec.parse(spec.to_json(), card(env))
    assert again == spec
    assert again.hash == spec.hash
    assert spec.sources
    assert spec.condition is None or spec.condition in spec.sources
    other = space.to_spec(space.sample(rng))
    assert (other.hash == spec.hash) == (other == spec) == (space.from_spec(other) == point)


@pytest.mark.parametrize(("env", "name"), CASES)
@given(seed=seeds)
@many
def test_mutation_changes_what_it_says(env: str, name: str, seed: int) -> None:
    space, rng = space_of(env, name), np.random.default_rng(seed)
    point = space.sample(rng)
    mutant = space.mutate(point, rng)
    assert space.check(mutant) == mutant
    changed = [k for k in point if k in mutant and mutant[k] != point[k]]
    assert len(changed) == 1
    assert set(point) ^ set(mutant) <= below(space, changed[0])
    # In the encoder: the field of that name, or the whole block; a field that gains or loses its effect goes with it.
    part = changed[0] if changed[0] == CONDITION else ("" if changed[0].startswith("fusion.") else "sources."
                                                       ) + changed[0].split(".")[0]
    allowed = {part} if changed[0] != "fusion.block" else {part, "routing"}
    touched = differences(space.to_spec(point).to_dict(), space.to_spec(mutant).to_dict())
    assert touched
    assert all(any(t == a or t.startswith(a + ".") for a in allowed) for t in touched), (changed, touched)
    if not changed[0].endswith(".block") and not below(space, changed[0]):
        assert len(touched) == 1
    assert space.to_ncode(point) != space.to_ncode(mutant)


@pytest.mark.parametrize(("env", "name"), CASES)
@given(seed=seeds)
@many
def test_crossover_is_valid_and_takes_after_its_parents(env: str, name: str, seed: int) -> None:
    space, rng = space_of(env, name), np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = space.check(space.crossover(a, b, rng))
    for k, v in child.items():
        assert k == CONDITION or (k not in a and k not in b) or v in (a.get(k), b.get(k))


@pytest.mark.parametrize("env", NAMES)
def test_size_is_exact_in_narrow_spaces(env: str) -> None:
    full, rng, counted = space_of(env, "full"), np.random.default_rng(0), 0
    for _ in range(20):
        narrow: dict[str, list[Any]] = {"fusion.block": ["film", "concat"]}
        for d in full.decisions:
            part, *rest = d.name.split(".")
            block = narrow.get(f"{part}.block", [])
            if d.name not in narrow and d.name != CONDITION and (rest == ["block"] or rest[0] in block):
                keep = 1 + (rng.random() < (0.5 if rest == ["block"] else 0.05))
                narrow[d.name] = [d.options[i] for i in sorted(rng.permutation(len(d.options))[:keep])]
        if any(narrow[f"{n}.block"] != [UNUSED] for n in full.card.sources):
            space = EncoderSpace(full.card, narrow)
            if space.size() < 1000:
                points = [space.to_ncode(p) for p in space.points()]
                assert len(set(points)) == len(points) == space.size()
                counted += 1
    assert counted >= 3
