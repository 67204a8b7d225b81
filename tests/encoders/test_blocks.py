"""Every registered block: a new one is tested by being registered."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lacer.encoders import FUSION, BlockConfig, Features, FusionConfig, choice, list_blocks, parse_block, register_block
from lacer.encoders import blocks as builtin
from lacer.encoders import registry as registry_module
from lacer.encoders.composite import InputScale
from lacer.encoders.layers import masked_mean, sinusoid
from lacer.encoders.text import MAX_TOKENS
from lacer.envs import MODALITIES, LacerError, SourceSpec

ALL = list_blocks()
SOURCES = {k: c for k, c in ALL.items() if k[0] != FUSION}
FUSIONS = {k: c for k, c in ALL.items() if k[0] == FUSION}
SETS = [c for k, c in ALL.items() if k[0] == "set"]
EMBEDDING = 24
# Several shapes of each modality: odd, small and large ones among them.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "vector": [(1,), (7,), (64,)], "series": [(1, 1), (5, 3), (12, 2)], "set": [(1, 2), (6, 3), (20, 5)],
    "image": [(16, 16, 3), (33, 17, 1), (64, 64, 4)], "text": [(EMBEDDING,)],
}


def name(key_or_config: Any) -> str:
    return "-".join(key_or_config) if isinstance(key_or_config, tuple) else str(key_or_config)


def samples(cls: type[BlockConfig], n: int, seed: int = 0) -> list[BlockConfig]:
    """The default, and distinct random choices that can be built."""
    rng = np.random.default_rng(seed)
    out = [cls()]
    for _ in range(20 * n):
        c = cls(**{k: v[rng.integers(len(v))] for k, v in cls.choices().items()})
        if c not in out and buildable(c):
            out.append(c)
        if len(out) > n:
            break
    return out


def buildable(c: BlockConfig) -> bool:
    try:
        make(c)
    except LacerError:
        return False
    return True


def make(c: BlockConfig, shape: tuple[int, ...] | None = None) -> nn.Module:
    """The block, in evaluation mode: without dropout."""
    torch.manual_seed(0)
    if isinstance(c, FusionConfig):
        return make_fusion(c, {"a": 8, "b": 5})
    return c.build(shape or SHAPES[c.modality][1 if len(SHAPES[c.modality]) > 1 else 0]).eval()


def make_fusion(c: BlockConfig, dims: dict[str, int]) -> nn.Module:
    """The fusion, conditioned by the first source if it wants one, in evaluation mode."""
    assert isinstance(c, FusionConfig)
    return c.build_routed(dims, next(iter(dims)) if c.conditioned else None).eval()


def inputs(c: BlockConfig, shape: tuple[int, ...], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a source block as the composite encoder gives them: scaled, images channels first."""
    g = torch.Generator().manual_seed(seed)
    if c.modality == "image":
        h, w, ch = shape
        return (torch.rand(batch, ch, h, w, generator=g),)
    if c.modality == "text" and c.text_level == "token":
        mask = torch.arange(MAX_TOKENS)[None] < torch.randint(1, 9, (batch, 1), generator=g)
        return torch.randn(batch, MAX_TOKENS, *shape, generator=g) * mask.unsqueeze(-1), mask
    x = torch.randn(batch, *shape, generator=g)
    if c.modality == "set":
        x[..., 0] = (torch.arange(shape[0])[None] < torch.randint(1, shape[0] + 1, (batch, 1), generator=g)).float()
        x = x * x[..., :1]
    return (x,)


def features(dims: dict[str, int], batch: int, masked: bool = True) -> dict[str, Features]:
    """Features of sources as blocks give them: one token, several, several with a mask."""
    g = torch.Generator().manual_seed(1)
    out = {}
    for i, (source, d) in enumerate(dims.items()):
        n = (1, 4, 3)[i % 3]
        mask = torch.rand(batch, n, generator=g) > 0.4 if masked and i % 3 == 2 else None
        out[source] = Features(torch.randn(batch, d, generator=g, requires_grad=True),
                               torch.randn(batch, n, d, generator=g, requires_grad=True), mask)
    return out


