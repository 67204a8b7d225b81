"""What an encoder costs is known before it is built, and limits on it hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lacer.encoders import (
    FUSION,
    BlockConfig,
    CompositeEncoder,
    EncoderSpec,
    Features,
    Limits,
    cost,
    list_blocks,
    measure_latency,
    predict,
    predict_parameters,
    registry,
)
from lacer.envs import LacerError, Objective, SourceSpec, TaskCard, list_envs, task_card
from lacer.search.space import EncoderSpace

WIDTH = 48
"""Of the text embeddings."""

SPACES = {
    "vector": spaces.Box(-1, 1, (5,)), "series": spaces.Box(-np.inf, np.inf, (12, 3)), "text": spaces.Text(20),
    "image": spaces.Box(0, 255, (16, 18, 3), np.uint8), "set": spaces.Box(-1, 1, (7, 4)),
}
CARD = TaskCard("test/All-v0", {m: SourceSpec(m, m, s, m) for m, s in SPACES.items()},  # type: ignore[arg-type]
                spaces.Discrete(2), Objective("score"), "")


def spec_of(sources: dict[str, dict[str, Any]], fusion: dict[str, Any] | None = None,
            condition: str | None = None) -> EncoderSpec:
    routing = {} if condition is None else {"routing": {"condition": condition}}
    return EncoderSpec.parse({"sources": sources, "fusion": fusion or {"block": "concat"}, **routing}, CARD)


def torch_counts(spec: EncoderSpec, card: TaskCard, width: int = WIDTH) -> tuple[int, int]:
    """Parameters and FLOPs of the built encoder, by torch's own counter."""
    encoder = CompositeEncoder(spec, card, cost.StandInTable(width)).eval()
    parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    encoder.requires_grad_(False)
    with cost.unfused(), FlopCounterMode(display=False) as counter:
        encoder(cost.observation(card, spec.sources))
    return parameters, counter.get_total_flops()


