"""Errors that name the mistake and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LacerError(Exception):
    """Base of every error that a user can mend. The command line prints it without a traceback and exits with 2."""


class UnknownNameError(LacerError, KeyError):
    """A name that is not registered; the message lists what is known and the nearest match, which may also be one of
    ``others``."""

    def __init__(self, kind: str, name: str, known: Iterable[str], others: Iterable[str] = ()) -> None:
        known = sorted(known)
        hint = did_you_mean(name, known)
        hint = did_you_mean(name, others) if hint == "." else hint
        super().__init__(f"unknown {kind} {name!r}{hint} Known: {', '.join(known) or 'none'}.")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or ``"."`` when nothing known is near.

    The part after the last ``/`` or ``:`` is compared too, so ``MixedTrafic`` finds ``lacer/MixedTraffic-v0``.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        short = {k.rsplit("/", 1)[-1].rsplit("-v", 1)[0].lower(): k for k in known}
        wanted = name.rsplit("/", 1)[-1].rsplit("-v", 1)[0].lower()
        near = [short[m] for m in difflib.get_close_matches(wanted, list(short), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else "."
