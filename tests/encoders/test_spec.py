"""EncoderSpec: what is wrong is named with its place; what is equal has one hash; what is absent is not used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lacer.encoders import CompositeEncoder, EncoderSpec, FusionConfig, TextTable, build, list_blocks
from lacer.envs import LacerError, Objective, SourceSpec, TaskCard, UnknownNameError, task_card

CARD = task_card("lacer/KnownSources-v0", sources=("position", "trend", "picture", "words", "crowd", "noise"))
GOOD: dict[str, Any] = {
    "sources": {"position": {"block": "mlp", "width": 16, "depth": 1, "activation": "tanh", "norm": True},
                "trend": {"block": "gru", "width": 16}, "words": {"block": "sentence_mlp"}},
    "fusion": {"block": "concat", "width": 32},
}
DEEP = "[" * 900 + "]" * 900


def with_(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one entry, such as ``sources.trend.width``, changed."""
    data = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    here = data
    for p in parents:
        here = here[p]
    here[last] = value
    return data


def without(path: str) -> dict[str, Any]:
    data = with_(path, None)
    *parents, last = path.split(".")
    here = data
    for p in parents:
        here = here[p]
    del here[last]
    return data


def observation(card: TaskCard, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, s in card.sources.items():
        if s.modality == "text":
            out[name] = torch.randint(0, 3, (batch, 1), generator=g).float()
        elif s.modality == "image":
            h, w, c = s.shape
            out[name] = torch.randint(0, 256, (batch, c, h, w), generator=g).float()
        else:
            out[name] = torch.randn(batch, *s.shape, generator=g)
            if s.modality == "set":
                out[name][..., 0] = 1.0
    return out


@pytest.fixture(scope="module")
def table() -> TextTable:
    return TextTable("hash", ["Aim left.", "Go right, please.", ""])


@pytest.mark.parametrize(("data", "says"), [
    (with_("sources.postion", {"block": "mlp"}), ["'postion'", "KnownSources", "did you mean 'position'?", "picture"]),
    (with_("sources.echo", {"block": "mlp"}), ["'echo'", "does not have", "crowd"]),
    (with_("sources.trend.block", "grru"), ["sources.trend", "'grru'", "did you mean 'gru'?", "temporal_conv"]),
    (with_("sources.trend.block", "concat"), ["unknown series block at sources.trend", "'concat'"]),
    (with_("sources.words.block", "sentencemlp"), ["unknown text block at sources.words",
                                                   "did you mean 'sentence_mlp'?"]),
    (with_("fusion.block", "mlp"), ["unknown fusion block at fusion", "'mlp'", "gated_sum"]),
    (with_("sources.position.widht", 16), ["sources.position", "mlp has no field 'widht'", "did you mean 'width'?",
                                           "depth"]),
    (with_("fusion.heads", 2), ["fusion", "concat has no field 'heads'", "width"]),
    (with_("sources.trend.width", 10**6), ["sources.trend.width", "less than or equal to 1024", "1000000"]),
    (with_("sources.trend.width", 0), ["sources.trend.width", "greater than or equal to 1", "'0'"]),
    (with_("sources.trend.width", -16), ["sources.trend.width", "greater than", "'-16'"]),
    (with_("sources.trend.width", "wide"), ["sources.trend.width", "integer", "wide"]),
    (with_("sources.trend.width", 16.5), ["sources.trend.width", "integer", "16.5"]),
    (with_("sources.trend.width", None), ["sources.trend.width", "integer", "None"]),
    (with_("sources.trend.width", [16]), ["sources.trend.width", "integer", "[16]"]),
    (with_("sources.trend.width", {}), ["sources.trend.width", "integer", "{}"]),
    (with_("sources.trend.width", float("nan")), ["sources.trend.width", "finite", "nan"]),
    (with_("sources.trend.width", float("inf")), ["sources.trend.width", "finite", "inf"]),
    (with_("sources.trend.width", 10**5000), ["sources.trend.width"]),
    (with_("sources.trend.width", -(10**5000)), ["sources.trend.width"]),
    (with_("sources.position.activation", "sigmoid"), ["sources.position.activation", "'relu'", "sigmoid"]),
    (with_("sources.position.norm", "perhaps"), ["sources.position.norm", "boolean", "perhaps"]),
    (with_("sources.trend", "gru"), ["sources.trend", "expected an object", "gru"]),
    (with_("sources.trend", None), ["sources.trend", "expected an object", "None"]),
    (with_("sources.trend", [{"block": "gru"}]), ["sources.trend", "expected an object"]),
    (with_("sources.trend", 10**5000), ["sources.trend", "expected an object"]),
    (with_("sources.trend", {}), ["sources.trend", "needs a \"block\"", "gru"]),
    (with_("sources.trend", {"width": 16}), ["sources.trend", "needs a \"block\"", "gru"]),
    (with_("sources.trend.block", 3), ["sources.trend", "needs a \"block\""]),
    (with_("sources.trend.block", ["gru"]), ["sources.trend", "needs a \"block\""]),
    (with_("sources", {}), ["\"sources\"", "at least one", "position"]),
    (with_("sources", []), ["\"sources\"", "at least one"]),
    (without("sources"), ["\"sources\"", "at least one"]),
    (without("fusion"), ["fusion", "expected an object"]),
    (with_("fusion", "concat"), ["fusion", "expected an object", "concat"]),
    (with_("fussion", {}), ["no field 'fussion'", "did you mean 'fusion'?"]),
    ([], ["encoder", "expected an object"]),
    (None, ["encoder", "expected an object"]),
    (7, ["encoder", "expected an object"]),
    ({1: 2}, ["no field '1'"]),
    ({"sources": {1: {"block": "mlp"}}, "fusion": {"block": "concat"}}, ["source '1'"]),
    ("", ["not JSON"]),
    ("{\"sources\": ", ["not JSON"]),
    ("mlp", ["not JSON"]),
    ("null", ["expected an object"]),
    ("[" * 100_000, ["not JSON"]),
    (DEEP, ["expected an object"]),
    (json.dumps(with_("sources.trend.width", 0)).replace(" 0", " " + "9" * 5000), ["not JSON"]),
    (json.dumps(GOOD).replace('{"block": "gru", "width": 16}', DEEP), ["sources.trend", "expected an object"]),
    (json.dumps(with_("sources.trend.width", 0)).replace(" 0", " " + DEEP), ["sources.trend.width"]),
    (json.dumps(with_("sources.trend.width", float("nan"))), ["sources.trend.width", "finite"]),
    (json.dumps(with_("sources.trend.width", 1e400)), ["sources.trend.width", "finite"]),
], ids=lambda v: str(v)[:40] if isinstance(v, list) else "")
def test_a_mistake_is_named_with_its_place(data: Any, says: list[str]) -> None:
    with pytest.raises(LacerError) as e:
        EncoderSpec.parse(data, CARD)
    message = str(e.value)
    assert all(part in message for part in says), message
    assert len(message) < 700, "readable, whatever was given"


def test_an_unknown_block_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError):
        EncoderSpec.parse(with_("sources.trend.block", "lstmm"), CARD)