def loss(module: nn.Module, out: Features | Tensor) -> Tensor:
    """A scalar that depends on all of the output, differently on each number."""
    parts = [out] if isinstance(out, Tensor) else [out.vector, out.tokens]
    g = torch.Generator().manual_seed(2)
    return torch.stack([(p * torch.randn(p.shape, generator=g)).sum() for p in parts]).sum()


def test_every_modality_has_blocks_and_a_choice_of_fusions() -> None:
    assert {m for m, _ in SOURCES} == set(MODALITIES)
    assert len(FUSIONS) >= 2
    assert list(ALL) == sorted(ALL)
    assert list_blocks("text") == {k: c for k, c in ALL.items() if k[0] == "text"}


@pytest.mark.parametrize("key", ALL, ids=name)
def test_declaration(key: tuple[str, str]) -> None:
    cls = ALL[key]
    assert (cls.modality, cls().block) == key
    summary = cls.summary()
    assert "\n" not in summary
    assert summary.endswith(".")
    assert len(summary.split()) >= 4, "the language model reads it"
    assert cls.__doc__ != BlockConfig.__doc__
    assert cls.text_level in ("sentence", "token")
    assert set(cls.choices()) == set(cls.model_fields) - {"block"}, "every hyper-parameter is searchable"
    for field, options in cls.choices().items():
        assert cls.model_fields[field].description
        assert len(options) == len({json.dumps(o) for o in options}) >= 2
        assert cls.model_fields[field].default in options
        for option in options:
            data = {"block": key[1], field: option}
            if field in cls.conditions():  # else it is set to its default
                other, values = cls.conditions()[field]
                data[other] = values[0]
            assert getattr(parse_block(key[0], json.loads(json.dumps(data)), "here"), field) == option


@pytest.mark.parametrize("key", ALL, ids=name)
def test_json_round_trip(key: tuple[str, str]) -> None:
    for c in samples(ALL[key], 4):
        assert parse_block(key[0], json.loads(c.model_dump_json()), "here") == c
        assert parse_block(key[0], c, "here") == c
        assert c.short().startswith(key[1] + "(")
        assert hash(c) == hash(type(c)(**c.model_dump()))
        with pytest.raises(ValueError, match="frozen"):
            c.block = "other"


@pytest.mark.parametrize("key", ALL, ids=name)
def test_every_option_of_every_field_builds(key: tuple[str, str]) -> None:
    """Each option works with at least one choice of the others, so the search space has no dead entry."""
    cls = ALL[key]
    for field, options in cls.choices().items():
        others = {k: v for k, v in cls.choices().items() if k != field}
        for option in options:
            if buildable(cls(**{field: option})):
                continue
            assert any(buildable(cls(**{field: option}, **dict(zip(others, rest, strict=True))))
                       for rest in itertools.product(*others.values())), (field, option)


@pytest.mark.parametrize("key", SOURCES, ids=name)
def test_source_block_shapes_gradients_and_precision(key: tuple[str, str]) -> None:
    for i, c in enumerate(samples(SOURCES[key], 3)):
        for shape in SHAPES[key[0]] if i == 0 else SHAPES[key[0]][:1]:
            module = make(c, shape)
            dim = int(module.dim)
            for batch in (1, 5):
                x = inputs(c, shape, batch)
                out = module(*x)
                assert isinstance(out, Features)
                assert out.vector.shape == (batch, dim)
                assert out.tokens.shape[0] == batch
                assert out.tokens.shape[2] == dim
                assert out.mask is None or (out.mask.shape == out.tokens.shape[:2] and out.mask.dtype == torch.bool)
                assert out.vector.isfinite().all()
                assert out.tokens.isfinite().all()
                # a sample's features do not depend on its neighbours in the batch
                torch.testing.assert_close(module(*(t[:1] for t in x)).vector, out.vector[:1], atol=1e-5, rtol=1e-4)
            loss(module, out).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
            with torch.autocast("cpu", torch.bfloat16):
                half = module(*x)
                loss(module, half).backward()
            assert half.vector.isfinite().all()
            assert half.tokens.isfinite().all()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
            torch.testing.assert_close(half.vector.float(), out.vector, atol=0.1, rtol=0.2)


