"""Linear probing and Adam are what one would write by hand with scikit-learn and torch."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import support
from forwardtune.cli import main
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare
from forwardtune.models import load_model, model_kind, tune
from forwardtune.objectives import option_cross_entropy, target_likelihood
from forwardtune.paper.baselines import AdamTrainer, adam_arguments, probe
from forwardtune.tasks import Task, get_task, load_split
from forwardtune.tasks.batching import collate
from forwardtune.tasks.encoding import Encoded, Encoder
from support.examples import CHOICE, TOKENIZER, sharp_model, tokens

MASKED = Task("masked", "{text} [MASK]", "label", {"0": "a", "1": "b"}, "accuracy")
FREE = Task("free", "{text}", "answer", None, "exact_match", max_new_tokens=6)
WEAK = (1e4,)  # hardly a penalty: what can be separated is separated


def choices(count: int = 24, options: Sequence[Sequence[int]] = ((50,), (60,)), seed: int = 0) -> list[Encoded]:
    """Random prompts with random right answers."""
    labels = torch.randint(len(options), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    answers = [list(option) for option in options]
    return [Encoded(tokens(4 + i % 5, seed + i), answers, (label,)) for i, label in enumerate(labels)]


def filled_masks(**how: Any) -> list[Encoded]:
    """The same with a mask in the middle (token 4 stands for it)."""
    return [replace(e, prompt=[*e.prompt[:2], 4, *e.prompt[2:]], mask=2) for e in choices(**how)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return sharp_model()


# --- linear probing: the fit -------------------------------------------------------------------------------------


FAMILIES = ("llama", "llama_untied", "gpt2", "opt", "gemma3", "gpt_neox")
ONE_TOKEN = [((50,), (60,)), ((50,), (60,), (70,))]
SEVERAL = [((50, 51), (60, 61)), ((50, 51, 52), (50, 61))]


@pytest.mark.parametrize(
    ("family", "options"),
    [*product(FAMILIES, [*ONE_TOKEN, *SEVERAL]), *product(("bert", "roberta"), ONE_TOKEN)],
    ids=str,
)
def test_separable_answers_are_separated(family: str, options: Sequence[Sequence[int]]) -> None:
    masked = family in ("bert", "roberta")
    model, task = sharp_model(family), MASKED if masked else CHOICE
    train = filled_masks(options=options) if masked else choices(options=options)
    before = evaluate(model, TOKENIZER, task, train)["accuracy"]
    with probe(model, TOKENIZER, task, train, grid=WEAK):
        assert evaluate(model, TOKENIZER, task, train)["accuracy"] == 1 > before


def test_free_text_is_learnt_by_heart(llama: Any) -> None:
    texts = ["good", "bad", "so so"]
    train = [
        Encoded(tokens(5 + i, i), [TOKENIZER(" " + text + "\n")["input_ids"]], (0,), (text,))
        for i, text in enumerate(texts * 2)
    ]
    assert evaluate(llama, TOKENIZER, FREE, train)["exact_match"] == 0
    with probe(llama, TOKENIZER, FREE, train, grid=WEAK):
        assert evaluate(llama, TOKENIZER, FREE, train)["exact_match"] == 1


@pytest.mark.parametrize("options", [((50,), (60,)), ((50, 51), (60, 61, 62), (70,))], ids=["binary", "multinomial"])
@pytest.mark.parametrize("c", [1e-2, 1.0])
def test_probe_is_the_fit_by_hand_on_last_hidden_states(llama: Any, options: Sequence[Sequence[int]], c: float) -> None:
    train = choices(options=options)
    features, classes = [], []
    for example in train:
        answer = example.options[example.label]
        with torch.no_grad():
            out = llama(input_ids=torch.tensor([example.prompt + answer]), output_hidden_states=True)
        last = out.hidden_states[-1][0]  # behind the final norm, as the head's logits show
        torch.testing.assert_close(llama.lm_head(last), out.logits[0], rtol=0, atol=1e-5)
        features += last[len(example.prompt) - 1 : -1].double().tolist()
        classes += answer
    raw = np.array(features)
    scaled = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    by_hand = LogisticRegression(C=c, max_iter=1000).fit(scaled, classes)
    fitted = probe(llama, TOKENIZER, CHOICE, train, grid=(c,))
    assert (fitted.C, fitted.converged) == (c, True)
    assert fitted.head.tokens.tolist() == sorted(set(classes))
    log_p = fitted.head(torch.tensor(raw, dtype=torch.float32)).log_softmax(dim=-1)
    # L-BFGS stops at a gradient of 1e-4, and features of a batch differ from those of one example in the last bits.
    np.testing.assert_allclose(log_p[:, fitted.head.tokens], by_hand.predict_log_proba(scaled), rtol=0, atol=2e-3)
    others = [token for token in range(support.VOCABULARY) if token not in classes]
    assert log_p[:, others].max() < -90


def test_token_that_training_never_saw_cannot_win(llama: Any) -> None:
    """Nor on hidden states that are far from all others."""
    fitted = probe(llama, TOKENIZER, CHOICE, choices(options=((50,), (60,), (70,))), grid=(1.0,))
    hidden = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0)) * 1000
    logits = fitted.head(hidden)
    assert logits.shape == (1000, support.VOCABULARY)
    assert set(logits.argmax(dim=-1).tolist()) == {50, 60, 70}
    assert logits.isfinite().all()


def test_answer_with_fewer_unknown_tokens_is_preferred(llama: Any) -> None:
    train = choices(options=((50, 51), (60, 61)))
    odd = [Encoded(e.prompt, [[80, 81], e.options[e.label]], (1,)) for e in train]
    with probe(llama, TOKENIZER, CHOICE, train, grid=(1.0,)):
        result = evaluate(llama, TOKENIZER, CHOICE, odd)
    assert result["accuracy"] == 1
    assert np.isfinite(result["loss"])


def test_probe_is_deterministic_and_leaves_model_and_random_state_alone(
    llama: Any, random_state_untouched: None
) -> None:
    before, train = support.snapshot(llama), choices(options=((50, 51, 52), (50, 61)))
    hooks = len(llama.lm_head._forward_hooks), len(llama.lm_head._forward_pre_hooks)
    packed = find_layout(llama, TOKENIZER, train)
    assert packed.packed
    hows = {"a": (5, None), "b": (5, None), "c": (24, None), "d": (24, packed)}
    found = {
        name: probe(llama, TOKENIZER, CHOICE, train, batch_size=n, layout=how).head for name, (n, how) in hows.items()
    }
    assert support.same_bits(found["a"].weight, found["b"].weight)
    assert support.same_bits(found["a"].bias, found["b"].bias)
    for name in "cd":  # features round otherwise
        torch.testing.assert_close(found[name].weight, found["a"].weight, rtol=1e-3, atol=1e-3)
    support.assert_same_bits(llama, before)
    assert (len(llama.lm_head._forward_hooks), len(llama.lm_head._forward_pre_hooks)) == hooks


@pytest.mark.parametrize("dtype", support.HALF, ids=str)
def test_half_precision_model_keeps_a_float32_probe(dtype: torch.dtype) -> None:
    model, train = sharp_model(dtype=dtype), choices()
    with probe(model, TOKENIZER, CHOICE, train, grid=(1.0,)) as fitted:
        assert evaluate(model, TOKENIZER, CHOICE, train)["accuracy"] > 0.9
        assert fitted.head.weight.dtype == model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32
    assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == dtype


# --- linear probing: the strength of the penalty -----------------------------------------------------------------


def test_penalty_is_the_best_on_the_development_examples(llama: Any) -> None:
    grid, train = (1e-3, 1e-1, 1e1), choices(20)
    seen = Counter()
    # What cannot be foreseen wants the strongest penalty, the known the weakest.
    for dev in (choices(40, seed=900), train):
        losses = {}
        for c in grid:
            with probe(llama, TOKENIZER, CHOICE, train, grid=(c,)):
                losses[c] = evaluate(llama, TOKENIZER, CHOICE, dev)["loss"]
        chosen = probe(llama, TOKENIZER, CHOICE, train, dev, grid=grid)
        assert losses[chosen.C] == min(losses.values())
        alone = probe(llama, TOKENIZER, CHOICE, train, grid=(chosen.C,))
        assert support.same_bits(chosen.head.weight, alone.head.weight)
        seen[chosen.C] += 1
    assert seen == {1e-3: 1, 1e1: 1}


def test_without_development_examples_every_fifth_training_example_chooses(llama: Any) -> None:
    grid, train = (1e-3, 1e-1, 1e1), choices(40, options=((50, 51), (60, 61)))
    aside = train[4::5]
    rest = [example for i, example in enumerate(train) if i % 5 != 4]
    chosen = probe(llama, TOKENIZER, CHOICE, train, grid=grid)
    assert chosen.C == probe(llama, TOKENIZER, CHOICE, rest, aside, grid=grid).C
    everything = probe(llama, TOKENIZER, CHOICE, train, grid=(chosen.C,))
    assert support.same_bits(chosen.head.weight, everything.head.weight)


def test_middle_of_the_grid_where_nothing_can_choose(llama: Any) -> None:
    few = choices(4)
    assert {example.label for example in few} == {0, 1}
    assert probe(llama, TOKENIZER, CHOICE, few, grid=(1e1, 1e-3, 1e-1)).C == 1e-1
    foreign = [Encoded(e.prompt, [[90], [91]], e.right) for e in few]
    assert probe(llama, TOKENIZER, CHOICE, few, foreign, grid=(1e1, 1e-3, 1e-1)).C == 1e-1


def test_fit_that_does_not_converge_is_told_once(llama: Any) -> None:
    with pytest.warns(UserWarning, match="did not converge in 2 iterations. Raise max_iterations") as told:
        fitted = probe(llama, TOKENIZER, CHOICE, choices(), max_iterations=2)
    assert len(told) == 1
    assert not fitted.converged


# --- linear probing: in the model's place ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "opt", "bert", "roberta"])
def test_old_head_comes_back_bit_for_bit_also_on_exceptions(family: str) -> None:
    model = sharp_model(family)
    train = filled_masks() if family in ("bert", "roberta") else choices()
    before, head, embedding = support.snapshot(model), model.get_output_embeddings(), model.get_input_embeddings()
    words, ids = embedding.weight.detach().clone(), support.token_batch()
    logits = model(input_ids=ids).logits
    fitted = probe(model, TOKENIZER, CHOICE, train)

    def use_and_fail() -> None:
        with fitted:
            assert model.get_output_embeddings() is fitted.head
            assert model.get_input_embeddings() is embedding
            assert support.same_bits(embedding.weight, words)
            assert not torch.equal(model(input_ids=ids).logits, logits)
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            use_and_fail()
        assert model.get_output_embeddings() is head
        support.assert_same_bits(model, before)
        assert torch.equal(model(input_ids=ids).logits, logits)
    if family != "llama_untied":
        assert head.weight is embedding.weight


def test_probe_works_around_an_adapter(llama: Any) -> None:
    train = choices()
    adapted = tune(sharp_model(), TOKENIZER, "lora")
    plain = probe(llama, TOKENIZER, CHOICE, train, grid=(1.0,)).head
    with probe(adapted, TOKENIZER, CHOICE, train, grid=(1.0,)) as fitted:  # a fresh adapter changes nothing
        torch.testing.assert_close(fitted.head.weight, plain.weight, rtol=1e-3, atol=1e-3)
        assert evaluate(adapted, TOKENIZER, CHOICE, train)["accuracy"] > 0.9


def test_probe_cannot_be_entered_twice_at_a_time(llama: Any) -> None:
    head = llama.lm_head
    fitted = probe(llama, TOKENIZER, CHOICE, choices())
    with fitted:
        with pytest.raises(RuntimeError, match="in place already"), fitted:
            pass
        assert llama.lm_head is fitted.head
    assert llama.lm_head is head


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        ([], {}, "needs training examples"),
        (choices(), {"grid": ()}, "positive values of C"),
        (choices(), {"grid": (1.0, 0.0)}, "positive values of C"),
        (choices(), {"grid": (float("nan"),)}, "positive values of C"),
        ([Encoded([5, 6], [[50], [60]], (1,))] * 4, {}, "all 4 training examples of task choice have the same"),
    ],
    ids=["no-examples", "no-grid", "zero", "nan", "one-answer"],
)
def test_what_cannot_be_fitted_is_refused(llama: Any, train: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        probe(llama, TOKENIZER, CHOICE, train, **options)


def test_model_that_cannot_be_probed_is_refused() -> None:
    with pytest.raises(InputError, match=r"BertModel has no vocabulary head.*choose a causal or masked"):
        probe(support.tiny_model("bert").bert, TOKENIZER, CHOICE, choices())
    broken = support.tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"not finite.*float32 or bfloat16"):
        probe(broken, TOKENIZER, CHOICE, choices())
    assert not broken.lm_head._forward_hooks


def real_examples(model: Any, tokenizer: Any, data_dir: Path, split: str, limit: int) -> tuple[Task, list[Encoded]]:
    task = get_task("sst2").worded_for(model_kind(model))
    examples = load_split(task, split, data_dir=data_dir, limit=limit).examples
    return task, Encoder(tokenizer, 256)(task, examples)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "count", "held_out", "margin"),
    # Of 436 held-out reviews 51% have one class; 5 points are 2 standard errors. The masked model has read far more.
    [("stories260k", 2000, 436, 0.05), ("minilm-l6-mlm", 200, 150, 0.12)],
)
def test_probe_of_a_trained_model_beats_the_majority_of_sst2(
    models_dir: Path, data_dir: Path, name: str, count: int, held_out: int, margin: float
) -> None:
    model, tokenizer = load_model(str(models_dir / name), dtype="float32")
    task, train = real_examples(model, tokenizer, data_dir, "train", count)
    _, test = real_examples(model, tokenizer, data_dir, "test", held_out)
    layout = find_layout(model, tokenizer, train)
    majority = max(Counter(example.label for example in test).values()) / len(test)
    before = evaluate(model, tokenizer, task, test, layout=layout)
    with probe(model, tokenizer, task, train, grid=(1e-2, 1.0), layout=layout):
        after = evaluate(model, tokenizer, task, test, layout=layout)
    assert after["accuracy"] > majority + margin
    assert after["loss"] < before["loss"]


# --- backpropagation ---------------------------------------------------------------------------------------------


def make(
    folder: Path, model: Any, *, objective: Any = option_cross_entropy, data: Any = None, **changes: Any
) -> AdamTrainer:
    collator = partial(collate, layout=plain_layout(model, TOKENIZER))
    args = adam_arguments(
        str(folder),
        **{
            "max_steps": 4,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "seed": 3,
            **changes,
        },
    )
    data = choices(12, ((50, 51), (60, 61, 62))) if data is None else data
    return AdamTrainer(model, args, collator, data, data, TOKENIZER, objective=objective)


@pytest.mark.parametrize("mode", ["all", "lora", "prefix"])
@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_trainer_is_the_hand_written_loop_of_adamw(tmp_path: Path, mode: str, scheduler: str) -> None:
    trainer = make(tmp_path, tune(sharp_model(), TOKENIZER, mode), lr_scheduler_type=scheduler)
    before = support.snapshot(trainer.model)
    trainer.train()

    model = tune(sharp_model(), TOKENIZER, mode).train()
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=1e-3, weight_decay=0)
    loader, step = make(tmp_path, model).get_train_dataloader(), 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            if step == 4:
                break
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 4 if scheduler == "linear" else 1)
            optimizer.zero_grad()
            option_cross_entropy(model, batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
            step += 1
    support.assert_same_bits(trainer.model, support.snapshot(model))
    assert not list(tmp_path.rglob("*"))  # no file is left
    moved = {name for name, tensor in trainer.model.state_dict().items() if not support.same_bits(tensor, before[name])}
    expected = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    assert moved == expected


@pytest.mark.parametrize("objective", [option_cross_entropy, target_likelihood])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
def test_gradient_through_selected_positions_is_the_gradient_of_the_definition(family: str, objective: Any) -> None:
    """In the plain layout and with packed rows; the definition takes one option at a time and all its logits."""
    batch = choices(5, ((50, 51), (60, 61, 62), (70,)))
    model = sharp_model(family)
    for example in batch:
        scores = []
        for option in example.options:
            logits = model(input_ids=torch.tensor([example.prompt + option])).logits[0]
            log_p = logits.log_softmax(dim=-1)[len(example.prompt) - 1 : -1]
            scores.append(log_p[torch.arange(len(option)), torch.tensor(option)].mean())
        right = torch.stack(scores) if objective is target_likelihood else torch.stack(scores).log_softmax(dim=0)
        (-right[example.label] / len(batch)).backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    largest = max(grad.abs().max() for grad in expected.values())
    for layout in (None, find_layout(model, TOKENIZER, batch)):
        model.zero_grad()
        objective(model, prepare(model, TOKENIZER, batch, layout)).mean().backward()
        for name, parameter in model.named_parameters():
            if name in expected:  # float32 sums of some hundred terms in another order
                torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * float(largest))


def test_loss_falls_and_dropout_is_on_while_training_alone(tmp_path: Path) -> None:
    modes = set()

    def objective(model: Any, inputs: Any) -> torch.Tensor:
        modes.add((model.training, torch.is_grad_enabled()))
        return option_cross_entropy(model, inputs)

    trainer = make(tmp_path, support.tiny_model("gpt2"), objective=objective, max_steps=40, learning_rate=3e-3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert modes == {(False, False), (True, True)}
    assert trainer.last_loss < before  # of the last minibatch, not of the evaluation
    assert after < 0.5 * before
    trainer.model.eval()
    with torch.no_grad():
        losses = option_cross_entropy(trainer.model, prepare(trainer.model, TOKENIZER, trainer.eval_dataset))
    assert after == pytest.approx(float(losses.mean()), rel=1e-4)


def test_accumulated_microbatches_are_one_batch(tmp_path: Path) -> None:
    """By the mean of the objective, not by a number of labels that Trainer counts in the batch."""
    data = choices(8)
    whole = make(tmp_path, sharp_model(), data=data, max_steps=2, per_device_train_batch_size=4)
    parts = make(
        tmp_path, sharp_model(), data=data, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    for trainer in (whole, parts):
        # SGD without clipping shows the gradient's size, which Adam would hide.
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-2)
        trainer.args.max_grad_norm = 0.0
        trainer.train()
    base = support.snapshot(sharp_model())
    for name, weight in whole.model.state_dict().items():
        change = (weight - base[name]).abs().max()
        assert (parts.model.state_dict()[name] - weight).abs().max() <= 1e-3 * change + 1e-7, name
    assert whole.state.global_step == parts.state.global_step == 2


def test_without_an_objective_the_models_own_loss_is_lowered(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in support.token_batch(8, 6).tolist()]
    trainer = AdamTrainer(support.tiny_model(), adam_arguments(str(tmp_path), max_steps=20, learning_rate=1e-2, use_cpu=True),
                          train_dataset=rows, eval_dataset=rows)  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


def test_arguments_are_the_papers_and_can_be_changed(tmp_path: Path) -> None:
    args = adam_arguments(str(tmp_path), max_steps=625)
    assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (625, 8, 1e-5)
    assert (args.weight_decay, args.lr_scheduler_type, args.optim) == (0, "constant", "adamw_torch")
    assert (args.save_strategy, args.report_to, args.bf16, args.fp16) == ("no", [], False, False)
    assert adam_arguments(str(tmp_path), max_steps=5, save_strategy="steps", save_steps=2).save_strategy == "steps"


def test_bfloat16_weights_stay_bfloat16(tmp_path: Path) -> None:
    model = sharp_model(dtype=torch.bfloat16)
    before = support.snapshot(model)
    trainer = make(tmp_path, model, max_steps=2)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])


# --- backpropagation: what it refuses ----------------------------------------------------------------------------


def errors(model: Any, inputs: Any) -> float:
    return 0.5


def detached(model: Any, inputs: Any) -> torch.Tensor:
    return option_cross_entropy(model, inputs).detach()


@pytest.mark.parametrize("objective", [errors, detached])
def test_objective_without_gradient_is_refused_for_training_alone(tmp_path: Path, objective: Any) -> None:
    trainer = make(tmp_path, support.tiny_model(), objective=objective)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(InputError, match=r"no gradient.*tune with MeZO"):
        trainer.train()


def test_model_with_nothing_to_tune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no parameter of the model requires grad.*requires_grad_"):
        make(tmp_path, support.tiny_model().requires_grad_(False))


def test_float16_weights_are_refused_unless_frozen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"float16.*float32 or bfloat16"):
        make(tmp_path, support.tiny_model(dtype=torch.float16))
    adapted = tune(support.tiny_model(dtype=torch.float16), TOKENIZER, "lora")  # float32 adapters
    make(tmp_path, adapted, max_steps=1).train()


def test_without_scikit_learn_it_is_said_before_anything_is_loaded(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    told = "linear probes need scikit-learn: pip install 'forwardtune[paper]'"
    assert main(["probe", "--model", str(tmp_path / "none"), "--task", "none"]) == 2
    assert told in capsys.readouterr().err
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("model: none\ntasks: sst2\nmethods:\n  Probe: {command: probe}\n")
    assert main(["sweep", str(sweep), "--output-dir", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="forwardtune\\[paper\\]"):
        probe(None, None, None, [])