def test_a_block_that_cannot_be_built_is_named_with_its_place(table: TextTable) -> None:
    for path, where in (("sources.trend", "sources.trend: cannot build attention"), ("fusion", "fusion: cannot build")):
        spec = EncoderSpec.parse(with_(path, {"block": "attention", "width": 16, "heads": 3}), CARD)
        with pytest.raises(LacerError, match=where):
            build(spec, CARD, table)
    with pytest.raises(LacerError, match="text source 'words' and needs a TextTable"):
        build(EncoderSpec.parse(GOOD, CARD), CARD)


def test_round_trip_and_defaults() -> None:
    spec = EncoderSpec.parse(GOOD, CARD)
    assert spec.to_dict()["sources"]["position"] == {**GOOD["sources"]["position"], "dropout": 0.0}
    assert spec.to_dict()["fusion"] == {"block": "concat", "width": 32, "depth": 1, "activation": "relu",
                                        "norm": False, "modality_dropout": 0.0}
    for form in (spec.to_dict(), spec.to_json(), json.dumps(spec.to_dict())):
        again = EncoderSpec.parse(form, CARD)
        assert again == spec
        assert again.hash == spec.hash
        assert hash(again) == hash(spec)
    assert len(spec.hash) == 16
    assert int(spec.hash, 16) >= 0
    assert spec.short() == "position:mlp trend:gru words:sentence_mlp -> concat"
    assert spec.hash in repr(spec)
    assert spec != spec.to_dict()


def shuffled(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict):
        return value
    items = [(k, shuffled(v, rng)) for k, v in value.items()]
    rng.shuffle(items)
    return dict(items)


def test_equal_content_has_one_hash_whatever_the_order_of_keys(table: TextTable) -> None:
    spec = EncoderSpec.parse(GOOD, CARD)
    explicit = spec.to_dict()
    rng = random.Random(0)
    specs = [EncoderSpec.parse(json.dumps(shuffled(explicit, rng)), CARD) for _ in range(10)]
    assert {s.hash for s in specs} == {spec.hash}
    assert {s.to_json() for s in specs} == {spec.to_json()}
    assert {tuple(s.sources) for s in specs} == {("position", "trend", "words")}, "the task's order, hence one network"
    torch.manual_seed(0)
    a = build(specs[0], CARD, table)(observation(CARD, 2))
    torch.manual_seed(0)
    assert torch.equal(build(specs[1], CARD, table)(observation(CARD, 2)), a)


