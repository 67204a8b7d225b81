"""Supernets: mixtures and shared weights over whatever blocks are registered, and the plain encoders in them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lacer.agents.policy import CompositePolicy, SupernetExtractor, supernet_policy_kwargs
from lacer.agents.vec import EncoderVecEnv, encode_batch
from lacer.encoders import (
    FUSION,
    BlockConfig,
    EncoderSpec,
    Features,
    FusionConfig,
    TextTable,
    choice,
    list_blocks,
    register_block,
    registry,
)
from lacer.encoders.layers import as_features
from lacer.encoders.slicing import BlockChoices, SharedWeights
from lacer.encoders.supernet import DartsSupernet, SharedSupernet, SupernetOptions, _shape
from lacer.envs import LacerError, TaskCard
from lacer.envs.known_sources import KnownSourcesEnv
from lacer.envs.vec import make_vec
from lacer.search.space import EncoderSpace

SOURCE_OF = {"vector": "position", "series": "trend", "image": "picture", "text": "words", "set": "crowd"}
ENV = KnownSourcesEnv(tuple(SOURCE_OF.values()))
CARD = ENV.task_card
TABLE = TextTable("hash")
FEW: dict[str, Any] = {"position.block": ["linear"], "position.linear.width": [8, 16], "trend.block": ["gru"],
                       "trend.gru.width": [8, 16], "crowd.block": ["deepsets", "unused"],
                       "crowd.deepsets.width": [8, 16]}
SMALL = {**FEW, "picture.block": ["unused"], "words.block": ["unused"], "fusion.block": ["concat", "attention"],
         "fusion.concat.width": [16, 32], "fusion.concat.depth": [1, 2], "fusion.attention.width": [16],
         "crowd.block": ["deepsets", "attention", "unused"], "crowd.attention.width": [8, 16],
         "crowd.attention.depth": [1]}


def observe(n: int) -> dict[str, Tensor]:
    seen = [ENV.reset(seed=i)[0] for i in range(n)]
    batch = encode_batch({k: [o[k] for o in seen] if k == "words" else np.stack([o[k] for o in seen])
                          for k in CARD.sources}, CARD, TABLE)
    return {k: torch.as_tensor(v).float() for k, v in batch.items()}


OBS = observe(3)


def options(decisions: Mapping[str, Any]) -> SupernetOptions:
    return SupernetOptions.from_decisions(CARD, decisions)


def some_spec(held: SupernetOptions, rng: np.random.Generator, size: str = "any") -> EncoderSpec:
    """A random encoder; with ``size`` "largest" or "smallest" one that has the largest or smallest numbers."""
    def pick(blocks: Sequence[BlockChoices], test: Callable[[Any], nn.Module]) -> Any:
        configs = list(blocks[rng.integers(len(blocks))].configs(largest_first=True))
        order = {"any": rng.permutation(len(configs)), "largest": range(len(configs)),
                 "smallest": range(len(configs))[::-1]}[size]
        for i in order:
            try:
                test(configs[i])
                return configs[i]
            except LacerError:
                pass
        raise AssertionError("no variant can be built")

    used: dict[str, BlockConfig] = {}
    while not used:
        used = {n: pick(b, lambda c, n=n: c.build(_shape(CARD, n, TABLE)))
                for n, b in held.sources.items() if n not in held.optional or rng.random() < 0.5}
    names = list(used)
    condition = names[rng.integers(len(names))]
    fusion = pick(held.fusion, lambda c: c.build_routed(dict.fromkeys(names, 8), condition))
    return EncoderSpec(used, fusion, condition if fusion.conditioned else None)


@torch.no_grad()
def check_child(net: SharedSupernet, spec: EncoderSpec) -> None:
    net.eval()
    net.set_active(spec)
    state, child = net(OBS), net.child()
    assert state.shape == (3, net.dim)
    assert child.spec == spec
    torch.testing.assert_close(child(OBS), state[:, :child.dim], atol=1e-6, rtol=0)
    assert (state[:, child.dim:] == 0).all()
    assert state.isfinite().all()


@pytest.mark.parametrize(("modality", "name"), list(list_blocks()))
def test_shared_weights_of_every_block(modality: str, name: str) -> None:
    part = FUSION if modality == FUSION else SOURCE_OF[modality]
    few: dict[str, Any] = {**FEW, **{f"{s}.block": ["unused"] for s in ("picture", "words")},
                           "fusion.block": ["concat"], "fusion.concat.depth": [1], "fusion.concat.width": [16],
                           "fusion.concat.activation": ["relu"]}
    if part != FUSION:
        few |= {f"{s}.block": ["unused"] for s in SOURCE_OF.values() if s not in (part, "trend")}
        few["trend.gru.width"] = [8]
    held = options({**few, f"{part}.block": [name]})
    net = SharedSupernet(CARD, held, TABLE)
    rng = np.random.default_rng(0)
    for size in ("largest", "smallest", *["any"] * 4):
        check_child(net, some_spec(held, rng, size))
    net.train()
    net(OBS).square().sum().backward()
    assert net.active is not None
    key = f"fusion/{name}" if part == FUSION else f"sources/{part}/{name}"
    of_block = [p for n, p in net.named_parameters() if n.startswith(f"shared.{key}")]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in of_block)


def test_slices_follow_gates_sources_and_depth() -> None:
    torch.manual_seed(0)
    net = SharedSupernet(CARD, options(SMALL), TABLE)
    gru, linear, deepsets = (list_blocks(m)[m, n] for m, n in (("series", "gru"), ("vector", "linear"),
                                                               ("set", "deepsets")))
    concat = list_blocks(FUSION)[FUSION, "concat"]

    def spec(width: int, depth: int, *sources: str) -> EncoderSpec:
        every = {"position": linear(width=width), "trend": gru(width=width, depth=depth),
                 "crowd": deepsets(width=width)}
        fusion = concat(width=16, depth=1)
        assert isinstance(fusion, FusionConfig)
        return EncoderSpec({s: every[s] for s in every if s in sources}, fusion)

    all_ = ("position", "trend", "crowd")
    large, small = net.child(spec(16, 2, *all_)), net.child(spec(8, 1, *all_))
    w, v = (dict(c.blocks["trend"].named_parameters())["gru.weight_hh_l0"] for c in (large, small))
    for gate in range(3):  # the leading part of each gate, not of all gates together
        assert torch.equal(v[8 * gate:8 * gate + 8], w[16 * gate:16 * gate + 8, :8])
    w, v = (dict(c.blocks["crowd"].named_parameters())["rho.weight"] for c in (large, small))
    assert torch.equal(v, torch.cat([w[:8, :8], w[:8, 16:24]], 1))  # the mean's part and the maximum's
    w, v = (dict(c.fusion.named_parameters())["net.0.weight"] for c in (large, small))
    assert torch.equal(v, torch.cat([w[:, 16 * i:16 * i + 8] for i in range(3)], 1))
    u = dict(net.child(spec(16, 2, "position", "crowd")).fusion.named_parameters())["net.0.weight"]
    assert torch.equal(u, torch.cat([w[:, :16], w[:, 32:]], 1))  # a source keeps its columns without its neighbours


def test_only_the_active_encoder_costs_and_learns() -> None:
    held = options(SMALL)
    net = SharedSupernet(CARD, held, TABLE)
    rng = np.random.default_rng(1)
    for _ in range(3):
        spec = some_spec(held, rng)
        net.set_active(spec)
        with FlopCounterMode(display=False) as shared:
            net(OBS)
        with FlopCounterMode(display=False) as alone:
            net.child()(OBS)
        assert shared.get_total_flops() == alone.get_total_flops() > 0
    net.zero_grad()
    net(OBS).sum().backward()
    used = {f"shared.sources/{n}/{b.block}." for n, b in spec.sources.items()} | {f"shared.fusion/{spec.fusion.block}."}
    for name, p in net.named_parameters():
        assert p.grad is None or any(name.startswith(u) for u in used), name
    assert any(p.grad is not None for p in net.parameters())


def test_training_one_child_trains_its_relatives() -> None:
    held = options({**SMALL, "fusion.block": ["concat"], "crowd.block": ["unused"]})
    net = SharedSupernet(CARD, held, TABLE)
    rng = np.random.default_rng(0)
    small, large = some_spec(held, rng, "smallest"), some_spec(held, rng, "largest")
    before = net.child(small)(OBS)
    net.set_active(large)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(OBS).square().mean().backward()
    optimizer.step()
    assert (net.child(small)(OBS) - before).abs().max() > 1e-4
    assert net.active == large


def test_shared_supernet_errors_and_copies() -> None:
    held = options(SMALL)
    net = SharedSupernet(CARD, held, TABLE)
    with pytest.raises(LacerError, match="set_active"):
        net(OBS)
    blocks = list_blocks()
    wide = EncoderSpec.parse({"sources": {"trend": {"block": "gru", "width": 64}}, "fusion": {"block": "concat"}}, CARD)
    with pytest.raises(LacerError, match=r"shared weights of gru do not cover .*gru\(width=64"):
        net.set_active(wide)
    other = EncoderSpec({"trend": blocks["series", "lstm"]()}, wide.fusion)
    with pytest.raises(LacerError, match="does not hold sources trend lstm"):
        net.set_active(other)
    with pytest.raises(LacerError, match="no vector block is called 'nope'"):
        options({"position.block": ["nope"]})
    spec = some_spec(held, np.random.default_rng(0))
    net.set_active(spec)
    state = net.eval()(OBS)
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(clone(OBS), state)
    net.set_active(spec)
    assert len(net._children) == 1


def test_state_dicts() -> None:
    held = options(SMALL)
    spec = some_spec(held, np.random.default_rng(2))
    shared, darts = [SharedSupernet(CARD, held, TABLE) for _ in range(2)], [
        DartsSupernet(CARD, *held.candidates(CARD, TABLE), TABLE) for _ in range(2)]
    for net in shared:
        net.set_active(spec)
    with torch.no_grad():
        darts[0].alphas["fusion"][0] = 1.0
    for a, b in (shared, darts):
        a.eval()
        b.eval()
        assert (a(OBS) - b(OBS)).abs().max() > 1e-3
        file = io.BytesIO()
        torch.save(a.state_dict(), file)
        file.seek(0)
        b.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(a(OBS), b(OBS))
    assert darts[0].argmax_spec() == darts[1].argmax_spec()


def test_mixture_of_every_block() -> None:
    torch.manual_seed(0)
    held = options({})
    net = DartsSupernet(CARD, *held.candidates(CARD, TABLE), TABLE)
    assert {len(p) for n, p in net.probabilities().items() if n != FUSION} == {
        len(list_blocks(m)) + 1 for m in SOURCE_OF}
    assert all(sum(p.values()) == pytest.approx(1) and len(set(p.values())) == 1 for p in net.probabilities().values())
    assert {id(p) for p in net.parameters()} == {id(p) for p in net.arch_parameters() + net.weight_parameters()}
    state = net(OBS)
    assert state.shape == (3, net.dim)
    (state * torch.randn_like(state)).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    for alpha in net.arch_parameters():
        assert (alpha.grad != 0).all()
    with torch.no_grad():
        net.eval()
        child = net.child()
        features = child.encode(OBS)
        for name, block in child.spec.sources.items():
            row = net.rows[[o for o in net.sources[name] if o is not None].index(block)]
            assert torch.equal(features[name].vector, row.encode(OBS)[name].vector)
        assert child(OBS).isfinite().all()


def test_padding_changes_no_mixture() -> None:
    held = options({**SMALL, "position.block": ["unused"], "trend.block": ["unused"]})
    net = DartsSupernet(CARD, *held.candidates(CARD, TABLE), TABLE).eval()
    dirty = {k: v.clone() for k, v in OBS.items()}
    dirty["crowd"][..., 1][dirty["crowd"][..., 0] < 0.5] = 7.0
    assert (dirty["crowd"] != OBS["crowd"]).any()
    torch.testing.assert_close(net(dirty), net(OBS))


def test_hard_inputs() -> None:
    held = options(SMALL)
    shared = SharedSupernet(CARD, held, TABLE)
    shared.set_active(some_spec(held, np.random.default_rng(0), "largest"))
    nobody = {k: v.clone() for k, v in OBS.items()}
    nobody["crowd"].zero_()
    for net in (shared, DartsSupernet(CARD, *held.candidates(CARD, TABLE), TABLE)):
        assert net({k: v[:0] for k, v in OBS.items()}).shape == (0, net.dim)
        assert net(nobody).isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            state = net(OBS)
        state.float().square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        with pytest.raises(LacerError, match="'trend' holds NaN"):
            net.eval()({**OBS, "trend": OBS["trend"] * float("nan")})


def test_argmax() -> None:
    held = options({**SMALL, "position.block": ["linear", "unused"], "trend.block": ["gru", "unused"],
                    "fusion.block": ["concat", "film"]})
    sources, fusions = held.candidates(CARD, TABLE)
    net = DartsSupernet(CARD, sources, fusions, TABLE)
    assert len(net.fusions) == 1 + len(sources)  # film once for every source
    with torch.no_grad():
        for name in sources:
            net.alphas[f"source_{name}"][-1] = 2.0  # all unused: the one that is least surely so stays
        net.alphas["source_trend"][-1] = 1.0
        for i, (_, c) in enumerate(net.fusions):
            net.alphas[FUSION][i] = {None: 0.0, "position": 3.0, "trend": 1.0, "crowd": 2.0}[c]
    spec = net.argmax_spec()
    assert list(spec.sources) == ["trend"]
    assert (spec.fusion.block, spec.condition) == ("film", "trend")
    assert net.child(spec)(OBS).shape[0] == 3
    with pytest.raises(LacerError, match="does not hold"):
        net.child(EncoderSpec({"trend": list_blocks()["series", "lstm"]()}, spec.fusion, "trend"))
    with torch.no_grad():
        net.alphas["source_position"][0] = 3.0
    assert list(net.argmax_spec().sources) == ["position"]
    films = [(f, c) for f, c in fusions if c not in (None, "position")]
    net = DartsSupernet(CARD, sources, films, TABLE)
    with torch.no_grad():
        for name in sources:
            net.alphas[f"source_{name}"][-1] = 1.0
        net.alphas["source_position"][0] = 3.0
    assert {"position", net.argmax_spec().condition} == set(net.argmax_spec().sources)
    with pytest.raises(LacerError, match="at least one block"):
        DartsSupernet(CARD, {"trend": [None]}, fusions, TABLE)


def test_options_of_a_search_space() -> None:
    space = EncoderSpace(CARD, {"trend.block": ["gru"], "trend.gru.width": [8, 32]})
    held = options({d.name: d.options for d in space.decisions})
    assert held.optional == set(CARD.sources) - {"trend"}
    assert held.sources["trend"][0].fields["width"] == (8, 32)
    sources, fusions = held.candidates(CARD, TABLE, per_block=2)
    assert len(sources["position"]) == 2 * len(list_blocks("vector")) + 1
    assert sources["position"][-1] is None
    assert len({f.block for f, _ in fusions}) == len(list_blocks(FUSION))
    sources, _ = options(SMALL).candidates(CARD, TABLE, per_block=None)
    assert [(c.width, c.depth) for c in sources["trend"] if c] == [  # type: ignore[attr-defined]
        (8, 1), (8, 2), (16, 1), (16, 2)]


def test_points_of_a_search_space_are_children() -> None:
    space = EncoderSpace(CARD, {**{k: v for k, v in SMALL.items() if not k.startswith("fusion.attention")},
                                "fusion.block": ["film", "concat"], "routing.condition": ["trend"]})
    net = SharedSupernet(CARD, options({d.name: d.options for d in space.decisions}), TABLE)
    rng = np.random.default_rng(0)
    for _ in range(8):
        check_child(net, space.to_spec(space.sample(rng)))
    assert [n for n in net.shared if n.startswith("fusion/film")] == ["fusion/film/trend"]


class _Blind(nn.Module):
    """Sees the last number only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim, self.net = width, nn.Linear(1, width)

    def forward(self, x: Tensor) -> Features:
        return as_features(self.net(x[:, -1:]))


