"""EncoderSpec: a composite encoder as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lacer.encoders.registry import FUSION, BlockConfig, FusionConfig, parse_block
from lacer.envs import LacerError, TaskCard, did_you_mean


class EncoderSpec:
    """One block per used source, a fusion block and the routing. Immutable; equal specs have equal :attr:`hash`.

    A source that is absent from ``sources`` is not used. ``routing`` names the source that conditions the fusion; it is
    there only if the fusion block has such a source. JSON form::

        {"sources": {"traffic": {"block": "mlp", "width": 64}, ...}, "fusion": {"block": "concat", "width": 64}}
        {"sources": {...}, "fusion": {"block": "film", "width": 64}, "routing": {"condition": "traffic"}}

    Raises:
        LacerError: if ``condition`` is not a used source, or is missing or of no effect with this fusion.
    """

    __slots__ = ("_canonical", "condition", "fusion", "sources")

    def __init__(self, sources: Mapping[str, BlockConfig], fusion: FusionConfig, condition: str | None = None) -> None:
        self.sources = dict(sources)
        self.fusion = fusion
        self.condition = condition
        used = ", ".join(self.sources)
        if fusion.conditioned and condition is None:
            raise LacerError(f"routing.condition is missing: {fusion.block} needs the source that conditions it, "
                             f"one of: {used}")
        if not fusion.conditioned and condition is not None:
            raise LacerError(f"routing.condition has no effect: {fusion.block} is not conditioned on a source")
        if condition is not None and condition not in self.sources:
            raise LacerError(f"routing.condition: the encoder does not use a source {condition[:80]!r}"
                             f"{did_you_mean(condition[:80], self.sources)} Used: {used}.")
        self._canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, data: Any, card: TaskCard) -> EncoderSpec:
        """Checks a spec given as a dict or JSON text against a task.

        Raises:
            LacerError: with the place and the mistake; unknown names get "did you mean".
        """
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a plain ValueError
                raise LacerError(f"encoder is not JSON: {e}") from None
        if not isinstance(data, dict):
            raise LacerError("encoder: expected an object with \"sources\" and \"fusion\"")
        for key in data:
            if key not in ("sources", "fusion", "routing"):
                raise LacerError(f"encoder has no field {str(key)[:80]!r}"
                                 f"{did_you_mean(str(key)[:80], ('sources', 'fusion', 'routing'))}")
        sources = data.get("sources")
        if not isinstance(sources, dict) or not sources:
            raise LacerError("encoder: \"sources\" must name a block for at least one of: " + ", ".join(card.sources))
        for name in sources:
            if name not in card.sources:
                raise LacerError(f"encoder uses the source {str(name)[:80]!r}, which {card.env_id} does not have"
                                 f"{did_you_mean(str(name)[:80], card.sources)} Sources: {', '.join(card.sources)}.")
        parsed = {
            name: parse_block(card.sources[name].modality, sources[name], f"sources.{name}")
            for name in card.sources
            if name in sources
        }
        fusion = parse_block(FUSION, data.get("fusion"), "fusion")
        assert isinstance(fusion, FusionConfig)
        return cls(parsed, fusion, _condition(data.get("routing")))

    @classmethod
    def load(cls, path: str | Path, card: TaskCard) -> EncoderSpec:
        """Reads an ``encoder.json``. Raises LacerError naming the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise LacerError(f"cannot read the encoder file {path}: {getattr(e, 'strerror', e)}") from None
        try:
            return cls.parse(text, card)
        except LacerError as e:
            raise LacerError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "sources": {name: block.model_dump() for name, block in self.sources.items()},
            "fusion": self.fusion.model_dump(),
            **({} if self.condition is None else {"routing": {"condition": self.condition}}),
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def short(self) -> str:
        """The encoder in one line: the blocks, without their hyper-parameters."""
        by = "" if self.condition is None else f" by {self.condition}"
        return " ".join(f"{name}:{b.block}" for name, b in self.sources.items()) + f" -> {self.fusion.block}{by}"

    @property
    def hash(self) -> str:
        """Content hash (first 16 hex digits of SHA-256 of the canonical JSON)."""
        return hashlib.sha256(self._canonical.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncoderSpec) and self._canonical == other._canonical

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __repr__(self) -> str:
        return f"EncoderSpec({self.short()!r}, {self.hash})"


def _condition(routing: Any) -> str | None:
    """The source named in the ``routing`` of a spec, which may be missing or empty."""
    if routing is None:
        return None
    if not isinstance(routing, dict):
        raise LacerError('routing: expected an object such as {"condition": "SOURCE"}')
    for key in routing:
        if key != "condition":
            raise LacerError(f"routing has no field {str(key)[:80]!r}{did_you_mean(str(key)[:80], ('condition',))}")
    condition = routing.get("condition")
    if condition is not None and not isinstance(condition, str):
        raise LacerError("routing.condition must be the name of a source")
    return condition
