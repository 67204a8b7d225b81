"""Settings of the ranker's training; the defaults are those of the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """Settings; with the same ones the same machine makes the same weights.

    A training that is not in its last fifth yet can be resumed with another number of updates; that is the same as if
    it had begun with it.

    Attributes:
        steps: updates.
        seed: of weights, tasks and histories.
        tokens: encoders, in histories and to be predicted, of one update.
        queries: encoders to be predicted of a task.
        longest: longest history.
        rate: learning rate between the warm-up and the last fifth of the updates, in which it falls to nothing.
        itself: share of the updates whose histories are gone on with by the model itself.
        width, layers: of the network.
        without: families of functions that no task is made of.
        prune: whether a quarter of the spaces are pruned.
    """

    steps: int = 6000
    seed: int = 0
    tokens: int = 1024
    queries: int = 72
    longest: int = 100
    rate: float = 1.5e-3
    itself: float = 0.25
    width: int = 64
    layers: int = 4
    without: tuple[str, ...] = ()
    prune: bool = True
