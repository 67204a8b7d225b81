"""Limits on the size and speed of an encoder, checked before it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from lacer.envs import LacerError, TaskCard

if TYPE_CHECKING:
    from lacer.encoders.spec import EncoderSpec


class Limits(BaseModel):
    """What an encoder may cost at most; None: as much as it likes.

    Parameters and FLOPs are predicted without building the encoder (:func:`lacer.encoders.predict`); latency is
    measured on it once it is within those two (:func:`lacer.encoders.measure_latency`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: int | None = Field(None, ge=1, description="trainable parameters an encoder may have at most")
    flops: int | None = Field(None, ge=1, description="FLOPs that encoding one observation may take at most")
    latency_ms: float | None = Field(None, gt=0, description="milliseconds that encoding one observation may take at "
                                                             "most, on one CPU thread")

    def __bool__(self) -> bool:
        return any(v is not None for v in (self.parameters, self.flops, self.latency_ms))

    def check(self, spec: EncoderSpec, card: TaskCard, text: str | int = "all-MiniLM-L6-v2") -> None:
        """Checks an encoder; parameters and FLOPs before it is built.

        Args:
            spec: the encoder.
            card: its task.
            text: name of the frozen text model, or the width of its embeddings.

        Raises:
            LacerError: if a limit is broken, naming the module that takes most; or if the encoder cannot be built.
        """
        if not self:
            return
        from lacer.encoders.cost import measure_latency, predict, predict_parameters

        if self.parameters is not None:
            _compare(spec, predict_parameters(spec, card, text), self.parameters, "{:,.0f} parameters")
        if self.flops is not None:
            cost = predict(spec, card, text)
            _compare(spec, {m.name: m.flops for m in cost.modules}, self.flops, "{:,.0f} FLOPs")
        if self.latency_ms is not None:
            _compare(spec, measure_latency(spec, card, text), self.latency_ms, "{:.3g} ms")


def _compare(spec: EncoderSpec, parts: dict[str, int] | dict[str, float], most: float, form: str) -> None:
    total = sum(parts.values())
    if total > most:
        blocks = {**{f"sources.{n}": b for n, b in spec.sources.items()}, "fusion": spec.fusion}
        where = max(blocks, key=lambda w: parts[w.removeprefix("sources.")])
        amount = form.format(parts[where.removeprefix("sources.")])
        raise LacerError(f"the encoder is too large: {form.format(total)}, and the limit is {form.format(most)}; most "
                         f"of it is {where} with {amount}: {blocks[where].short()}")
