"""What several test files share. What needs more than torch, or is seldom needed, is in a module of its own:

``command`` (the command line), ``process`` (scripts), ``logs`` (step logs on the disk), ``trainers``, ``examples`` (encoded ones),
``methods`` (the members of every axis of the method), ``side_path``.
"""

from .bits import DTYPES, HALF, assert_same_bits, same_bits, snapshot
from .models import (
    FAMILIES,
    SIZES,
    TEXT,
    VOCABULARY,
    closure_for,
    save_tiny_model,
    tiny_model,
    token_batch,
    tokenizer,
    write_gguf,
)
from .steps import scripted, train, trusted
from .torch_state import other_defaults, threads

__all__ = [
    "DTYPES", "FAMILIES", "HALF", "SIZES", "TEXT", "VOCABULARY", "assert_same_bits", "closure_for", "other_defaults", "same_bits",
    "save_tiny_model", "scripted", "snapshot", "threads", "tiny_model", "token_batch", "tokenizer", "train", "trusted", "write_gguf",
]  # fmt: skip
