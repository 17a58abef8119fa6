"""MeZOTrainer is transformers' Trainer around a MeZO loop that one can write by hand, and resumes to the same bits."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import HPSearchBackend

import support
from forwardtune import MeZO
from forwardtune.hf.config import MeZOConfig
from forwardtune.hf.trainer import MeZOTrainer
from forwardtune.trajectory import LogError, read_log, replay
from support.command import read
from support.logs import log_lines
from support.trainers import QUIET, Kill, KilledError

STEPS = 7
DATA = [{"input_ids": row, "labels": row} for row in support.token_batch(12, 6).tolist()]


def squares(model: Any, inputs: Any) -> torch.Tensor:
    """An objective with one loss an example, shape (batch,)."""
    return model(input_ids=inputs["input_ids"]).logits.float().pow(2).mean(dim=(1, 2)) * 100


def config(folder: Path, **changes: Any) -> MeZOConfig:
    small = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "eps": 1e-3, "seed": 3}
    return MeZOConfig(**{"output_dir": str(folder), **QUIET, **small, **changes})


def make(folder: Path, *, model: Any = None, objective: Any = squares, data: Any = DATA, **changes: Any) -> MeZOTrainer:
    """A trainer on the base model; callbacks, optimizers and run go to the trainer, the rest to its configuration."""
    own = {key: changes.pop(key) for key in ("callbacks", "optimizers", "run", "data_collator") if key in changes}
    model = support.tiny_model() if model is None else model
    args = config(folder, **changes)
    return MeZOTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=_first(data), objective=objective, **own
    )


def _first(data: Any) -> Any:
    return data.select(range(4)) if isinstance(data, Dataset) else data[:4] if isinstance(data, list) else DATA[:4]


def trained(folder: Path, **changes: Any) -> MeZOTrainer:
    trainer = make(folder, **changes)
    trainer.train()
    return trainer


def killed(folder: Path, *after: int, **changes: Any) -> None:
    """A run that is killed after a step, resumed, killed after another, and so on."""
    for number, step in enumerate(after):
        trainer = make(folder, callbacks=[Kill(step)], **changes)
        with pytest.raises(KilledError):
            trainer.train(resume_from_checkpoint=number > 0 or None)


def resumed(folder: Path, wanted: Any = True, **changes: Any) -> MeZOTrainer:
    trainer = make(folder, **changes)
    trainer.train(resume_from_checkpoint=wanted)
    return trainer


def by_hand(optimizer: MeZO, model: Any, trainer: MeZOTrainer, loss: Callable[[Any, Any], Any], steps: int) -> None:
    """The loop that a user would write over the same batches."""
    loader, epoch = trainer.get_train_dataloader(), 0
    while optimizer.next_step < steps:
        loader.set_epoch(epoch)
        for batch in loader:
            if optimizer.next_step < steps:
                optimizer.step(lambda batch=batch: loss(model, batch))
        epoch += 1


# --- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"probes": 2, "direction": "rademacher"}, {"perturbation": "copy", "eps": 1e-2, "clip_coefficient": 0.5}],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_trainer_is_the_hand_written_loop(tmp_path: Path, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    trainer = trained(tmp_path, model=support.tiny_model(dtype=dtype), **settings)
    model = support.tiny_model(dtype=dtype)
    optimizer = MeZO(model, lr=1e-3, seed=3, **settings)
    by_hand(optimizer, model, make(tmp_path), lambda model, batch: squares(model, batch).mean(), STEPS)
    support.assert_same_bits(trainer.model, support.snapshot(model))
    assert not torch.equal(model.lm_head.weight, support.tiny_model(dtype=dtype).lm_head.weight)
    assert optimizer.last.coefficients == read_log(trainer.step_log).records[-1].coefficients


def test_without_an_objective_the_models_own_loss_is_lowered(tmp_path: Path) -> None:
    trainer = trained(tmp_path, objective=None)
    model = support.tiny_model()
    by_hand(MeZO(model, lr=1e-3, seed=3), model, make(tmp_path), lambda model, batch: model(**batch).loss, STEPS)
    # Trainer divides the sum of the token losses by their number, the model itself takes their mean. The two differ
    # in the last bit of a loss of 6, so by up to 5e-7 / (2 eps) = 2.4e-4 in a coefficient; times lr, steps and |z| < 4.
    for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2.4e-4 * 1e-3 * STEPS * 4)


def test_model_is_evaluated_without_dropout(tmp_path: Path) -> None:
    model = support.tiny_model("gpt2")  # dropout 0.1 by default
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    modes: set[bool] = set()

    def objective(model: Any, inputs: Any) -> torch.Tensor:
        modes.add(model.training)
        return squares(model, inputs)

    trained(tmp_path, model=model.train(), objective=objective, max_steps=2)
    assert modes == {False}


@pytest.mark.parametrize("kind", ["float", "scalar", "per-example"])
def test_objective_may_return_a_number_or_losses(tmp_path: Path, kind: str) -> None:
    def objective(model: Any, inputs: Any) -> Any:
        losses = squares(model, inputs)
        return {"float": losses.mean().item(), "scalar": losses.mean(), "per-example": losses}[kind]

    trainer = trained(tmp_path, objective=objective, max_steps=3)
    reference = trained(tmp_path / "reference", max_steps=3)
    support.assert_same_bits(trainer.model, support.snapshot(reference.model))
    batch = trainer.data_collator(DATA[:4])
    with torch.no_grad():
        expected = float(squares(trainer.model, batch).mean())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)  # float32 means in another order


def test_bf16_runs_the_model_under_autocast(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bf16=True, max_steps=3)
    model = support.tiny_model()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model, batch).mean()

    by_hand(MeZO(model, lr=1e-3, seed=3), model, make(tmp_path), loss, 3)
    support.assert_same_bits(trainer.model, support.snapshot(model))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    full = trained(tmp_path / "full", max_steps=3)
    assert not torch.equal(full.model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("scheduled", [False, True])
def test_optimizer_made_by_hand_is_used(tmp_path: Path, scheduled: bool) -> None:
    model = support.tiny_model()
    mezo = MeZO(model, lr=1e-3, eps=1e-2, seed=9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(mezo, lambda step: 1 / (1 + step)) if scheduled else None
    trainer = trained(tmp_path, model=model, optimizers=(mezo, scheduler))
    assert trainer.mezo is mezo
    log = read_log(trainer.step_log)
    assert (log.header["eps"], log.header["seed"], log.steps) == (1e-2, 9, STEPS)
    expected = [1e-3 / (1 + step) if scheduled else 1e-3 for step in range(STEPS)]
    assert [record.lr[0] for record in log.records] == pytest.approx(expected, rel=1e-12)


def test_an_objective_gets_every_column(tmp_path: Path) -> None:
    """The model's own loss only those that it takes."""
    weighted = Dataset.from_list([{**row, "weight": float(i)} for i, row in enumerate(DATA)])
    seen: list[Any] = []

    def objective(model: Any, inputs: Any) -> torch.Tensor:
        seen.append(inputs.get("weight"))
        return squares(model, inputs)

    trained(tmp_path / "objective", objective=objective, data=weighted, max_steps=3)
    assert all(weight is not None for weight in seen)
    assert set(torch.cat(seen).tolist()) == set(range(12))
    trained(tmp_path / "own", objective=None, data=weighted, max_steps=1)


