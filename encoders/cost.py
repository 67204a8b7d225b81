"""What an encoder costs: parameters and FLOPs predicted before anything is allocated, and measured latency.

The prediction builds the network on torch's ``meta`` device, where tensors have shapes and no memory, and sends one
observation through it, so it holds for every block, those of other packages included. A block that looks at values
while it is built or run cannot do that; it alone makes the prediction build the encoder for real.

FLOPs are those of torch's own counter: a multiplication and an addition are two; matrix products, convolutions and
attention count, element-wise operations, pooling and FFTs do not. The counter misses fused kernels of the CPU (LSTM,
attention); here they count as what they compute.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lacer.encoders.composite import CompositeEncoder
from lacer.encoders.registry import FUSION, Features
from lacer.encoders.spec import EncoderSpec
from lacer.encoders.text import MAX_TOKENS, MINILM, HashingModel, TextTable, text_model
from lacer.envs import LacerError, TaskCard

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModuleCost:
    """Cost of one module.

    Attributes:
        name: a source's name or ``fusion``; further down, the name of the torch module in its parent.
        kind: the block's name; further down, the class of the torch module.
        inputs, outputs: shapes of the tensors that go in and come out, without the batch. A source block gives its
            vector and, if it has more than that one, its tokens. Empty for modules that are not called themselves.
        parameters: trainable parameters.
        flops: for one observation.
        children: the modules inside.
    """

    name: str
    kind: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    parameters: int
    flops: int
    children: tuple[ModuleCost, ...] = ()


@dataclass(frozen=True)
class EncoderCost:
    """Predicted cost of an encoder, module by module: the sources in order, then ``fusion``."""

    modules: tuple[ModuleCost, ...]

    @property
    def parameters(self) -> int:
        """Trainable parameters of the whole encoder."""
        return sum(m.parameters for m in self.modules)

    @property
    def flops(self) -> int:
        """FLOPs that encoding one observation takes."""
        return sum(m.flops for m in self.modules)

    @property
    def by_name(self) -> dict[str, ModuleCost]:
        """The modules by name."""
        return {m.name: m for m in self.modules}


def predict(spec: EncoderSpec, card: TaskCard, text: str | int = MINILM) -> EncoderCost:
    """Parameters, FLOPs and shapes of an encoder, without building it.

    Args:
        spec: the encoder.
        card: its task.
        text: name of the frozen text model, whose cost is not counted (it embeds each string once), or the width of
            its embeddings.

    Raises:
        LacerError: if the encoder cannot be built for this task.
    """
    width = text_width(text)
    try:
        return _count(_build(spec, card, width, "meta"), card)
    except Exception:  # whatever a block that needs values raises; one that cannot be built at all fails again below
        encoder = _build(spec, card, width, "cpu")
        with unfused():
            return _count(encoder, card)


def predict_parameters(spec: EncoderSpec, card: TaskCard, text: str | int = MINILM) -> dict[str, int]:
    """Trainable parameters by module, without building the encoder; arguments as in :func:`predict`."""
    width = text_width(text)
    try:
        encoder = _build(spec, card, width, "meta")
    except LacerError:
        encoder = _build(spec, card, width, "cpu")
    return {name: _parameters(module) for name, module in _parts(encoder).items()}


def measure_latency(spec: EncoderSpec, card: TaskCard, text: str | int = MINILM, repeats: int = 30) -> dict[str, float]:
    """Milliseconds that encoding one observation takes on one CPU thread, by module; ``other`` is what lies between.

    The median of ``repeats`` runs in inference mode. It is the thread's own CPU time, so that other work on the
    machine disturbs little; the frozen text model is not part of it. Arguments as in :func:`predict`.
    """
    encoder = _build(spec, card, text_width(text), "cpu")
    obs = observation(card, spec.sources)
    times: dict[str, list[float]] = {name: [] for name in [*_parts(encoder), "other"]}
    begun: dict[str, float] = {}
    threads = torch.get_num_threads()

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun[name] = time.thread_time()
        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            times[name].append(time.thread_time() - begun[name])
        return hook

    for name, module in _parts(encoder).items():
        module.register_forward_pre_hook(before(name))
        module.register_forward_hook(after(name))
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for i in range(repeats + 3):
                start = time.thread_time()
                encoder(obs)
                total = time.thread_time() - start
                times["other"].append(total - sum(t[-1] for n, t in times.items() if n != "other"))
                if i < 3:  # the first runs find cold caches
                    for t in times.values():
                        t.clear()
    finally:
        torch.set_num_threads(threads)
    return {name: 1000 * statistics.median(t) for name, t in times.items()}


def observation(card: TaskCard, names: Any = None, batch: int = 1, device: str = "cpu") -> dict[str, Tensor]:
    """Random input of an encoder: by source, in the layout that :class:`CompositeEncoder` takes."""
    out: dict[str, Tensor] = {}
    for name in card.sources if names is None else names:
        source = card.sources[name]
        if source.modality == "text":
            out[name] = torch.zeros(batch, 1, device=device)
        elif source.modality == "image":
            h, w, c = source.shape
            out[name] = torch.rand(batch, c, h, w, device=device) * 255
        else:
            out[name] = torch.rand(batch, *source.shape, device=device)
            if source.modality == "set":
                out[name][..., 0] = 1.0
    return out


def text_width(text: str | int) -> int:
    """Width of the embeddings of a text model; the known ones are not loaded for it."""
    if isinstance(text, int):
        return text
    known = {"hash": HashingModel.dim, MINILM: 384}
    return known[text] if text in known else text_model(text).dim


class StandInTable(TextTable):
    """A text table of a given width whose embeddings are noise; for looking at costs, not at meanings."""

    def __init__(self, width: int) -> None:
        super().__init__("hash")
        self._width = width

    @property
    def dim(self) -> int:
        return self._width

    def sentence(self, index: Tensor) -> Tensor:
        return torch.rand(len(index), self._width, device=index.device)

    def tokens(self, index: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(len(index), MAX_TOKENS, dtype=torch.bool, device=index.device)
        return torch.rand(len(index), MAX_TOKENS, self._width, device=index.device), mask


def _build(spec: EncoderSpec, card: TaskCard, width: int, device: str) -> CompositeEncoder:
    with torch.device(device):
        return CompositeEncoder(spec, card, StandInTable(width)).eval()


def _parts(encoder: CompositeEncoder) -> dict[str, nn.Module]:
    return {**dict(encoder.blocks.items()), FUSION: encoder.fusion}


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------- counting

@dataclass
class _Seen:
    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    flops: int = 0
    starts: list[int] = field(default_factory=list)


def _count(encoder: CompositeEncoder, card: TaskCard) -> EncoderCost:
    """Cost of a built encoder, on its own device."""
    seen: dict[nn.Module, _Seen] = {}
    counter = _Counter()

    def before(module: nn.Module, *_: Any) -> None:
        seen.setdefault(module, _Seen()).starts.append(counter.flops)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        s = seen[module]
        s.inputs, s.outputs = _shapes(args), _shapes(out)
        s.flops += counter.flops - s.starts.pop()

    hooks = []
    for module in encoder.modules():
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    device = next((str(p.device) for p in encoder.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.device(device), _Shortcuts(counter), counter:
            encoder(observation(card, encoder.spec.sources, device=device))
    finally:
        for h in hooks:
            h.remove()

    def cost(name: str, module: nn.Module, kind: str = "") -> ModuleCost:
        children = tuple(cost(n, m) for n, m in module.named_children())
        s = seen.get(module) or _Seen(flops=sum(c.flops for c in children))  # not called itself: a list of modules
        return ModuleCost(name, kind or type(module).__name__, s.inputs, s.outputs, _parameters(module), s.flops,
                          children)

    spec = encoder.spec
    return EncoderCost(tuple(cost(n, m, spec.sources[n].block if n in spec.sources else spec.fusion.block)
                             for n, m in _parts(encoder).items()))


def _shapes(value: Any) -> tuple[Shape, ...]:
    """Shapes of the tensors in a value, without the batch."""
    if isinstance(value, Tensor):
        return (tuple(value.shape[1:]),)
    if isinstance(value, Features):
        tokens = tuple(value.tokens.shape[1:])
        vector = tuple(value.vector.shape[1:])
        return (vector,) if tokens == (1, *vector) else (vector, tokens)
    if isinstance(value, dict):
        value = list(value.values())
    return tuple(s for v in value for s in _shapes(v)) if isinstance(value, tuple | list) else ()


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of every operation by torch's formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


_SAME_SHAPE = frozenset({"relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "exp", "log1p", "abs", "sign", "sin",
                         "cos", "layer_norm", "dropout", "softmax", "clamp"})
_BROADCAST = frozenset({"add", "__radd__", "sub", "__rsub__", "mul", "__rmul__", "div", "__rdiv__", "masked_fill"})
_RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})


class _Shortcuts(TorchFunctionMode):
    """The commonest functions on meta tensors, by formula.

    It changes no result, only the time: torch's own rules for the meta device are Python and take up to a millisecond
    an operation, and recurrent layers run through them step by step. What is not here goes the normal way.
    """

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta and "out" not in kwargs and "dtype" not in kwargs:
            done = self._shortcut(getattr(func, "__name__", ""), args, kwargs)
            if done is not None:
                return done
        return func(*args, **kwargs)

    def _shortcut(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0]
        if name in _SAME_SHAPE and x.is_floating_point():
            return x.new_empty(x.shape)
        if name in _BROADCAST:
            tensors = [a for a in args if isinstance(a, Tensor)]
            if all(t.is_meta and t.is_floating_point() | (t.dtype == torch.bool) for t in tensors) \
                    and x.is_floating_point():
                return x.new_empty(torch.broadcast_shapes(*(t.shape for t in tensors)))
        elif name == "linear":
            self.counter.flops += 2 * math.prod(x.shape[:-1]) * args[1].numel()
            return x.new_empty(*x.shape[:-1], args[1].shape[0])
        elif name == "scaled_dot_product_attention":
            key, value = args[1:3]
            self.counter.flops += 2 * math.prod(x.shape[:-1]) * key.shape[-2] * (x.shape[-1] + value.shape[-1])
            return x.new_empty(*x.shape[:-1], value.shape[-1])
        elif name == "multi_head_attention_forward" and x.dim() == 3 and args[7] is None and not args[9]:
            return self._attention(args, kwargs)
        elif name in _RECURRENT and len(args) == 9 and args[8]:  # padded, batch first
            states = args[1] if name == "lstm" else (args[1],)
            self.counter.flops += math.prod(x.shape[:2]) * sum(2 * w.numel() for w in args[2] if w.dim() == 2)
            return (x.new_empty(*x.shape[:2], states[0].shape[-1] * (2 if args[7] else 1)), *states)
        return None

    def _attention(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        query, key = args[:2]
        (steps, batch, width), other = query.shape, key.shape[0]
        if kwargs.get("use_separate_proj_weight"):
            q, k, v = (kwargs[f"{n}_proj_weight"].numel() for n in "qkv")
        else:
            q = k = v = width * width
        self.counter.flops += 2 * batch * (steps * q + other * (k + v) + 2 * steps * other * width
                                           + steps * args[11].numel())
        if not kwargs.get("need_weights", True):
            return torch.empty_like(query), None
        heads = () if kwargs.get("average_attn_weights", True) else (args[4],)
        return torch.empty_like(query), query.new_empty(batch, *heads, steps, other)


@contextmanager
def unfused() -> Iterator[None]:
    """A context without fused CPU kernels, in which torch's own FLOP counter sees all that is computed."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False),
              torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