@pytest.mark.parametrize("key", SOURCES, ids=name)
def test_every_parameter_of_a_source_block_learns(key: tuple[str, str]) -> None:
    for c in samples(SOURCES[key], 3):
        shape = SHAPES[key[0]][-1]
        module = make(c, shape)
        loss(module, module(*inputs(c, shape, 32))).backward()
        idle = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not idle, (c.short(), idle)


@pytest.mark.parametrize("key", SOURCES, ids=name)
def test_output_depends_on_the_input(key: tuple[str, str]) -> None:
    c = SOURCES[key]()
    shape = SHAPES[key[0]][-1]
    module = make(c, shape)
    a, b = (module(*inputs(c, shape, 4, seed)).vector for seed in (0, 1))
    assert (a - b).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("key", ALL, ids=name)
def test_same_seed_same_network(key: tuple[str, str]) -> None:
    c = ALL[key]()
    one, two = make(c), make(c)
    assert list(one.state_dict()) == list(two.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("cls", SETS, ids=lambda c: c().block)
def test_padding_of_a_set_changes_nothing(cls: type[BlockConfig]) -> None:
    """Neither the content of the padding, nor its amount, nor the order of the elements."""
    for c in samples(cls, 3):
        module = make(c, (6, 3)).eval()
        x = inputs(c, (6, 3), 8)[0]
        x[0, :, 0] = 0.0  # one set is empty
        want = module(x)
        junk = torch.where(x[..., :1] > 0.5, x, torch.tensor([0.0, 7e3, -7e3]))
        got = module(junk)
        torch.testing.assert_close(got.vector, want.vector)
        torch.testing.assert_close(got.tokens[want.mask], want.tokens[want.mask])
        more = module(torch.cat([x, torch.zeros(8, 9, 3)], 1))
        torch.testing.assert_close(more.vector, want.vector, atol=1e-5, rtol=1e-4)
        turned = module(x.flip(1))
        torch.testing.assert_close(turned.vector, want.vector, atol=1e-5, rtol=1e-4)
        assert (want.vector[1:] - want.vector[:1]).abs().amax(1).min() > 1e-4, "an empty set is not like the others"


@pytest.mark.parametrize("cls", SETS, ids=lambda c: c().block)
def test_empty_sets_are_finite_forward_and_backward(cls: type[BlockConfig]) -> None:
    module = make(cls(), (4, 3))
    out = module(torch.zeros(3, 4, 3))
    assert out.mask is not None
    assert not out.mask.any()
    loss(module, out).backward()
    assert out.vector.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_nan_in_the_padding_of_a_set_does_not_reach_the_network() -> None:
    space = spaces.Box(np.array([[0, -np.inf, -2]] * 3, np.float32), np.array([[1, np.inf, 2]] * 3, np.float32))
    scale = InputScale(SourceSpec("crowd", "set", space, "Elements."))
    x = torch.tensor([[[1.0, 5.0, 1.0], [0.0, torch.nan, torch.inf], [1.0, 0.0, -2.0]]], requires_grad=True)
    out = scale(x)
    want = [[1.0, math.log1p(5), 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
    torch.testing.assert_close(out[0], torch.tensor(want))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("low", "high", "x", "want"), [
    (0.0, 10.0, 10.0, 1.0), (0.0, 10.0, 0.0, -1.0), (0.0, 10.0, 5.0, 0.0), (-4.0, 4.0, 2.0, 0.5),
    (-np.inf, np.inf, 1e6, math.log1p(1e6)), (0.0, np.inf, -3.0, -math.log1p(3)), (-1e9, 1e9, 1.0, math.log(2)),
    (2.0, 2.0, 2.0, math.log(3)),
])
def test_input_scale(low: float, high: float, x: float, want: float) -> None:
    scale = InputScale(SourceSpec("s", "vector", spaces.Box(low, high, (2,), np.float64), "Numbers."))
    torch.testing.assert_close(scale(torch.tensor([[x, x]])), torch.tensor([[want, want]]))


def test_input_scale_of_images() -> None:
    scale = InputScale(SourceSpec("i", "image", spaces.Box(0, 255, (2, 2, 3), np.uint8), "A picture."))
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(scale(x)[0, :, 0, 0], torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("key", [k for k, c in SOURCES.items() if c.text_level == "token"], ids=name)
def test_token_blocks_ignore_what_the_mask_hides(key: tuple[str, str]) -> None:
    c = SOURCES[key]()
    module = make(c, (EMBEDDING,))
    x, mask = inputs(c, (EMBEDDING,), 4)
    mask[0] = False  # an empty text
    want = module(x, mask)
    got = module(torch.where(mask.unsqueeze(-1), x, 9.0), mask)
    torch.testing.assert_close(got.vector[1:], want.vector[1:])
    assert got.vector.isfinite().all()
    torch.testing.assert_close(got.vector[0], want.vector[0])


@pytest.mark.parametrize("key", [k for k in SOURCES if k[0] == "series"], ids=name)
def test_series_blocks_know_the_order_of_time(key: tuple[str, str]) -> None:
    c = SOURCES[key]()
    module = make(c, (5, 3))
    x = inputs(c, (5, 3), 4)[0]
    assert (module(x).vector - module(x.flip(1)).vector).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("key", FUSIONS, ids=name)
@pytest.mark.parametrize("dims", [{"a": 8}, {"a": 8, "b": 5}, {"a": 8, "b": 5, "c": 16}, {"c": 3, "a": 3, "b": 3},
                                  {f"s{i}": 4 + i for i in range(9)}], ids=lambda d: "+".join(d))
def test_fusion_of_any_number_of_sources(key: tuple[str, str], dims: dict[str, int]) -> None:
    for c in samples(FUSIONS[key], 2):
        torch.manual_seed(0)
        module = make_fusion(c, dims)
        for batch in (1, 6):
            given = features(dims, batch)
            out = module(given)
            assert out.shape == (batch, int(module.dim))
            assert out.isfinite().all()
        loss(module, out).backward()
        for source, f in given.items():
            assert f.vector.grad is not None, source
            assert f.vector.grad.abs().sum() > 0, source
        idle = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        if len(dims) == 1:  # a single source gets the whole weight, so there is no gate to learn
            idle = [n for n in idle if not n.startswith("gate.")]
        assert not idle, (c.short(), idle)
        with torch.autocast("cpu", torch.bfloat16):
            half = module(given)
        torch.testing.assert_close(half.float(), out, atol=0.1, rtol=0.2)


@pytest.mark.parametrize("key", FUSIONS, ids=name)
def test_fusion_ignores_masked_tokens(key: tuple[str, str]) -> None:
    dims = {"a": 4, "b": 5, "c": 6}
    module = make_fusion(FUSIONS[key](), dims)
    given = features(dims, 4)
    f = given["c"]
    assert f.mask is not None
    other = {**given, "c": f._replace(tokens=torch.where(f.mask.unsqueeze(-1), f.tokens, torch.tensor(50.0)))}
    torch.testing.assert_close(module(other), module(given), atol=1e-5, rtol=1e-4)
    none = {**given, "c": f._replace(mask=torch.zeros_like(f.mask))}
    assert module(none).isfinite().all()


PAIRS = list(itertools.product(SOURCES, FUSIONS))


@pytest.mark.parametrize(("source", "fusion"), PAIRS, ids=name)
def test_every_block_with_every_fusion(source: tuple[str, str], fusion: tuple[str, str]) -> None:
    a, b = SOURCES[source](), SOURCES["vector", "linear"]()
    shape = SHAPES[source[0]][0]
    torch.manual_seed(0)
    one, two = a.build(shape), b.build((3,))
    module = make_fusion(FUSIONS[fusion](), {"one": int(one.dim), "two": int(two.dim)})
    out = module({"one": one(*inputs(a, shape, 3)), "two": two(torch.randn(3, 3))})
    assert out.shape == (3, int(module.dim))
    out.sum().backward()
    assert out.isfinite().all()


@pytest.mark.parametrize("key", [k for k in ALL if "heads" in ALL[k].model_fields], ids=name)
def test_a_width_that_heads_do_not_divide_is_refused(key: tuple[str, str]) -> None:
    with pytest.raises(LacerError, match="not divisible by heads 3"):
        make(ALL[key](heads=3))


def test_masked_mean() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]]])
    torch.testing.assert_close(masked_mean(x, torch.tensor([[True, True, False]])), torch.tensor([[2.0, 4.0]]))
    torch.testing.assert_close(masked_mean(x, torch.zeros(1, 3, dtype=torch.bool)), torch.zeros(1, 2))
    torch.testing.assert_close(masked_mean(x, None), x.mean(1))