@pytest.mark.parametrize(("pad", "taught"), [("<eos>", False), ("<pad>", True)])
def test_ends_of_text_that_the_collator_takes_for_padding_are_told_of(tmp_path: Path, pad: str, taught: bool) -> None:
    tokenizer = support.tokenizer()
    tokenizer.pad_token = pad
    rows = [{"input_ids": [*row["input_ids"][: 3 + i % 3], tokenizer.eos_token_id]} for i, row in enumerate(DATA)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained(tmp_path, objective=None, data=rows, data_collator=collator, max_steps=2)
    told = [str(warning.message) for warning in told]
    assert [f"({pad})" in text and "none of the 4 ends" in text for text in told] == ([] if taught else [True])


# --- gradient accumulation ---------------------------------------------------------------------------------------


def test_accumulation_is_estimate_over_the_microbatches(tmp_path: Path) -> None:
    """Ten examples in microbatches of two, two a step: the third step of an epoch has one microbatch alone."""
    settings = {"per_device_train_batch_size": 2, "data": DATA[:10]}
    trainer = trained(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1, **settings)
    assert read_log(trainer.step_log).steps == 6
    model = support.tiny_model()
    optimizer = MeZO(model, lr=1e-3, seed=3)
    loader = make(tmp_path, **settings).get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        microbatches = list(loader)
        for step in (microbatches[:2], microbatches[2:4], microbatches[4:]):
            share = len(step)
            for batch in step:
                optimizer.estimate(lambda batch=batch, share=share: squares(model, batch).mean() / share)
            optimizer.step()
    support.assert_same_bits(trainer.model, support.snapshot(model))


@pytest.mark.parametrize(
    ("objective", "smoothing"), [(squares, 0.0), (None, 0.0), (None, 0.1)], ids=["objective", "own-loss", "smoothed"]
)
def test_accumulation_equals_the_large_batch(tmp_path: Path, objective: Any, smoothing: float) -> None:
    """With the model's own loss also where microbatches have different numbers of target tokens.

    By which rule Trainer divides a microbatch's loss differs between versions, and with label smoothing.
    """
    uneven = [{**row, "labels": [-100] * (i % 4) + row["labels"][i % 4 :]} for i, row in enumerate(DATA)]
    settings = {"objective": objective, "label_smoothing_factor": smoothing, "max_steps": 3}
    settings["data"] = DATA if smoothing else uneven
    large = trained(tmp_path / "large", per_device_train_batch_size=4, **settings)
    small = trained(tmp_path / "small", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    logs = [read_log(trainer.step_log) for trainer in (large, small)]
    for a, b in zip(*(log.records for log in logs), strict=True):
        # float32 sums in another order: a few units in the last place of a loss of 6
        assert a.losses == pytest.approx(b.losses, abs=4e-6)
        assert len(set(a.losses)) == 2


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fp16", True, "cannot honour.*fp16.*dtype=torch.float16"),
        ("bf16_full_eval", True, "cannot honour.*bf16=True"),
        ("fp16_full_eval", True, "cannot honour.*dtype=torch.float16"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "cannot honour.*DeepSpeed.*Drop it"),
        ("fsdp", True, "cannot honour.*FSDP.*device_map"),
        ("neftune_noise_alpha", 5.0, "cannot honour.*NEFTune.*Drop it"),
        ("torch_compile", True, "cannot honour.*torch_compile.*Drop it"),
        ("auto_find_batch_size", True, "cannot honour.*auto_find_batch_size.*Choose the batch size"),
        ("learning_rate", "much", "learning_rate: 'much' is neither"),
        ("learning_rate", -1.0, "learning_rate: -1.0 is neither"),
        ("eps", 0.0, "eps: 0.0 is neither a positive number nor 'auto'"),
        ("probes", 0, "probes must be"),
        ("direction", "cauchy", "cauchy.*gaussian"),
        ("perturbation", "none", "perturbation 'none'.*scratch"),
        ("clip_coefficient", -1.0, "clip_coefficient must be positive"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_remedy_whenever_it_is_set(
    tmp_path: Path, name: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        (config if words.startswith("cannot honour") else trained)(tmp_path, **{name: value})
    trainer = make(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert not (tmp_path / "steps.jsonl").exists()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_copied_arguments_of_gradients_are_ignored_with_one_warning(tmp_path: Path) -> None:
    copied = TrainingArguments(
        str(tmp_path / "out"), **{**QUIET, "max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "seed": 3},
        max_grad_norm=0.5, optim="adamw_8bit", gradient_checkpointing=True, adam_beta2=0.98,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="ignored") as told:
        taken = MeZOConfig(**copied.to_dict(), eps=1e-3)
    (warning,) = (w for w in told if "ignored" in str(w.message))
    for listed in (
        "max_grad_norm=0.5",
        "optim='adamw_8bit'",
        "gradient_checkpointing=True",
        "adam_beta2=0.98",
        "clip_coefficient limits",
    ):
        assert listed in str(warning.message)
    assert warning.filename == __file__
    plain = config(tmp_path / "plain", max_steps=3, lr_scheduler_type="linear")
    logs = []
    for args in (taken, plain):
        trainer = MeZOTrainer(
            model=support.tiny_model(), args=args, train_dataset=DATA, data_collator=default_data_collator
        )
        trainer.train()  # says nothing
        logs.append(log_lines(trainer.step_log))
    assert logs[0] == logs[1]


def test_adams_own_arguments_are_taken_where_the_rule_is_adam(tmp_path: Path) -> None:
    assert config(tmp_path, rule="adam", adam_beta2=0.9).make_rule().settings()["beta2"] == 0.9


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("optim", "adafactor"), ("optim_args", "a=1")])
def test_what_is_of_gradients_is_ignored_whenever_it_is_set(tmp_path: Path, name: str, value: Any) -> None:
    trainer = make(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.warns(UserWarning, match=f"ignored, as there is neither a backward pass .*{name}="):
        trainer.train()
    assert trainer.step_log.exists()


def test_a_second_run_of_a_trainer_has_a_log_of_its_own(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    first = (tmp_path / "steps.jsonl").read_bytes()
    between = support.snapshot(trainer.model)
    trainer.train()
    assert trainer.step_log == tmp_path / "steps-2.jsonl"
    assert (tmp_path / "steps.jsonl").read_bytes() == first
    base = support.tiny_model()
    replay(tmp_path / "steps.jsonl", base)
    support.assert_same_bits(base, between)
    replay(tmp_path / "steps-2.jsonl", base)
    support.assert_same_bits(base, support.snapshot(trainer.model))
    trainer.train()
    assert read_log(tmp_path / "steps-3.jsonl").end is not None
    other = make(tmp_path)  # knows nothing of it, however often it is asked
    for _ in range(2):
        with pytest.raises(LogError, match="already holds a run"):
            other.train()


def test_a_second_run_that_was_killed_goes_on_from_the_base_model_or_from_the_first_runs(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    whole.train()
    stopped = trained(tmp_path / "killed")
    between = support.snapshot(stopped.model)
    stopped.add_callback(Kill(2))
    with pytest.raises(KilledError):
        stopped.train()
    shutil.copytree(tmp_path / "killed", tmp_path / "again")
    for folder, first in (("killed", None), ("again", between)):
        trainer = make(tmp_path / folder)
        if first is not None:
            trainer.model.load_state_dict(first)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.step_log.name == "steps-2.jsonl"
        support.assert_same_bits(trainer.model, support.snapshot(whole.model))


def test_numbers_that_are_set_later_may_be_text(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.args.learning_rate, trainer.args.eps = "2e-3", "1e-2"
    trainer.train()
    log = read_log(trainer.step_log)
    assert ({record.lr[0] for record in log.records}, log.header["eps"]) == ({2e-3}, 1e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("WORLD_SIZE", "WORLD_SIZE=2.*RANK=None does not say which"),
        ("OMPI_COMM_WORLD_SIZE", "2 processes.*SIZE=2.*torchrun"),
    ],
)
def test_a_launcher_that_does_not_say_which_process_this_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    """On CPUs torch would not even tell them apart."""
    trainer = make(tmp_path)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=words):
        config(tmp_path)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    monkeypatch.setenv(name, "1")
    assert config(tmp_path).world_size == 1


# --- hyperparameter search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["auto", 1e-4])
def test_trials_of_a_search_are_runs_with_their_own_settings_and_folders(
    tmp_path: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Trainer does it with any backend: a trial's values are put into the arguments when train() has begun."""
    # What describes a trial in reports knows those of installed backends alone.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    data = {"train_dataset": DATA, "eval_dataset": DATA[:4]}
    args = config(tmp_path, learning_rate=given, max_steps=3)
    trainer = MeZOTrainer(model_init=lambda: support.tiny_model(), args=args, objective=squares, **data)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trials = [{"learning_rate": 2.65e-05}, {"learning_rate": 3e-4, "seed": 5}, {"learning_rate": "auto", "probes": 2}]
    trainer.hp_space = lambda trial: trials[trial.number]
    trainer.hp_name = None
    losses = []
    for number, wanted in enumerate(trials):
        trainer.objective = None  # a name that Trainer's search uses for the number that it is after
        trainer.train(trial=SimpleNamespace(number=number, params=wanted))
        log = read_log(tmp_path / f"run-{number}" / "steps.jsonl")
        assert trainer.step_log == log.path
        rates = {record.lr[0] for record in log.records}
        assert rates == {wanted["learning_rate"]} or wanted["learning_rate"] == "auto"
        assert (log.steps, log.end["end"]) == (3, 3)
        assert log.header["seed"] == wanted.get("seed", 5 if number else 3)
        replayed = support.tiny_model()
        replay(log, replayed)
        support.assert_same_bits(trainer.model, support.snapshot(replayed))
        losses.append(log.records[0].loss)
    with torch.no_grad():  # of the objective, not of the model itself
        first = float(squares(support.tiny_model(), trainer.data_collator(DATA)).mean())
    assert losses == pytest.approx([first] * 3, rel=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1", "run-2"]
    with pytest.raises(ValueError, match="cannot be resumed"):
        trainer.train(resume_from_checkpoint=True, trial=SimpleNamespace(number=0, params={}))
    trainer.hp_search_backend = None
    trainer.args.learning_rate = 1e-3
    trainer.train()  # with what was best
    assert {record.lr[0] for record in read_log(tmp_path / "steps.jsonl").records} == {1e-3}


def test_trainer_needs_a_mezo_config_and_a_mezo(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="args=MeZOConfig"):
        MeZOTrainer(model=support.tiny_model(), args=plain, train_dataset=DATA)
    model = support.tiny_model()
    with pytest.raises(ValueError, match="cannot step SGD: pass a MeZO"):
        make(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters()), None))


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_a_trainer_that_would_backpropagate_learns_so_before_it_does(tmp_path: Path, kind: str) -> None:
    model = support.tiny_model()
    passes: list[str] = []
    model.register_forward_hook(lambda *_: passes.append("forward"))
    for parameter in model.parameters():
        parameter.register_hook(lambda _: passes.append("backward"))
    settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    made: dict[str, Any] = {"model": model, "optimizers": (MeZO(model), None)}
    if kind == "Trainer":
        trainer: Any = Trainer(args=TrainingArguments(**settings), train_dataset=DATA, **made)
    else:
        trl = pytest.importorskip("trl")
        rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in DATA])
        args = trl.SFTConfig(bf16=False, **settings)
        trainer = trl.SFTTrainer(args=args, train_dataset=rows, processing_class=support.tokenizer(), **made)
    with pytest.raises(RuntimeError, match=r"works by backpropagation.*MeZOTrainer"):
        trainer.train()
    assert not passes


@pytest.mark.parametrize(("rule", "buffered"), [("sgd", False), ("adam", True)])
def test_kernels_are_compiled_before_the_first_step(tmp_path: Path, monkeypatch, rule: str, buffered: bool) -> None:
    calls = []

    def compiling(weights: Any, **options: Any) -> None:
        calls.append(({weight.dtype for weight in weights}, options["buffered"], trainer.mezo.next_step))
        options["announce"]("compiling")

    monkeypatch.setattr("forwardtune.hf.trainer.compile_kernels", compiling)
    trainer = make(tmp_path, rule=rule, max_steps=1)
    said: list[str] = []
    trainer.automatic.announce = said.append
    trainer.train()
    assert calls == [({torch.float32}, buffered, 0)]
    assert said == ["compiling"]


def cosine(step: int) -> float:
    return step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ({}, lambda step: 1.0),
        ({"lr_scheduler_type": "linear"}, lambda step: 1 - step / STEPS),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 2}, cosine),
    ],
    ids=["constant", "linear", "cosine-with-warmup"],
)
def test_schedules_put_their_learning_rate_into_the_log(
    tmp_path: Path, schedule: dict[str, Any], factor: Callable[[int], float]
) -> None:
    trainer = trained(tmp_path, **schedule)
    logged = [record.lr[0] for record in read_log(trainer.step_log).records]
    assert logged == pytest.approx([1e-3 * factor(step) for step in range(STEPS)], rel=1e-12)