class _ByPlace(nn.Module):
    """A fusion that lists its layers by place, not by name, and has a row too many."""

    def __init__(self, dims: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.dim = width
        self.inp = nn.ModuleList(nn.Linear(d, width) for d in dims.values())
        self.mix = nn.Parameter(torch.randn(sum(dims.values()) + 1, width))

    def forward(self, features: dict[str, Features]) -> Tensor:
        vectors = [f.vector for f in features.values()]
        one = torch.ones(len(vectors[0]), 1)
        return sum(m(v) for m, v in zip(self.inp, vectors, strict=True)) + torch.cat([*vectors, one], 1) @ self.mix


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> tuple[type[BlockConfig], type[FusionConfig]]:
    """Two blocks that are registered while the test runs."""
    list_blocks()
    monkeypatch.setattr(registry, "_BLOCKS", dict(registry._BLOCKS))

    @register_block
    class BlindConfig(BlockConfig):
        """Sees the last number only."""

        modality: ClassVar[str] = "vector"
        block: Literal["blind"] = "blind"
        width: int = choice(8, (8, 16), "units")

        def build(self, shape: tuple[int, ...]) -> nn.Module:
            return _Blind(self.width)

    @register_block
    class ByPlaceConfig(FusionConfig):
        """Layers by place."""

        block: Literal["by_place"] = "by_place"
        width: int = choice(8, (8, 16), "units")

        def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
            return _ByPlace(dims, self.width)

    return BlindConfig, ByPlaceConfig


def test_new_blocks_join(foreign: Any) -> None:
    held = options({**SMALL, "position.block": ["blind", "unused"], "trend.block": ["gru", "unused"],
                    "fusion.block": ["by_place"], "crowd.deepsets.width": [8, 64]})
    net = SharedSupernet(CARD, held, TABLE)
    rng = np.random.default_rng(0)
    for _ in range(12):
        check_child(net, some_spec(held, rng))
    assert DartsSupernet(CARD, *held.candidates(CARD, TABLE), TABLE)(OBS).shape == (3, 8)


def test_alpha_finds_the_better_option(foreign: Any) -> None:
    """The target is the first number of `position`: `blind` cannot see it, and `trend` has nothing to say."""
    torch.manual_seed(0)
    blind, _ = foreign
    blocks = list_blocks()
    concat = blocks[FUSION, "concat"](width=16)
    assert isinstance(concat, FusionConfig)
    net = DartsSupernet(CARD, {"position": [blind(), blocks["vector", "linear"](width=8), None],
                               "trend": [blocks["series", "gru"](width=8), None]}, [(concat, None)])
    head = nn.Linear(net.dim, 1)
    optimizer = torch.optim.Adam([{"params": [*net.weight_parameters(), *head.parameters()], "lr": 3e-3},
                                  {"params": net.arch_parameters(), "lr": 2e-2}])
    for _ in range(250):
        obs = {"position": torch.randn(64, 4), "trend": torch.randn(64, 8, 2)}
        loss = (head(net(obs))[:, 0] - obs["position"][:, 0].clamp(-1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.15
    p = net.probabilities()
    assert net.argmax_spec().to_dict()["sources"] == {"position": {"block": "linear", "width": 8}}, p


class _Switch(BaseCallback):
    """Another random encoder for every rollout."""

    def __init__(self, held: SupernetOptions) -> None:
        super().__init__()
        self.held, self.rng = held, np.random.default_rng(0)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.model.policy.features_extractor.supernet.set_active(some_spec(self.held, self.rng))


@pytest.mark.parametrize("kind", ["darts", "shared"])
def test_ppo(kind: str) -> None:
    env_kwargs = {"sources": ["position", "trend", "words", "crowd"]}
    card: TaskCard = KnownSourcesEnv(**env_kwargs).task_card
    held = SupernetOptions.from_decisions(card, {
        **SMALL, "words.block": ["sentence_mlp", "unused"], "words.sentence_mlp.width": [8, 16],
        "position.block": ["linear", "mlp"], "position.mlp.width": [8, 16]})

    def make() -> DartsSupernet | SharedSupernet:
        if kind == "darts":
            return DartsSupernet(card, *held.candidates(card, TABLE), TABLE)
        return SharedSupernet(card, held, TABLE)

    env = EncoderVecEnv(make_vec("lacer/KnownSources-v0", 2, env_kwargs, seed=0), card, TABLE)
    try:
        model = PPO(CompositePolicy, env, n_steps=64, batch_size=64, n_epochs=2, seed=0,
                    policy_kwargs=supernet_policy_kwargs(make, (16,), -0.7))
        extractor = model.policy.features_extractor
        assert isinstance(extractor, SupernetExtractor)
        before = {n: p.detach().clone() for n, p in extractor.named_parameters()}
        model.learn(384, callback=_Switch(held) if kind == "shared" else None)
        assert all(p.isfinite().all() for p in model.policy.parameters())
        changed = {n for n, p in extractor.named_parameters() if not torch.equal(p, before[n])}
        assert len(changed) > len(before) / 4
        if kind == "darts":
            assert {n for n, p in before.items() if "alphas" in n and len(p) > 1} <= changed
        action, _ = model.predict(env.reset(), deterministic=True)
        assert action.shape == (2, 4)
        child = extractor.supernet.child()
        assert child.spec.sources
    finally:
        env.close()


def test_no_variant_that_can_be_built() -> None:
    attention = options({"trend.block": ["attention"], "trend.attention.width": [8],
                         "trend.attention.heads": [3]}).sources["trend"][0]
    with pytest.raises(LacerError, match=r"no variant of attention can be built here: .*heads"):
        SharedWeights(attention, lambda c, _: c.build((8, 2)))
