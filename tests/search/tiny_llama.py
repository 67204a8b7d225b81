"""A language model of less than a megabyte with random weights, for a real inference server. Needs the package gguf.

Usage: ``python tiny_llama.py MODEL.gguf TEXT``. Llama's architecture, one layer. The tokenizer knows every byte and the
frequent words of the file TEXT, so that prompts of its kind are short.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

import gguf
import numpy as np

WIDTH, HEADS, HIDDEN, CONTEXT = 64, 2, 128, 32768
SPACE = "\u2581"
"""How this kind of tokenizer writes a blank."""


def vocabulary(text: str, words: int = 250) -> list[bytes]:
    """Beginnings of frequent words: the tokenizer joins two tokens only if the result is one, too."""
    frequent = Counter(re.findall(rf"{SPACE}?[A-Za-z_]+|{SPACE}+|[0-9]|[^\w\s]", text.replace(" ", SPACE)))
    pieces = {w[:n] for w, _ in frequent.most_common(words) for n in range(1, len(w) + 1)}
    return [p.encode() for p in sorted(pieces, key=lambda p: (len(p), p))]


def write(path: str, text: str, seed: int = 0) -> None:
    """Writes the model."""
    rng = np.random.default_rng(seed)
    pieces = vocabulary(text)
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), *pieces]
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(pieces)]
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(CONTEXT)
    w.add_embedding_length(WIDTH)
    w.add_block_count(1)
    w.add_feed_forward_length(HIDDEN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * 259 + [float(len(p)) for p in pieces])
    w.add_token_types(types)
    w.add_unk_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // HEADS, WIDTH), "attn_v": (WIDTH // HEADS, WIDTH),
              "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
              "ffn_down": (WIDTH, HIDDEN)}
    matrices = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH),
                **{f"blk.0.{name}": shape for name, shape in shapes.items()}}
    for name, shape in matrices.items():
        w.add_tensor(f"{name}.weight", (0.1 * rng.standard_normal(shape)).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        w.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as f:
        write(sys.argv[1], f.read())