def test_weight_decay_spares_norms_and_biases(tmp_path: Path) -> None:
    """Coefficients are clipped to nothing, so that decay is all that moves the weights."""
    changes = {"weight_decay": 0.5, "learning_rate": 0.1, "clip_coefficient": 1e-30, "max_steps": 1, "move": "all"}
    trainer = trained(tmp_path, model=support.tiny_model("gpt2"), **changes)
    header = read_log(trainer.step_log).header
    assert header["groups"] == [{"weight_decay": 0.5}, {"weight_decay": 0.0}]
    spared = {tensor["name"] for tensor in header["tensors"] if tensor["group"] == 1}
    after = dict(trainer.model.named_parameters())
    for name, before in support.tiny_model("gpt2").named_parameters():
        assert (name in spared) == ("ln" in name or name.endswith("bias"))
        # 1e-30 * lr * |z| is all that the direction adds, also to a bias of zero.
        factor = 1.0 if name in spared else 0.95
        torch.testing.assert_close(after[name].data, before.data * factor, rtol=1e-6, atol=1e-30)


# --- what Trainer offers -----------------------------------------------------------------------------------------

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST = {**EVALUATED, "load_best_model_at_end": True, "max_steps": 6}


def test_best_model_is_loaded_at_the_end_and_the_log_still_holds_the_last(tmp_path: Path) -> None:
    trainer = trained(tmp_path, **BEST)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert best["step"] != 6  # the learning rate is so large that the loss rises
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    for steps in (best["step"], 6):
        model = support.tiny_model()
        assert replay(trainer.step_log, model, steps=steps) == steps
        saved = load_file(tmp_path / f"checkpoint-{steps}" / "model.safetensors")
        assert all(support.same_bits(model.state_dict()[name], tensor) for name, tensor in saved.items())
        if steps == best["step"]:
            support.assert_same_bits(trainer.model, support.snapshot(model))
    assert read_log(trainer.step_log).end is not None