def variants(cls: type[BlockConfig]) -> list[dict[str, Any]]:
    """The defaults, and the first and the last options of all fields."""
    choices = cls.choices()
    return [cls().model_dump(),  # type: ignore[call-arg]
            *({"block": cls.model_fields["block"].default, **{f: o[i] for f, o in choices.items()}} for i in (0, -1))]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small encoders do not gain from more, and a busy machine loses by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that encoders are built on for a prediction."""
    used: list[str] = []
    build = cost._build

    def spy(spec: EncoderSpec, card: TaskCard, width: int, device: str) -> CompositeEncoder:
        used.append(device)
        return build(spec, card, width, device)

    monkeypatch.setattr(cost, "_build", spy)
    return used


OURS = [k for k, c in list_blocks().items() if c.__module__.startswith("lacer.")]


@pytest.mark.parametrize(("modality", "block"), OURS)
def test_every_block_is_predicted(modality: str, block: str, devices: list[str]) -> None:
    cls = list_blocks()[modality, block]
    for data in variants(cls):
        try:
            if modality == FUSION:
                condition = "series" if getattr(cls, "conditioned", False) else None
                sources = {"vector": {"block": "linear"}, "series": {"block": "gru"}, "set": {"block": "deepsets"}}
                spec = spec_of(sources, data, condition)
            else:
                spec = spec_of({modality: data})
        except LacerError:
            continue  # not every option goes with all defaults
        predicted = predict(spec, CARD, WIDTH)
        parameters, flops = torch_counts(spec, CARD)
        assert predicted.parameters == parameters == sum(predict_parameters(spec, CARD, WIDTH).values())
        assert predicted.flops == pytest.approx(flops, rel=0.05)
    assert set(devices) == {"meta"}, "the prediction allocates nothing"


@pytest.mark.parametrize("env", [e for e in list_envs() if e.startswith("lacer/")])
def test_random_encoders_are_predicted(env: str) -> None:
    card, rng = task_card(env), np.random.default_rng(0)
    space = EncoderSpace(card)
    for _ in range(3):
        spec = space.to_spec(space.sample(rng))
        predicted = predict(spec, card, "hash")
        parameters, flops = torch_counts(spec, card, 128)
        assert predicted.parameters == parameters, spec
        assert predicted.flops == pytest.approx(flops, rel=0.05), spec
        encoder = CompositeEncoder(spec, card, cost.StandInTable(128))
        assert {m.name: m.parameters for m in predicted.modules} == encoder.parameters_by_module()


def test_flops_by_hand() -> None:
    linear = predict(spec_of({"vector": {"block": "linear", "width": 8}}), CARD).by_name["vector"]
    assert (linear.parameters, linear.flops) == (5 * 8 + 8, 2 * 5 * 8)
    assert (linear.inputs, linear.outputs) == (((5,),), ((8,),))
    gru = predict(spec_of({"series": {"block": "gru", "width": 16, "depth": 1}}), CARD).by_name["series"]
    assert gru.flops == 12 * 2 * 3 * 16 * (3 + 16)  # steps, three gates, from input and state
    assert gru.outputs == ((16,), (12, 16))
    lstm = predict(spec_of({"series": {"block": "lstm", "width": 16, "depth": 1}}), CARD).by_name["series"]
    assert lstm.flops == 12 * 2 * 4 * 16 * (3 + 16)
    a = {"block": "attention", "width": 16, "heads": 2, "depth": 1, "ffn_ratio": 2}
    tokens, w = 7, 16
    layer = tokens * 2 * (4 * w * w + 2 * 2 * w * w) + 2 * 2 * tokens * tokens * w
    assert predict(spec_of({"set": a}), CARD).by_name["set"].flops == tokens * 2 * 3 * w + layer


def test_modules_add_up() -> None:
    spec = spec_of({"image": {"block": "impala"}, "text": {"block": "token_attention"}}, {"block": "attention"})
    for module in predict(spec, CARD, WIDTH).modules:
        assert sum(c.flops for c in module.children) <= module.flops
        assert sum(c.parameters for c in module.children) <= module.parameters
        assert module.kind in ("impala", "token_attention", "attention")
    text = predict(spec, CARD, WIDTH).by_name["text"]
    assert text.inputs == ((48, WIDTH), (48,))


class _Reading(nn.Module):
    def __init__(self, width_in: int, at_build: bool) -> None:
        super().__init__()
        self.dim = 4
        self.linear = nn.Linear(width_in, 4)
        self.at_build = at_build
        if at_build:
            float(self.linear.weight.sum())

    def forward(self, x: Tensor) -> Features:
        h = self.linear(x)
        h = h if self.at_build or float(h.sum()) > 0 else -h  # values decide
        return Features(h, h[:, None])


@pytest.mark.parametrize("at_build", [False, True])
def test_a_block_that_reads_values(at_build: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadingConfig(BlockConfig):
        """Reads values."""

        modality: ClassVar[str] = "vector"
        block: Literal["reading"] = "reading"

        def build(self, shape: tuple[int, ...]) -> nn.Module:
            return _Reading(shape[0], at_build)

    monkeypatch.setitem(registry._BLOCKS, ("vector", "reading"), ReadingConfig)
    spec = spec_of({"vector": {"block": "reading"}})
    module = predict(spec, CARD).by_name["vector"]
    assert (module.parameters, module.flops) == (24, 40)
    assert predict_parameters(spec, CARD)["vector"] == 24


LARGE = spec_of({"vector": {"block": "linear"}, "image": {"block": "impala", "channels": 256, "width": 2048}})


def test_limits_name_the_module_that_is_too_large(devices: list[str]) -> None:
    with pytest.raises(LacerError, match=r"limit is 100,000 parameters; most of it is sources.image with .*: impala\("):
        Limits(parameters=100_000).check(LARGE, CARD)
    with pytest.raises(LacerError, match=r"limit is 1,000,000 FLOPs; most of it is sources.image with .*: impala"):
        Limits(flops=1_000_000).check(LARGE, CARD)
    with pytest.raises(LacerError, match="parameters"):  # too large to be built for a measurement
        Limits(parameters=100_000, latency_ms=1e6).check(LARGE, CARD)
    assert set(devices) == {"meta"}
    wide = spec_of({"vector": {"block": "linear", "width": 8}}, {"block": "concat", "width": 2048, "depth": 3})
    with pytest.raises(LacerError, match=r"most of it is fusion with 8,\d+,\d+ parameters: concat\(width=2048"):
        Limits(parameters=10_000).check(wide, CARD)


def test_limits_that_hold() -> None:
    small = spec_of({"vector": {"block": "linear", "width": 8}}, {"block": "concat", "width": 16, "depth": 1})
    n = predict(small, CARD)
    Limits(parameters=n.parameters, flops=n.flops, latency_ms=1000).check(small, CARD)
    Limits().check(LARGE, CARD)
    for limits in (Limits(parameters=n.parameters - 1), Limits(flops=n.flops - 1), Limits(latency_ms=1e-6)):
        with pytest.raises(LacerError, match="too large"):
            limits.check(small, CARD)


def test_latency() -> None:
    torch.set_num_threads(2)
    small = spec_of({"vector": {"block": "linear"}, "text": {"block": "token_gru"}})
    large = spec_of({"vector": {"block": "linear"}, "image": {"block": "impala", "channels": 64}})
    a, b = measure_latency(small, CARD, WIDTH, 5), measure_latency(large, CARD, WIDTH, 5)
    assert set(a) == {"vector", "text", "fusion", "other"}
    assert all(ms > 0 for ms in a.values())
    assert b["image"] > 5 * b["vector"]
    assert torch.get_num_threads() == 2
