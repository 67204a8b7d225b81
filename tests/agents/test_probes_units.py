"""Units: planted dead and dormant ones, whichever way a block applies its activation; every registered block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from lacer.agents.probes import FUSED, Layer, Sample, measure
from lacer.agents.probes.units import Watch, dead, dormant
from lacer.encoders import EncoderSpec, TextTable, build, list_blocks
from lacer.envs import Objective, SourceSpec, TaskCard

torch.set_num_threads(1)

ROWS = 37
SHAPES = {"vector": (6,), "series": (9, 3), "set": (5, 4), "image": (16, 20, 3), "text": ()}
TEXTS = ["keep left", "", "a red ball", "!?"]


def watched(blocks: dict[str, nn.Module], *batches: Tensor) -> Watch:
    """Runs every block on each batch, one after the other."""
    with torch.no_grad(), Watch(blocks) as watch:
        for x in batches:
            watch.run(lambda x: [b(x) for b in blocks.values()][-1], x, len(x))
    return watch


class Functional(nn.Module):
    """A block of somebody else's: three ways to apply an activation, none of them a module; the last in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        h = torch.relu(self.b(h))
        return self.c(h).relu_()


def linear(weight: np.ndarray | Tensor, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(bias))
    return layer


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), F.relu, F.gelu, torch.relu, Tensor.relu,
                                        lambda x: x.relu_(), lambda x: F.relu(x, inplace=True)],
                         ids=["ReLU", "GELU", "SiLU", "F.relu", "F.gelu", "torch.relu", "Tensor.relu",
                              "relu_", "inplace"])
def test_planted_dead_units(activation: Callable[[Tensor], Tensor]) -> None:
    """Three of eight units get a bias that no input makes up for."""
    layer = linear(torch.eye(8) * 0.1, [1.0] * 5 + [-100.0] * 3)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return activation(self.layer(x))

    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    (seen,) = watched({"a": Block()}, x).layers()["a"]
    assert dead([seen]) == dormant([seen], 0.025) == 3 / 8
    before = layer(x)
    assert seen.rms_in == pytest.approx(before.square().mean().sqrt().item(), rel=1e-5)
    np.testing.assert_allclose(seen.mean, activation(before.clone()).abs().mean(0).detach(), rtol=1e-4, atol=1e-6)


def test_dormant_units_by_threshold() -> None:
    """Against the definition: E|h| over the mean of the layer, which is 1 here."""
    layer = Layer(np.array([0.02, 0.025, 0.09, 0.1, 2.0, 2.0, 2.0, 1.765]), np.ones(8), 1.0)
    assert layer.mean.mean() == 1
    assert dormant([layer], 0.025) == 2 / 8
    assert dormant([layer], 0.1) == 4 / 8
    assert dead([layer]) == 0
    silent = Layer(np.zeros(8), np.zeros(8), 0.0)
    assert dormant([silent], 0.025) == dead([silent]) == 1
    assert dormant([layer, silent], 0.1) == 12 / 16, "of all units of all layers"


def test_a_unit_that_fires_once_is_not_dead() -> None:
    block = nn.Sequential(linear(np.eye(2), [0, 0]), nn.ReLU())
    x = torch.zeros(64, 2)
    x[17, 1] = 1
    (seen,) = watched({"a": block}, x).layers()["a"]
    assert dead([seen]) == 1 / 2
    assert seen.largest.tolist() == [0, 1]


def test_batches_add_up() -> None:
    block = Functional()
    x = torch.randn(ROWS, 6)
    whole, parts = watched({"a": block}, x), watched({"a": block}, x[:20], x[20:23], x[23:])
    for a, b in zip(whole.layers()["a"], parts.layers()["a"], strict=True):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-4)
        np.testing.assert_allclose(a.largest, b.largest, rtol=1e-4)
        assert a.rms_in == pytest.approx(b.rms_in, rel=1e-4)
    assert torch.allclose(torch.cat(parts.features["a"]), whole.features["a"][0], atol=1e-6)
    assert [len(s.mean) for s in whole.layers()["a"]] == [8, 10, 12]
    plain = block(x)
    assert torch.equal(plain, whole.features["a"][0])
    assert not block._forward_hooks
    assert not block._forward_pre_hooks, "nothing stays behind"