def test_early_stopping_and_other_callbacks_work(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    # No improvement is as large as the threshold, so the second evaluation ends the run.
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    trainer = trained(tmp_path, callbacks=[stopping, Watch()], **{**BEST, "max_steps": 10})
    assert seen == [1, 2, 3, 4]
    log = read_log(trainer.step_log)
    assert (log.steps, log.end["end"]) == (4, 4)


def test_reports_carry_the_projected_gradient_and_no_gradient_norm(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trained(tmp_path, report_to=["tensorboard"], logging_strategy="steps", logging_steps=1)
    records = read_log(trainer.step_log).records
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["projected_gradient"] for entry in entries] == [abs(record.coefficients[0]) for record in records]
    # Trainer rounds what it logs to four digits or more.
    assert [entry["loss"] for entry in entries] == pytest.approx([record.loss for record in records], abs=1e-4)
    assert not any("grad_norm" in entry for entry in entries)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/projected_gradient", "train/learning_rate"} <= tags
    assert not any("grad_norm" in tag for tag in tags)
    assert [event.step for event in events.Scalars("train/projected_gradient")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": "auto", "eps": "auto", "max_steps": 40, "rule": "momentum"}, {"probes": 2}, BEST],
    ids=["found", "given", "best-step"],
)
def test_model_card_says_what_was_done_and_how_to_do_it_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = trained(tmp_path, **changes)
    trainer.create_model_card(model_name="tiny", tags="mezo")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    log = read_log(trainer.step_log)
    for wrong in ("adamw", "betas", "learning_rate: auto", "eps: auto"):
        assert wrong not in card.lower()
    rates = [max(record.lr) for record in log.records]
    for right in (
        "- method: MeZO",
        f"- rule: {changes.get('rule', 'sgd')}",
        f"- learning_rate: {rates[0]:.3g}",
        f"{rates[-1]:.3g}",
        f"- eps: {log.header['eps']:.3g}",
        f"probes a step: {changes.get('probes', 1)}, gaussian",
        "- train_batch_size: 4",
        f"- training_steps: {log.steps}",
        log.header["base"],
        log.end["digest"],
        "### Framework versions",
    ):
        assert right in card
    assert ("found by the run" in card) == ("eps" in changes)
    (call,) = [line for line in card.splitlines() if line.startswith("replay(")]
    model = support.tiny_model()
    exec(call.replace("steps.jsonl", str(trainer.step_log)), {"replay": replay, "model": model})
    support.assert_same_bits(model, support.snapshot(trainer.model))


def test_model_card_of_an_untrained_model_is_transformers_own(tmp_path: Path) -> None:
    make(tmp_path).create_model_card()
    assert "MeZO" not in (tmp_path / "README.md").read_text(encoding="utf-8")


# --- resuming ----------------------------------------------------------------------------------------------------

# Everything that changes from step to step: position in the data (three steps an epoch), schedule, checkpoints.
LONG = {"lr_scheduler_type": "linear", "weight_decay": 0.1, "probes": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and log of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = trained(folder, **LONG)
    return support.snapshot(trainer.model), log_lines(folder)


@pytest.mark.parametrize("saving", [{}, SAVED], ids=["log-alone", "checkpoints"])
@pytest.mark.parametrize("after", [(1,), (2,), (3,), (4,), (7,), (2, 3, 5)], ids=str)
def test_interrupted_run_ends_in_the_same_bits(
    tmp_path: Path, uninterrupted: Any, saving: dict[str, Any], after: tuple[int, ...]
) -> None:
    killed(tmp_path, *after, **LONG, **saving)
    assert read_log(tmp_path / "steps.jsonl").steps == after[-1]
    trainer = resumed(tmp_path, **LONG, **saving)
    weights, lines = uninterrupted
    support.assert_same_bits(trainer.model, weights)
    assert log_lines(tmp_path) == lines
    assert trainer.state.global_step == STEPS


def test_same_trainer_resumes_once_its_model_is_the_base_again(tmp_path: Path, uninterrupted: Any) -> None:
    trainer = make(tmp_path, callbacks=[Kill(3)], **LONG)
    with pytest.raises(KilledError):
        trainer.train()
    trainer.pop_callback(Kill)
    trainer.model.load_state_dict(support.tiny_model().state_dict())
    trainer.train(resume_from_checkpoint=True)
    support.assert_same_bits(trainer.model, uninterrupted[0])
    assert log_lines(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("torn", ["steps.jsonl", "checkpoint-5"])
def test_what_the_kill_cut_short_is_not_used(tmp_path: Path, uninterrupted: Any, torn: str) -> None:
    """A torn last line is a step not taken."""
    killed(tmp_path, 5, **LONG, **SAVED)
    if torn == "steps.jsonl":
        (tmp_path / torn).write_bytes((tmp_path / torn).read_bytes()[:-20])
    else:
        (tmp_path / torn).mkdir()
        (tmp_path / torn / "model.safetensors").write_bytes(b"torn")
    trainer = resumed(tmp_path, **LONG, **SAVED)
    support.assert_same_bits(trainer.model, uninterrupted[0])
    assert log_lines(tmp_path) == uninterrupted[1]


def test_resuming_from_a_checkpoint_cuts_the_log_and_keeps_what_it_cuts(tmp_path: Path, uninterrupted: Any) -> None:
    killed(tmp_path, 6, **LONG, **SAVED)
    before = (tmp_path / "steps.jsonl").read_bytes().splitlines(keepends=True)
    trainer = resumed(tmp_path, str(tmp_path / "checkpoint-2"), **LONG, **SAVED)
    assert (tmp_path / "steps.cut.jsonl").read_bytes() == b"".join(before[1 + 2 :])
    support.assert_same_bits(trainer.model, uninterrupted[0])
    assert log_lines(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("name", ["checkpoint-3", "elsewhere"])
def test_what_is_no_checkpoint_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    killed(tmp_path, 5, **SAVED)
    before = (tmp_path / "steps.jsonl").read_bytes()
    with pytest.raises(LogError, match=f"{name} is not a complete checkpoint"):
        resumed(tmp_path, str(tmp_path / name), **SAVED)
    assert (tmp_path / "steps.jsonl").read_bytes() == before


@pytest.mark.parametrize("end_line", [True, False], ids=["closed", "killed-before-the-end-line"])
def test_completed_run_takes_no_further_step(tmp_path: Path, uninterrupted: Any, end_line: bool) -> None:
    trained(tmp_path, **LONG)
    log = tmp_path / "steps.jsonl"
    whole = log.read_bytes()
    if not end_line:
        log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    trainer = resumed(tmp_path, **LONG)
    support.assert_same_bits(trainer.model, uninterrupted[0])
    assert trainer.state.global_step == STEPS
    assert log.read_bytes() == whole
    assert not list(tmp_path.glob("checkpoint-*"))


def test_completed_run_is_extended_by_more_steps(tmp_path: Path) -> None:
    trained(tmp_path / "a", max_steps=3)
    longer = resumed(tmp_path / "a", max_steps=STEPS)
    support.assert_same_bits(longer.model, support.snapshot(trained(tmp_path / "b").model))
    steps = [line["step"] for line in log_lines(tmp_path / "a") if "step" in line]
    assert steps == list(range(STEPS))
    replayed = support.tiny_model()
    replay(longer.step_log, replayed)
    support.assert_same_bits(replayed, support.snapshot(longer.model))


@pytest.mark.parametrize("after", [3, 4, 6, None], ids=str)
def test_best_model_survives_a_kill_between_a_step_and_its_checkpoint(tmp_path: Path, after: int | None) -> None:
    """And the resuming of a run that is complete."""
    whole = trained(tmp_path / "whole", **BEST)
    if after is None:
        trainer = resumed(tmp_path / "whole", **BEST)
        support.assert_same_bits(trainer.model, support.snapshot(whole.model))
        return
    killed(tmp_path / "killed", after, **BEST)
    trainer = resumed(tmp_path / "killed", **BEST)
    support.assert_same_bits(trainer.model, support.snapshot(whole.model))
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")
    losses = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (whole, trainer)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert trainer.state.best_metric == whole.state.best_metric
    assert Path(trainer.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name


def test_folder_with_another_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no such file"):
        resumed(tmp_path)
    killed(tmp_path, 2)
    before = (tmp_path / "steps.jsonl").read_bytes()
    with pytest.raises(LogError, match=r"already holds a run.*nothing was overwritten"):
        trained(tmp_path)
    for changes, words in (
        ({"eps": 1e-2}, "belongs to another run: eps is 0.001 in the log, 0.01 here"),
        ({"seed": 4}, "belongs to another run: seed"),
        ({"weight_decay": 0.5}, "belongs to another run: groups"),
        ({"model": support.tiny_model(dtype=torch.bfloat16)}, "belongs to another run: .* is float32"),
        ({"model": support.tiny_model(seed=1)}, "not the weights that the run .* began with"),
    ):
        with pytest.raises(LogError, match=words):
            resumed(tmp_path, **changes)
    assert (tmp_path / "steps.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("moved", [False, True], ids=["in-its-own-folder", "copied-into-this-one"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, moved: bool) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    killed(ours, 6, **SAVED)
    killed(other, 5, seed=4, **SAVED)
    checkpoint = other / "checkpoint-2"
    if moved:
        shutil.rmtree(ours / "checkpoint-2")
        checkpoint = shutil.copytree(checkpoint, ours / "checkpoint-2")
    before = (ours / "steps.jsonl").read_bytes()
    with pytest.raises(LogError, match=r"checkpoint-2 is not a .*checkpoint of the run"):
        resumed(ours, str(checkpoint), **SAVED)
    assert (ours / "steps.jsonl").read_bytes() == before


def test_a_checkpoint_is_known_by_any_name_of_its_folder(
    tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path / "run", 5, **LONG, **SAVED)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    trainer = resumed(Path("run"), str(tmp_path / "link" / "checkpoint-4"), **LONG, **SAVED)
    support.assert_same_bits(trainer.model, uninterrupted[0])


def test_checkpoints_of_steps_that_were_cut_off_are_not_used(tmp_path: Path) -> None:
    """Steps 2 to 4 are taken again with other losses, and killed before the checkpoint of step 4 is written again."""
    killed(tmp_path, 5, **SAVED)
    other = {"objective": lambda model, inputs: squares(model, inputs) * 2, **SAVED}
    trainer = make(tmp_path, callbacks=[Kill(4)], **other)
    with pytest.raises(KilledError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer = resumed(tmp_path, **other)
    replayed = support.tiny_model()
    assert replay(trainer.step_log, replayed) == STEPS
    support.assert_same_bits(trainer.model, support.snapshot(replayed))


@pytest.mark.parametrize("wanted", [None, True, "checkpoint-2"])
def test_two_trainers_do_not_share_a_folder(tmp_path: Path, uninterrupted: Any, wanted: Any) -> None:
    """The second is refused before it reads, cuts or measures anything, and the first goes on."""
    changes = {**LONG, **SAVED}
    wanted = str(tmp_path / wanted) if isinstance(wanted, str) else wanted
    told: list[str] = []

    class Second(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                before = (tmp_path / "steps.jsonl").read_bytes()
                with pytest.raises(LogError, match="being written by another process") as refused:
                    resumed(tmp_path, wanted, **changes)
                told.append(str(refused.value))
                assert (tmp_path / "steps.jsonl").read_bytes() == before

    trainer = trained(tmp_path, callbacks=[Second()], **changes)
    assert len(told) == 1
    support.assert_same_bits(trainer.model, uninterrupted[0])
    assert log_lines(tmp_path) == uninterrupted[1]
    assert not list(tmp_path.glob("*.lock"))


def stream(shuffled: bool) -> Any:
    """Ten rows without a length: three batches of four."""
    rows = Dataset.from_list(DATA[:10]).to_iterable_dataset()
    return rows.shuffle(seed=1, buffer_size=10) if shuffled else rows


@pytest.mark.parametrize(
    ("changes", "kills", "shuffled"),
    [
        ({}, (2,), True),
        ({}, (3,), False),
        ({}, (4, 6), True),
        (SAVED, (5,), False),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, (3, 5), True),
        ({"learning_rate": "auto", "max_steps": 40}, (5,), False),
        ({"learning_rate": "auto", "max_steps": 40}, (11,), True),
    ],
    ids=["first-pass", "end-of-a-pass", "twice", "checkpoint", "accumulation", "held", "found"],
)
def test_run_on_data_without_a_length_is_resumed_at_its_batch(
    tmp_path: Path, changes: dict[str, Any], kills: tuple[int, ...], shuffled: bool
) -> None:
    """Also if the kill came between the last step of a pass and the note that the next one begins."""
    whole = trained(tmp_path / "whole", data=stream(shuffled), **changes)
    folder = tmp_path / "killed"
    for number, after in enumerate(kills):
        trainer = make(folder, data=stream(shuffled), callbacks=[Kill(after)], **changes)
        with pytest.raises(KilledError):
            trainer.train(resume_from_checkpoint=number > 0 or None)
    trainer = resumed(folder, data=stream(shuffled), **changes)
    support.assert_same_bits(trainer.model, support.snapshot(whole.model))
    assert log_lines(folder) == log_lines(tmp_path / "whole")


def test_a_step_takes_no_batch_of_another_pass(tmp_path: Path) -> None:
    """Five microbatches in a pass, two a step: the fifth is left out, and not added to the next pass's first two."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = trained(tmp_path, data=stream(False), learning_rate=1e-9, **changes)
    losses = [record.loss for record in read_log(trainer.step_log).records]
    with torch.no_grad():
        batches = [trainer.data_collator(DATA[i : i + 4]) for i in (0, 4, 0)]
        expected = [float(squares(support.tiny_model(), batch).mean()) for batch in batches]
    assert losses == pytest.approx(expected, rel=1e-2)


def test_passes_of_different_lengths_are_not_resumed(tmp_path: Path) -> None:
    class Uneven(torch.utils.data.IterableDataset[Any]):
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter(DATA[: 4 * self.passes])

    killed(tmp_path, 5, data=Uneven())
    with pytest.raises(LogError, match=r"different numbers of steps \(1, 2\).*ignore_data_skip"):
        resumed(tmp_path, data=Uneven())
    assert resumed(tmp_path, data=Uneven(), ignore_data_skip=True).state.global_step == STEPS


@pytest.mark.parametrize("own", [True, False], ids=["own-optimizer", "optimizer-made-by-hand"])
@pytest.mark.parametrize("saving", [{}, SAVED], ids=["log-alone", "checkpoints"])
def test_another_learning_rate_holds_from_where_a_run_is_resumed(
    tmp_path: Path, saving: dict[str, Any], own: bool
) -> None:
    changes = {"lr_scheduler_type": "linear", **saving}
    told: list[str] = []

    def trainer(lr: float, **more: Any) -> MeZOTrainer:
        model = support.tiny_model()
        optimizers = {} if own else {"optimizers": (MeZO(model, lr=lr, seed=3), None)}
        made = make(tmp_path, model=model, learning_rate=lr, **optimizers, **changes, **more)
        made.automatic.announce = told.append
        return made

    with pytest.raises(KilledError):
        trainer(1e-3, callbacks=[Kill(2)]).train()
    with pytest.raises(KilledError):
        trainer(1e-3, callbacks=[Kill(4)]).train(resume_from_checkpoint=True)
    assert not told
    second = trainer(5e-4)
    second.train(resume_from_checkpoint=True)
    logged = [record.lr[0] for record in read_log(second.step_log).records]
    assert logged == pytest.approx([(1e-3 if step < 4 else 5e-4) * (1 - step / STEPS) for step in range(STEPS)])
    (text,) = told
    assert "changes with step 4" in text
    assert f"{1e-3 * 4 / 7:.1e}" in text
    assert f"{5e-4 * 4 / 7:.1e}" in text
    replayed = support.tiny_model()
    replay(second.step_log, replayed)
    support.assert_same_bits(second.model, support.snapshot(replayed))


def test_a_model_saved_without_its_optimizer_is_no_obstacle_to_resuming(tmp_path: Path, uninterrupted: Any) -> None:
    saving = {**SAVED, "save_only_model": True}
    killed(tmp_path, 5, **LONG, **saving)
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    trainer = make(tmp_path, callbacks=[Kill(6)], **LONG, **saving)
    with pytest.raises(KilledError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = resumed(tmp_path, **LONG, **saving)
    support.assert_same_bits(trainer.model, uninterrupted[0])
    assert log_lines(tmp_path) == uninterrupted[1]


def test_schedule_that_depends_on_evaluations_resumes_from_checkpoints_alone(tmp_path: Path) -> None:
    plateau = {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 6}
    whole = trained(tmp_path / "whole", **plateau)
    folder = tmp_path / "killed"
    killed(folder, 5, **plateau)
    with pytest.raises(LogError, match=r"depends on evaluations.*checkpoint-4"):
        resumed(folder, **plateau)
    with pytest.raises(LogError, match=r"leave learning_rate at 0\.001"):
        resumed(folder, str(folder / "checkpoint-4"), learning_rate=1e-4, **plateau)
    trainer = resumed(folder, str(folder / "checkpoint-4"), **plateau)
    support.assert_same_bits(trainer.model, support.snapshot(whole.model))


def test_a_tuned_model_keeps_its_own_cache_setting(tmp_path: Path) -> None:
    """Trainer switches it off while it trains."""
    trainer = make(tmp_path, max_steps=1)
    assert trainer.model.config.use_cache
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    assert read(tmp_path / "tuned" / "config.json")["use_cache"]
