"""What a probe is, what it looks at, and which ones there are."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from lacer.envs import UnknownNameError

FUSED = "fused"
"""Name of the fused state among the parts."""

Values = Mapping[str, Mapping[str, float]]
"""By part: the probe's value under "", and single ones (of a state variable, of another source) by their names."""

Need = Literal["layers", "permuted", "gradient", "permuted_return"]
T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """One application of an activation function, summed up over a batch.

    Attributes:
        mean: (units,) mean absolute output.
        largest: (units,) largest absolute output.
        rms_in: root mean square of the inputs, the pre-activations.
    """

    mean: np.ndarray
    largest: np.ndarray
    rms_in: float


@dataclass
class Sample:
    """Rows of an agent's experience and what the agent made of them. A probe of data that are not here gives nothing.

    Attributes:
        features: by part (the used sources, and ``fused``), (N, D).
        state: privileged variables of the environment by name, (N,).
        reward, returns: (N,) reward of the step and return from it on.
        action: greedy actions, (N, A); integers where actions are discrete.
        groups: (N,) episode of each row.
        layers: by part, the activations of its network in the order of their application.
        permuted: by source, how much the actions and the values change when its features are permuted across rows.
        gradient: by part, the norm of the PPO loss's gradient in its parameters (``fused``: in the fusion's).
        permuted_return: by source, mean return lost when it shows what it showed at another moment.
    """

    features: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray] = field(default_factory=dict)
    reward: np.ndarray | None = None
    returns: np.ndarray | None = None
    action: np.ndarray | None = None
    groups: np.ndarray | None = None
    layers: Mapping[str, list[Layer]] = field(default_factory=dict)
    permuted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    gradient: Mapping[str, float] = field(default_factory=dict)
    permuted_return: dict[str, float] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def sources(self) -> list[str]:
        """The parts that are sources."""
        return [n for n in self.features if n != FUSED]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make()`` gives, made once: several probes share intermediate results."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


@dataclass(frozen=True)
class Probe:
    """A registered probe.

    Attributes:
        name: under which values are stored.
        meaning: one line for reports and prompts: what high and low mean, what to try.
        compute: values by part.
        needs: what has to be in the sample beside features and targets; what no chosen probe needs is not computed.
        told: whether language models are told of it.
    """

    name: str
    meaning: str
    compute: Callable[[Sample], Values]
    needs: frozenset[Need] = frozenset()
    told: bool = False


_PROBES: dict[str, Probe] = {}
_loaded = False


def register_probe(name: str, meaning: str, *, needs: tuple[Need, ...] = (), told: bool = False,
                   ) -> Callable[[Callable[[Sample], Values]], Callable[[Sample], Values]]:
    """Decorator: registers a function of a :class:`Sample` as a probe; see :class:`Probe` for the arguments."""
    def register(compute: Callable[[Sample], Values]) -> Callable[[Sample], Values]:
        _PROBES[name] = Probe(name, meaning, compute, frozenset(needs), told)
        return compute

    return register


def list_probes() -> dict[str, Probe]:
    """All probes, those of which language models are told first. Every file of this package is looked through."""
    global _loaded
    if not _loaded:
        _loaded = True
        package = importlib.import_module("lacer.agents.probes")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"lacer.agents.probes.{module.name}")
    return dict(sorted(_PROBES.items(), key=lambda item: not item[1].told))


def chosen(names: Collection[str] | None = None) -> list[Probe]:
    """The probes of these names, all if None.

    Raises:
        UnknownNameError: there is no such probe ("did you mean").
    """
    known = list_probes()
    for name in names or ():
        if name not in known:
            raise UnknownNameError("probe", name, known)
    return [p for p in known.values() if names is None or p.name in names]


def measure(sample: Sample, names: Collection[str] | None = None) -> dict[str, dict[str, float]]:
    """Probes of every part: ``{part: {"NAME": value, "NAME/OF": value}}``. Values that are not finite are left out.

    Args:
        sample: what to look at.
        names: of the probes; all if None.

    Raises:
        UnknownNameError: there is no such probe.
    """
    out: dict[str, dict[str, float]] = {part: {} for part in sample.features}
    for probe in chosen(names):
        for part, values in probe.compute(sample).items():
            for of, value in values.items():
                if math.isfinite(value):
                    out[part][f"{probe.name}/{of}" if of else probe.name] = float(value)
    return out
