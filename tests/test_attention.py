"""Attention of variable length: one row for all sequences, kept apart by their lengths; no mask is made.

FlashAttention needs a GPU. Here transformers' own code for it runs, over kernels in plain torch with its interface.
"""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import support
from forwardtune import MeZO, MeZOTrainer
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare
from forwardtune.models import attention, load_model, takes_lengths, tune
from forwardtune.objectives import option_scores
from forwardtune.tasks.encoding import Encoded
from support.chat import ANSWER, MORE, USER, chat_tokenizer
from support.examples import CHOICE, encoded, sharpened
from support.packaged import WINDOWS, build
from support.trainers import quiet_config

transformers = pytest.importorskip("transformers", reason="needs transformers")
NAME = "lengths_in_torch"
TALKS = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, *MORE]}] * 6


def examples_of(words: int) -> list[Encoded]:
    return [encoded(prompt, words, words + (words > 1), label=prompt % 2) for prompt in (5, 17, 3, 9)]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, window: tuple[int, int]) -> Tensor:
    """Of one sequence, (length, heads, width)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    behind = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None] + k.shape[1] - q.shape[1]
    seen = (behind >= 0) if causal else torch.ones_like(behind, dtype=torch.bool)
    if window[0] >= 0:
        seen &= behind <= window[0]
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1)


class Kernels:
    """What ``flash_attn`` has, in plain torch. ``rows`` and ``lengths`` say how often each was called."""

    def __init__(self) -> None:
        self.rows = self.lengths = 0

    def flash(
        self, q, k, v, causal=False, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1), deterministic=False
    ):
        self.rows += 1
        return torch.stack([_attend(*one, causal, softmax_scale, window_size) for one in zip(q, k, v, strict=True)])

    def varlen(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None, dropout_p=0.0,
        window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        self.lengths += 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
        parts = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
        out = [_attend(q[a:b], k[c:d], v[c:d], causal, softmax_scale, window_size) for a, b, c, d in parts]
        assert cu_seqlens_q[-1] == len(q)
        return torch.cat(out)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask

    found = Kernels()
    process = utils._lazy_define_process_function(found.varlen)
    flash, varlen = (lambda *args, of=name, **how: getattr(found, of)(*args, **how) for name in ("flash", "varlen"))
    functions = (flash, varlen, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, (process, process)))
    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return found


def with_lengths(model: Any) -> Any:
    model.set_attn_implementation(NAME)
    return model


@pytest.mark.parametrize("words", [1, 3])
@pytest.mark.parametrize("family", ["llama", "opt", "mistral", "gemma3"])
def test_packed_rows_are_told_apart_by_their_lengths(kernels, family, words):
    model = sharpened(build(WINDOWS, family) if family in WINDOWS else support.tiny_model(family))
    tokenizer, examples = support.tokenizer(), examples_of(words)
    expected = option_scores(model, prepare(model, tokenizer, examples))
    assert not takes_lengths(model)
    with_lengths(model)
    assert takes_lengths(model)
    layout = find_layout(model, tokenizer, examples)
    assert layout.flat
    batch = prepare(model, tokenizer, examples, layout)
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    sequences = len(examples) if words == 1 else sum(len(example.options) for example in examples)
    assert len(batch["cu_seq_lens_q"]) == sequences + 1
    kernels.rows = kernels.lengths = 0
    with torch.no_grad():
        scores = option_scores(model, batch)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-4)
    assert kernels.lengths > 0 == kernels.rows
    plain = evaluate(model, tokenizer, CHOICE, examples, layout=plain_layout(model, tokenizer), batch_size=4)
    assert evaluate(model, tokenizer, CHOICE, examples, batch_size=4)["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_a_model_that_does_not_pass_lengths_on_keeps_the_plain_layout(kernels, monkeypatch):
    model, examples = with_lengths(sharpened(support.tiny_model("llama"))), examples_of(1)
    forward = type(model).forward

    def deaf(self, input_ids=None, attention_mask=None, use_cache=None):
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", deaf)
    assert find_layout(model, support.tokenizer(), examples) == plain_layout(model, support.tokenizer())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prefix_stands_before_rows_alone(kernels):
    model = tune(with_lengths(sharpened(support.tiny_model("llama"))), support.tokenizer(), "prefix")
    assert not takes_lengths(model)
    assert not find_layout(model, support.tokenizer(), examples_of(1)).flat


@pytest.mark.parametrize("assignment", ["shared", "example"])
def test_a_step_over_flat_rows_is_one_over_plain_rows(kernels, assignment):
    losses = []
    for flat in (True, False):
        model, examples = with_lengths(sharpened(support.tiny_model("llama"))), examples_of(1)
        layout = (find_layout if flat else plain_layout)(model, support.tokenizer(), *([examples] if flat else []))
        batch = prepare(model, support.tokenizer(), examples, layout)
        optimizer = MeZO(model, lr=1e-3, eps=1e-2, assignment=assignment)

        def closure(model=model, batch=batch):
            scores = option_scores(model, batch)
            each = -scores.log_softmax(-1)[:, 0]
            return each if assignment == "example" else each.mean()

        optimizer.step(closure)
        losses.append(optimizer.last.losses)
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


def packed(model: Any, folder: Any, **options: Any) -> MeZOTrainer:
    settings = {"max_steps": 2, "learning_rate": 1e-3, "eps": 1e-2, "packing": True, "max_length": 200}
    config = quiet_config(folder, **{**settings, "per_device_train_batch_size": 3, **options})
    data = datasets.Dataset.from_list(TALKS)
    return MeZOTrainer(model=model, args=config, train_dataset=data, processing_class=chat_tokenizer())


def test_packed_conversations_are_one_row(kernels, tmp_path):
    model = sharpened(support.tiny_model("llama"))
    losses = []
    for name in (NAME, "sdpa"):
        model.set_attn_implementation(name)
        own = packed(model, tmp_path / name)
        batch = own.data_collator([own.train_dataset[i] for i in range(2)])
        assert (len(batch["input_ids"]) == 1) == (name == NAME)
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with_lengths(model)
    packed(model, tmp_path / "run").train()
    with pytest.raises(InputError, match="does not keep the sequences of a packed row apart"):
        packed(model, tmp_path / "example", assignment="example")


def test_the_fastest_that_works_is_the_default(kernels, tmp_path, monkeypatch):
    sharpened(support.tiny_model("llama")).save_pretrained(tmp_path)
    support.tokenizer().save_pretrained(tmp_path)
    folder = str(tmp_path)
    monkeypatch.setattr(attention, "_installed", lambda device: ["unheard_of", NAME])
    chosen = {
        dtype: load_model(folder, dtype=dtype)[0].config._attn_implementation for dtype in ("bfloat16", "float32")
    }
    assert chosen == {"bfloat16": NAME, "float32": "sdpa"}  # which takes half precision alone
    assert load_model(folder, dtype="bfloat16", attn_implementation="sdpa")[0].config._attn_implementation == "sdpa"

    kernels.flash = lambda q, *args, **kwargs: torch.zeros_like(q)
    assert load_model(folder, dtype="bfloat16")[0].config._attn_implementation == "sdpa"  # it computes something else
