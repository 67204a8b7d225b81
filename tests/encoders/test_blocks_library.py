"""Every registered block: any shape, any precision, odd inputs. A new block is tested by being registered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from lacer.encoders import EncoderSpec, Features, TextTable, build, list_blocks
from lacer.encoders.composite import CompositeEncoder
from lacer.envs import LacerError, Objective, SourceSpec, TaskCard

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "vector": [(1,), (46,)], "series": [(1, 1), (7, 3), (65, 2)], "set": [(1, 2), (9, 4)],
    "image": [(7, 7, 3), (16, 20, 1), (64, 84, 2)], "text": [()],
}
TEXTS = ["keep left, please", "", "a red ball", "!?"]
BLOCKS = [k for k in list_blocks() if k[0] != "fusion"]
FUSIONS = [name for _, name in list_blocks("fusion")]
CASES = [(m, b, s) for m, b in BLOCKS for s in SHAPES[m]]


def card(**sources: tuple[str, tuple[int, ...]]) -> TaskCard:
    """A task card with sources given as name=(modality, shape)."""
    made = {}
    for name, (modality, shape) in sources.items():
        space: Any = spaces.Text(200) if modality == "text" else spaces.Box(
            *((0, 255, shape, np.uint8) if modality == "image" else (-2.0, 2.0, shape, np.float32)))
        made[name] = SourceSpec(name, modality, space, "a source")  # type: ignore[arg-type]
    return TaskCard("test/Card-v0", made, spaces.Discrete(2), Objective("score"), "a task")


def encoder(c: TaskCard, sources: dict[str, Any], fusion: Any = None, **routing: str) -> CompositeEncoder:
    data: dict[str, Any] = {"sources": {n: {"block": b} if isinstance(b, str) else b for n, b in sources.items()},
                            "fusion": fusion or {"block": "concat"}}
    if routing:
        data["routing"] = routing
    torch.manual_seed(0)
    return build(EncoderSpec.parse(data, c), c, TextTable("hash", TEXTS))


def observations(c: TaskCard, batch: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, s in c.sources.items():
        if s.modality == "text":
            out[name] = torch.arange(batch)[:, None] % len(TEXTS)
        elif s.modality == "image":
            h, w, ch = s.shape
            out[name] = torch.randint(0, 256, (batch, ch, h, w), generator=g).float()
        else:
            out[name] = torch.rand(batch, *s.shape, generator=g) * 2 - 1
            if s.modality == "set":
                out[name][..., 0] = (torch.rand(batch, s.shape[0], generator=g) > 0.4).float()
    return out


def check(module: CompositeEncoder, obs: dict[str, Tensor], bf16: bool = False) -> Tensor:
    """Forward and backward are finite and of the promised shapes; gives the state."""
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = module.encode(obs)
        state = module.fusion(features)
        loss = (state.float() ** 2).sum()
    batch = len(next(iter(obs.values())))
    for name, f in features.items():
        assert isinstance(f, Features)
        assert f.vector.shape == (batch, module.blocks[name].dim)
        assert f.tokens.shape[0] == batch
        assert f.tokens.shape[2] == module.blocks[name].dim
        assert f.mask is None or (f.mask.shape == f.tokens.shape[:2] and f.mask.dtype == torch.bool)
        assert f.vector.isfinite().all()
        assert f.tokens.isfinite().all()
    assert state.shape == (batch, module.dim)
    assert state.isfinite().all()
    loss.backward()
    for name, p in module.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    return state


@pytest.mark.parametrize(("modality", "block", "shape"), CASES)
def test_block_at_any_shape(modality: str, block: str, shape: tuple[int, ...]) -> None:
    c = card(x=(modality, shape))
    module = encoder(c, {"x": block})
    obs = observations(c, 2 if modality == "image" else 4)
    state = check(module, obs)
    check(module, obs, bf16=True)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.blocks["x"].parameters())
    module.eval()
    with torch.no_grad():
        if modality != "image" or shape[0] <= 16:
            one = torch.cat([module({"x": x[None]}) for x in obs["x"]])
            torch.testing.assert_close(one, module(obs), rtol=1e-4, atol=1e-4)
        assert module({"x": obs["x"][:0]}).shape == (0, module.dim)
    assert module.training is False
    assert state.std() > 0, "the state depends on the observation"


@pytest.mark.parametrize(("modality", "block", "shape"), [x for x in CASES if x[0] == "set"])
def test_padding_and_empty_sets(modality: str, block: str, shape: tuple[int, ...]) -> None:
    c = card(x=(modality, shape))
    for fusion in ("concat", "attention"):
        module = encoder(c, {"x": block}, {"block": fusion})
        obs = observations(c, 6)
        obs["x"][0, :, 0] = 0
        other = obs["x"].clone()
        other[..., 1:] = torch.where(obs["x"][..., :1] > 0.5, other[..., 1:], torch.tensor(float("nan")))
        torch.testing.assert_close(check(module, {"x": other}), check(module, obs), rtol=0, atol=0)
        obs["x"][..., 0] = 0
        empty = check(module, obs)
        torch.testing.assert_close(empty, empty[:1].expand_as(empty))
        module.eval()
        with torch.no_grad():
            torch.testing.assert_close(module({"x": other})[:1], empty[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [b for m, b in BLOCKS if m == "set"])
def test_sets_have_no_order(block: str) -> None:
    c = card(x=("set", (9, 4)))
    module, obs = encoder(c, {"x": block}), observations(c, 4)
    torch.testing.assert_close(module({"x": obs["x"].flip(1)}), module(obs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [b for m, b in BLOCKS if m == "image"])
@pytest.mark.parametrize("value", [0.0, 255.0])
def test_constant_images(block: str, value: float) -> None:
    c = card(x=("image", (16, 16, 3)))
    module = encoder(c, {"x": block})
    check(module, {"x": torch.full((2, 3, 16, 16), value)})
    check(module, {"x": torch.full((2, 3, 16, 16), value)}, bf16=True)


@pytest.mark.parametrize("block", [b for m, b in BLOCKS if m == "text"])
def test_empty_strings_and_word_padding(block: str) -> None:
    c = card(x=("text", ()))
    module = encoder(c, {"x": block}, {"block": "attention"})
    check(module, {"x": torch.tensor([[1], [1]])})
    if list_blocks()["text", block].text_level == "token":
        tokens, mask = module.table.tokens(torch.tensor([0, 2]))  # type: ignore[union-attr]
        noise = torch.where(mask[..., None], tokens, torch.randn_like(tokens))
        for a, b in zip(module.blocks["x"](tokens, mask)[:2], module.blocks["x"](noise, mask)[:2], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", ["gru", "lstm", "temporal_conv", "ssm"])
def test_causal_blocks_do_not_see_the_future(block: str) -> None:
    c = card(x=("series", (9, 2)))
    module, x = encoder(c, {"x": block}).blocks["x"], torch.randn(3, 9, 2)
    later = torch.cat([x[:, :5], torch.randn(3, 4, 2)], 1)
    torch.testing.assert_close(module(x).tokens[:, :5], module(later).tokens[:, :5], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(x).vector, module(later).vector)


def test_state_space_kernel_is_the_recurrence() -> None:
    c = card(x=("series", (12, 1)))
    layer = encoder(c, {"x": "ssm"}).blocks["x"].layers[0]
    u = torch.randn(layer.length)
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    dta = a * layer.log_dt.exp()[:, None]
    state, out = torch.zeros_like(a), []
    for t in range(layer.length):
        state = dta.exp() * state + (dta.exp() - 1) / a * u[t]
        out.append(2 * (torch.view_as_complex(layer.c) * state).real.sum(1))
    k = layer.kernel()
    conv = [sum(k[:, j] * u[t - j] for j in range(t + 1)) for t in range(layer.length)]
    torch.testing.assert_close(torch.stack(out), torch.stack(conv), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


ALL = {"v": ("vector", (5,)), "s": ("series", (8, 3)), "c": ("set", (6, 3)), "i": ("image", (16, 16, 3)),
       "t": ("text", ())}
PLAIN = {"v": "mlp", "s": "attention", "c": "deepsets", "i": "cnn", "t": "token_attention"}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("used", ["vscit", "t", "cv"])
def test_fusions(fusion: str, used: str) -> None:
    c = card(**ALL)
    conditioned = getattr(list_blocks()["fusion", fusion], "conditioned")  # noqa: B009
    routing = {"condition": used[-1]} if conditioned else {}
    module = encoder(c, {n: PLAIN[n] for n in used}, {"block": fusion}, **routing)
    obs = observations(c, 4)
    check(module, obs, bf16=True)
    check(module, obs)
    for n in used:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.blocks[n].parameters()), n
    module.eval()
    with torch.no_grad():
        state = module(obs)
        for n in used:  # empty sets and texts, constant images
            obs[n] = torch.zeros_like(obs[n])
        assert module(obs).isfinite().all()
        assert module({n: x[:0] for n, x in obs.items()}).shape == (0, module.dim)
    assert not torch.equal(state, module(obs))


@pytest.mark.parametrize("name", list(ALL))
def test_broken_input_names_its_source(name: str) -> None:
    c = card(**ALL)
    module = encoder(c, PLAIN).eval()
    for value, kind in ((float("nan"), "NaN"), (float("inf"), "infinite")):
        obs = {n: x.float() for n, x in observations(c, 4).items()}
        obs["c"][..., 0] = 1
        obs[name].view(4, -1)[2, -1] = value
        with pytest.raises(LacerError, match=f"source '{name}' holds {kind} values in 1 of 4 observations .*: 2"):
            module(obs)
    spec = {"sources": {n: {"block": b} for n, b in PLAIN.items() if n != name}, "fusion": {"block": "concat"}}
    ignoring = build(EncoderSpec.parse(spec, c), c, TextTable("hash", TEXTS)).eval()
    assert ignoring(obs).isfinite().all(), "an unused source may hold anything"


def test_large_finite_input_is_fine() -> None:
    c = card(v=("vector", (5,)))
    unbounded = SourceSpec("v", "vector", spaces.Box(-np.inf, np.inf, (5,), np.float32), "wild")
    c = TaskCard(c.env_id, {"v": unbounded}, c.action_space, c.objective, c.description)
    for block in [b for m, b in BLOCKS if m == "vector"]:
        assert encoder(c, {"v": block}).eval()({"v": torch.full((2, 5), 3e38)}).isfinite().all(), block


def test_dropout_acts_in_training_only() -> None:
    c = card(**ALL)
    module = encoder(c, {**PLAIN, "v": {"block": "mlp", "dropout": 0.5}}, {"block": "concat", "modality_dropout": 0.5})
    obs = observations(c, 8)
    assert not torch.equal(module(obs), module(obs))
    module.eval()
    assert torch.equal(module(obs), module(obs))
    module.train()
    dropped = module.fusion.drop(module.encode(obs))  # type: ignore[operator]
    assert {bool((f.vector == 0).all(1)[i]) for f in dropped.values() for i in range(8)} == {True, False}
    for f in dropped.values():
        assert torch.equal((f.vector == 0).all(1), (f.tokens == 0).flatten(1).all(1)) or f.mask is not None


@pytest.mark.parametrize(("modality", "block"), list_blocks())
def test_declaration(modality: str, block: str) -> None:
    cls = list_blocks()[modality, block]
    assert 20 < len(cls.summary()) <= 116
    assert cls.paper or block in ("mlp", "linear")
    assert set(cls.choices()) == set(cls.model_fields) - {"block"}
    for name, (other, values) in cls.conditions().items():
        assert list(cls.model_fields).index(other) < list(cls.model_fields).index(name)
        assert set(values) < set(cls.choices()[other])
    for name, options in cls.choices().items():
        assert cls.model_fields[name].description
        for option in options:
            cls.model_validate({"block": block, name: option})


def test_a_field_without_effect_takes_its_default() -> None:
    c = card(x=("image", (16, 16, 3)))

    def parse(**fields: Any) -> EncoderSpec:
        return EncoderSpec.parse({"sources": {"x": {"block": "cnn", **fields}}, "fusion": {"block": "concat"}}, c)

    assert parse(head="spatial_softmax", grid=1) == parse(head="spatial_softmax", grid=2)
    assert parse(head="grid", grid=1) != parse(head="grid", grid=2)
    assert parse(head="spatial_softmax", grid=1).to_dict()["sources"]["x"]["grid"] == 4


def test_routing_of_a_spec() -> None:
    c = card(**ALL)
    base = {"sources": {"v": {"block": "mlp"}, "t": {"block": "sentence_mlp"}}, "fusion": {"block": "film"}}
    spec = EncoderSpec.parse({**base, "routing": {"condition": "t"}}, c)
    assert spec.to_dict()["routing"] == {"condition": "t"}
    assert EncoderSpec.parse(spec.to_json(), c) == spec
    assert EncoderSpec.parse({**base, "routing": {"condition": "v"}}, c).hash != spec.hash
    for routing, message in ((None, "routing.condition is missing"), ({}, "is missing"), ("t", "expected an object"),
                             ({"condition": "tt"}, "did you mean 't'"), ({"condition": "s"}, "does not use"),
                             ({"conditoin": "t"}, "did you mean 'condition'"), ({"condition": 3}, "must be the name")):
        with pytest.raises(LacerError, match=message):
            EncoderSpec.parse({**base, "routing": routing}, c)
    with pytest.raises(LacerError, match="no effect"):
        EncoderSpec.parse({**base, "fusion": {"block": "concat"}, "routing": {"condition": "t"}}, c)
    assert "routing" not in EncoderSpec.parse({**base, "fusion": {"block": "concat"}}, c).to_dict()


def test_former_encoders_are_the_same() -> None:
    """Weights of specs that name only the fields there were before fields were added."""
    c = card(**ALL)
    module = encoder(c, {"v": {"block": "residual_mlp", "width": 16, "depth": 1, "activation": "gelu"},
                         "i": {"block": "impala", "channels": 4, "width": 32, "grid": 2},
                         "s": {"block": "attention", "width": 8, "heads": 2, "depth": 1, "ffn_ratio": 1}},
                     {"block": "attention", "width": 16, "heads": 2, "depth": 1})
    assert set(module.state_dict()) >= {
        "blocks.v.inp.weight", "blocks.v.blocks.0.3.weight", "blocks.v.out.0.weight", "blocks.i.place",
        "blocks.i.token.weight", "blocks.i.summary.0.weight", "blocks.i.net.0.weight", "fusion.kind",
        "fusion.inp.v.weight", "fusion.net.encoder.layers.0.linear1.weight"}
    assert sum(p.numel() for p in module.parameters()) == 12192