def test_which_axis_holds_the_units() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Linear(7, 11)
            self.experts = nn.Parameter(torch.randn(4, 11, 5))

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm(self.conv(x)))  # (B, 7, 6, 6): channels
            h = F.gelu(self.linear(h.flatten(2).transpose(1, 2)))  # (B, 36, 11): the last axis
            h = torch.bmm(h.mean(1).expand(4, -1, -1), self.experts).relu()  # (4, B, 5): experts and units
            return h.mean(0)

    seen = watched({"a": Mixed().eval()}, torch.randn(ROWS, 3, 8, 8)).layers()["a"]
    assert [len(s.mean) for s in seen] == [7, 11, 20]


def test_without_an_activation_the_features_are_judged() -> None:
    block = nn.Linear(3, 4)
    x = torch.randn(ROWS, 3)
    (seen,) = watched({"a": block}, x).layers()["a"]
    np.testing.assert_allclose(seen.mean, block(x).abs().mean(0).detach(), rtol=1e-5)


def one_source(modality: str) -> TaskCard:
    shape = SHAPES[modality]
    space: Any = spaces.Text(200) if modality == "text" else spaces.Box(
        *((0, 255, shape, np.uint8) if modality == "image" else (-2.0, 2.0, shape, np.float32)))
    made = {n: SourceSpec(n, modality, space, "a source") for n in ("a", "b")}  # type: ignore[arg-type]
    return TaskCard("test/Card-v0", made, spaces.Discrete(2), Objective("score"), "a task")


def observations(modality: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    if modality == "text":
        x: Tensor = torch.arange(ROWS)[:, None] % len(TEXTS)
    elif modality == "image":
        h, w, c = SHAPES["image"]
        x = torch.randint(0, 256, (ROWS, c, h, w), generator=g).float()
    else:
        x = torch.rand(ROWS, *SHAPES[modality], generator=g) * 2 - 1
        if modality == "set":
            x[..., 0] = (x[..., 0] > -0.5).float()
    return {"a": x, "b": x}


@pytest.mark.parametrize(("modality", "name"), [k for k in list_blocks() if k[0] != "fusion"], ids=str)
def test_every_block(modality: str, name: str) -> None:
    seen_by(modality, name, {"block": "concat"})


@pytest.mark.parametrize("name", [name for _, name in list_blocks("fusion")])
def test_every_fusion(name: str) -> None:
    seen_by("vector", "mlp", {"block": name})


def seen_by(modality: str, block: str, fusion: dict[str, Any]) -> None:
    c = one_source(modality)
    data: dict[str, Any] = {"sources": {n: {"block": block} for n in ("a", "b")}, "fusion": fusion}
    if list_blocks("fusion")["fusion", fusion["block"]].conditioned:  # type: ignore[attr-defined]
        data["routing"] = {"condition": "a"}
    torch.manual_seed(0)
    encoder = build(EncoderSpec.parse(data, c), c, TextTable("hash", TEXTS)).eval()
    obs = observations(modality)
    with torch.no_grad():
        plain = encoder(obs)
        with Watch({**dict(encoder.blocks.items()), FUSED: encoder.fusion}) as watch:
            watch.run(encoder, obs, ROWS)
        again = encoder(obs)
    assert torch.equal(plain, again)
    assert torch.allclose(watch.features[FUSED][0], plain, atol=1e-5)
    layers = watch.layers()
    assert list(layers) == ["a", "b", FUSED]
    for part, seen in layers.items():
        assert seen, part
        for layer in seen:
            assert len(layer.mean) >= 2
            assert np.isfinite(layer.mean).all()
            assert (layer.mean <= layer.largest + 1e-5).all()
    uses = _activations(encoder.blocks["a"])
    assert len(layers["a"]) >= uses, "as many as there are activation modules"
    got = measure(Sample({k: torch.cat(v).numpy() for k, v in watch.features.items()}, layers=layers),
                  ["dead_units", "dormant_0.025", "dormant_0.1", "preactivation_norm"])
    for values in got.values():
        assert 0 <= values["dead_units"] <= values["dormant_0.025"] <= values["dormant_0.1"] < 0.9
        assert 0 < values["preactivation_norm"] < 20


def _activations(block: nn.Module) -> int:
    kinds = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.TransformerEncoderLayer)
    return sum(isinstance(m, kinds) for m in block.modules())