def test_different_content_has_different_hashes() -> None:
    changed = [GOOD, with_("sources.trend.width", 32), with_("fusion.width", 64), without("sources.trend"),
               with_("sources.position.norm", False), with_("sources.noise", {"block": "linear"}),
               with_("fusion", {"block": "gated_sum"})]
    assert len({EncoderSpec.parse(d, CARD).hash for d in changed}) == len(changed)
    assert len({EncoderSpec.parse(d, CARD) for d in [*changed, *changed]}) == len(changed)


def test_the_hash_is_the_same_in_every_version() -> None:
    """Studies store it: it may change only with the blocks' fields."""
    assert EncoderSpec.parse({"sources": {"noise": {"block": "linear", "width": 8}},
                              "fusion": {"block": "gated_sum", "width": 16}}, CARD).hash == "0c9eb9a06de10195"


def routed(data: dict[str, Any]) -> dict[str, Any]:
    """The spec with a source that conditions the fusion, if it wants one."""
    conditioned = cast(type[FusionConfig], list_blocks()["fusion", data["fusion"]["block"]]).conditioned
    return {**data, "routing": {"condition": "position"}} if conditioned else data


@pytest.mark.parametrize("fusion", [k[1] for k in list_blocks("fusion")])
def test_absent_sources_are_not_used(fusion: str, table: TextTable) -> None:
    spec = EncoderSpec.parse(routed(with_("fusion", {"block": fusion})), CARD)
    torch.manual_seed(0)
    net = build(spec, CARD, table)
    obs = observation(CARD, 5)
    for name in ("position", "trend", "picture", "crowd", "noise"):
        obs[name].requires_grad_()
    out = net(obs)
    assert out.shape == (5, net.dim)
    out.square().sum().backward()
    assert set(net.encode(obs)) == {"position", "trend", "words"}
    for name in ("position", "trend"):
        grad = obs[name].grad
        assert grad is not None
        assert grad.abs().sum() > 0
    assert all(obs[name].grad is None for name in ("picture", "crowd", "noise"))
    assert torch.equal(net({k: obs[k] for k in ("position", "trend", "words")}), out), "they need not even be there"
    assert not torch.equal(net({**obs, "words": (obs["words"] + 1) % 3}), out)


@pytest.mark.parametrize("fusion", [k[1] for k in list_blocks("fusion")])
def test_parameters_by_module_add_up(fusion: str, table: TextTable) -> None:
    data = {"sources": {n: {"block": next(b for m, b in list_blocks(s.modality))} for n, s in CARD.sources.items()},
            "fusion": {"block": fusion}}
    net = build(EncoderSpec.parse(routed(data), CARD), CARD, table)
    counts = net.parameters_by_module()
    assert list(counts) == [*CARD.sources, "fusion"]
    assert all(v > 0 for v in counts.values())
    assert sum(counts.values()) == sum(p.numel() for p in net.parameters())
    assert net(observation(CARD, 1)).shape == (1, net.dim)


def test_parameters_of_a_hand_counted_encoder() -> None:
    spec = EncoderSpec.parse({"sources": {"noise": {"block": "mlp", "width": 16, "depth": 2}},
                              "fusion": {"block": "concat", "width": 32, "depth": 1}}, CARD)
    counts = build(spec, CARD).parameters_by_module()
    assert counts == {"noise": (4 * 16 + 16) + (16 * 16 + 16), "fusion": 16 * 32 + 32}


def test_sources_named_like_parts_of_the_network(table: TextTable) -> None:
    """Names of sources are the environment's; torch reserves some for its modules."""
    box = spaces.Box(-1, 1, (3,), np.float32)

    def network(name: str) -> CompositeEncoder:
        card = TaskCard("x", {name: SourceSpec(name, "vector", box, "Numbers.")}, box, Objective("m"), "A task.")
        data = {"sources": {name: {"block": "linear"}}, "fusion": {"block": "gated_sum"}}
        return build(EncoderSpec.parse(data, card), card, table)

    for name in ("2", "größe", "left camera", "scale", "blocks"):
        assert network(name)({name: torch.zeros(2, 3)}).shape == (2, 64)
    for name in ("forward", "values"):
        with pytest.raises(LacerError, match=f"sources.{name}: cannot build"):
            network(name)


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my encoder.json"
    path.write_text(EncoderSpec.parse(GOOD, CARD).to_json(), encoding="utf-8")
    assert EncoderSpec.load(path, CARD) == EncoderSpec.parse(GOOD, CARD)
    assert EncoderSpec.load(str(path), CARD) == EncoderSpec.parse(GOOD, CARD)
    for content, says in ((b"{", "not JSON"), (b"\xff\xfe\x00", "cannot read"), (b"", "not JSON"),
                          (json.dumps(with_("fusion.block", "conkat")).encode(), "did you mean 'concat'?")):
        path.write_bytes(content)
        with pytest.raises(LacerError, match=r"my encoder\.json") as e:
            EncoderSpec.load(path, CARD)
        assert says in str(e.value)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(LacerError, match="cannot read the encoder file") as e:
            EncoderSpec.load(missing, CARD)
        assert str(missing) in str(e.value)
