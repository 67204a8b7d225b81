"""Prompts: what a study tells (``facts.py``), put into words by the templates in ``prompts/``.

There are several sets of templates, which say the same in different words, so that it can be measured how much the
words matter. Text of environments and of earlier replies goes in as JSON strings (filter ``q``), so it can neither
close a fence or a heading nor be taken for template code: Jinja renders its values once and never reads them as
templates.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from lacer.search.llm import facts
from lacer.search.llm.words import as_json, name, num, quoted, short
from lacer.search.study import Study

SETS = ("plain", "terse", "researcher")
"""Sets of templates: folders in ``prompts/``."""

MAX_TOKENS = 8000
"""A prompt's history is digested until the prompt is no longer than this, as far as that can be."""

_PIECES = re.compile(r"[^\W\d_]{1,6}|\d{1,2}|[^\w\s]|_")

_LEVELS = ((9, 60, 400, 20), (7, 50, 300, 20), (6, 40, 200, 20), (5, 32, 100, 20), (4, 26, 80, 8), (4, 20, 60, 8),
           (3, 16, 50, 8), (3, 12, 40, 8), (2, 10, 30, 8), (2, 8, 20, 5), (2, 6, 12, 5), (2, 4, 8, 4), (2, 4, 8, 2),
           (2, 2, 4, 1))
"""(trials told in detail, further trials told in a line, further ones by their blocks, remembered proposals), tried
until the prompt is short enough."""


@cache
def _environment() -> jinja2.Environment:
    def read(path: str) -> str:
        return files("lacer.search.llm.prompts").joinpath(*path.split("/")).read_text(encoding="utf-8")

    env = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False,
                             keep_trailing_newline=False, loader=jinja2.FunctionLoader(read))
    env.filters.update(q=quoted, num=num, short=short, name=name, options=as_json)
    return env


def template(which: str, prompts: str = SETS[0]) -> jinja2.Template:
    """The template ``prompts/SET/WHICH.md``. Filters: ``q`` (JSON string), ``name`` (a word, or a JSON string),
    ``num``, ``short`` (an encoder in a line), ``options`` (JSON)."""
    return _environment().get_template(f"{prompts}/{which}.md")


def fill(which: str, prompts: str, **variables: Any) -> str:
    """A template with its variables; one empty line between paragraphs and around headings, none elsewhere."""
    text = template(which, prompts).render(**variables)
    text = re.sub(r"(?<=[^\n])\n(?=#{1,2} )", "\n\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def tokens(text: str) -> int:
    """Number of tokens of a prompt, an estimate from above: words are cut after six letters, numbers after two digits,
    all else is a token of its own. BERT's word pieces, finer than the tokens of large models, are fewer; see
    docs/benchmarks.md."""
    return len(_PIECES.findall(text))


def render(which: str, study: Study, *, prompts: str = SETS[0], feedback: Collection[str] = tuple(facts.FEEDBACK),
           past: Sequence[dict[str, Any]] = (), max_tokens: int = MAX_TOKENS, **more: Any) -> str:
    """A prompt about a study of encoders, from the study alone.

    Args:
        which: name of the template.
        study: the search so far.
        prompts: the set of templates, out of :data:`SETS`.
        feedback: what is told beside every encoder's score, out of :data:`facts.FEEDBACK`.
        past: remembered proposals, see :func:`facts.memory`.
        max_tokens: the history is digested to keep the prompt within this, where it can be.
        **more: further variables of the template.
    """
    fixed = {"task": facts.task(study), "feedback": set(feedback), "k": 1, **more}
    fixed.setdefault("space", facts.space(study))
    text = ""
    for *trials, remembered in _LEVELS:
        fixed["past"] = past[-remembered:]
        text = fill(which, prompts, **fixed, h=facts.history(study, feedback, *trials))
        if tokens(text) <= max_tokens:
            break
    return text


def messages(prompt: str, prompts: str = SETS[0]) -> Sequence[dict[str, str]]:
    """The conversation that a prompt begins."""
    return [{"role": "system", "content": fill("system", prompts)}, {"role": "user", "content": prompt}]