@pytest.mark.parametrize("width", [1, 5, 8])
def test_sinusoid_positions_differ(width: int) -> None:
    p = sinusoid(12, width)
    assert p.shape == (12, width)
    assert torch.pdist(p).min() > 1e-3


@pytest.fixture
def clean_registry() -> Any:
    before = dict(registry_module._BLOCKS)
    yield
    registry_module._BLOCKS.clear()
    registry_module._BLOCKS.update(before)


@pytest.mark.usefixtures("clean_registry")
def test_a_name_taken_twice_warns_and_names_both_origins() -> None:
    def define(module: str) -> type[BlockConfig]:
        class Mine(BlockConfig):
            """A block of a plug-in that does nothing new."""

            modality: ClassVar[str] = "vector"
            block: Literal["mlp"] = "mlp"
            width: int = choice(4, (4, 8), "units")

        Mine.__module__ = module
        return Mine

    with pytest.warns(UserWarning, match=r"vector block 'mlp' of lacer\.encoders\.blocks\.vector_mlp is replaced by "
                                         r"that of first\.plugin") as caught:
        register_block(define("first.plugin"))
    assert caught[0].filename == __file__
    assert list_blocks()["vector", "mlp"].__module__ == "first.plugin"
    with pytest.warns(UserWarning, match=r"of first\.plugin is replaced by that of second\.plugin"):
        register_block(define("second.plugin"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_block(define("second.plugin"))  # a module imported anew


@pytest.mark.usefixtures("clean_registry")
def test_a_registered_block_is_found_at_once() -> None:
    @register_block
    class Mine(BlockConfig):
        """A block of a plug-in that does nothing new."""

        modality: ClassVar[str] = "vector"
        block: Literal["mine"] = "mine"
        width: int = choice(4, (4, 8), "units")

    assert isinstance(parse_block("vector", {"block": "mine", "width": 8}, "here"), Mine)
    assert ("vector", "mine") in list_blocks("vector")


@pytest.mark.usefixtures("clean_registry")
def test_wrong_declarations() -> None:
    with pytest.raises(ValueError, match=r"default 3 is not among \(1, 2\)"):
        choice(3, (1, 2), "x")
    with pytest.raises(TypeError, match="Nameless needs"):
        @register_block
        class Nameless(BlockConfig):
            """A block without a name of its own."""

            modality: ClassVar[str] = "vector"


def test_a_module_of_blocks_is_found_by_being_there() -> None:
    """The library is what lies in the folder: no list to forget."""
    homes = {c.__module__.rsplit(".", 1)[-1] for c in ALL.values()}
    assert homes == {p.stem for p in Path(builtin.__path__[0]).glob("*.py")} - {"__init__"}
