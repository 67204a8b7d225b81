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
    """One block per used source and a fusion block. Immutable; equal specs have equal :attr:`hash`.

    A source that is absent from ``sources`` is not used. JSON form::

        {"sources": {"traffic": {"block": "mlp", "width": 64}, ...}, "fusion": {"block": "concat", "width": 64}}
    """

    __slots__ = ("_canonical", "fusion", "sources")

    def __init__(self, sources: Mapping[str, BlockConfig], fusion: FusionConfig) -> None:
        self.sources = dict(sources)
        self.fusion = fusion
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
            if key not in ("sources", "fusion"):
                raise LacerError(f"encoder has no field {str(key)[:80]!r}"
                                 f"{did_you_mean(str(key)[:80], ('sources', 'fusion'))}")
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
        return cls(parsed, fusion)

    @classmethod
    def load(cls, path: str | Path, card: TaskCard) -> EncoderSpec:
        """Reads an ``encoder.json``. Raises LacerError naming the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise LacerError(f"cannot read the encoder file {path}: {e}") from None
        try:
            return cls.parse(text, card)
        except LacerError as e:
            raise LacerError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "sources": {name: block.model_dump() for name, block in self.sources.items()},
            "fusion": self.fusion.model_dump(),
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def short(self) -> str:
        """The encoder in one line: the blocks, without their hyper-parameters."""
        return " ".join(f"{name}:{b.block}" for name, b in self.sources.items()) + f" -> {self.fusion.block}"

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
