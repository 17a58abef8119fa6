"""Every option of ``train`` reaches what is built of it.

The options are the declared settings: one that is added and not listed here fails the first test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from forwardtune import StratifiedSampler, config
from forwardtune.cli import methods
from forwardtune.cli.dev import DevWatcher
from forwardtune.cli.session import Session, open_session
from forwardtune.cli.tuned import losses_of_walk
from forwardtune.hf.config import MeZOConfig
from forwardtune.hf.trainer import MeZOTrainer
from forwardtune.paper.baselines import AdamTrainer
from forwardtune.storage import home_of
from forwardtune.trajectory import read_log
from support.command import cli, flags, read, write_jsonl


@dataclass
class Built:
    """What came of a command line.

    Attributes:
        trainer: the trainer, after its training.
        log: the step log's header, and the run's description in it.
    """

    session: Session
    trainer: Any
    metrics: dict[str, Any]
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def mezo(self) -> Any:
        return self.trainer.mezo

    @property
    def lora(self) -> Any:
        return self.trainer.model.peft_config["default"]

    @property
    def dev(self) -> Any:
        return next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, DevWatcher))

    def lengths(self, split: str) -> int:
        return len(self.session.splits[split])


def _is_orthogonal(rows: torch.Tensor) -> bool:
    products = rows @ rows.T
    return torch.allclose(products, torch.eye(len(rows)) * products[0, 0], atol=1e-6)


See = Callable[[Built], Any]
# run -> option -> (a value that is not the default, what to look at, what is there)
CASES: dict[str, dict[str, tuple[Any, See, Any]]] = {
    "quantised": {
        "quantize": ("int8", lambda b: {type(p.data).__name__ for p in b.trainer.model.parameters()}, {"Tensor", "Int8Tensor"}),
        "tune": ("lora", lambda b: b.lora.peft_type.value, "LORA"),
        "sparsity": (0.5, lambda b: None in b.mezo.noise.emphasis.limits, False),
        "probes_rise": (2, lambda b: b.mezo.probes_rise, 2),
        "steps": (2, lambda b: b.trainer.state.global_step, 2),
    },
    "lora": {
        "model": ("MODEL", lambda b: Path(b.trainer.model.config._name_or_path).name, "MODEL"),
        "task": ("mine.yaml", lambda b: b.session.task.name, "mine"),
        "streaming": (True, lambda b: b.session.task.streaming, True),
        "data_dir": ("elsewhere", lambda b: {e.example.row["place"] for e in b.session.splits["train"]}, {"elsewhere"}),
        "dtype": ("bfloat16", lambda b: b.trainer.model.get_input_embeddings().weight.dtype, torch.bfloat16),
        "device": ("cpu", lambda b: b.trainer.args.use_cpu, True),
        "attn_implementation": ("eager", lambda b: b.trainer.model.config._attn_implementation, "eager"),
        "max_length": (24, lambda b: max(e.length for split in b.session.splits.values() for e in split), 24),
        "train_examples": (7, lambda b: b.lengths("train"), 7),
        "dev_examples": (5, lambda b: b.lengths("dev"), 5),
        "test_examples": (4, lambda b: b.lengths("test"), 4),
        "on_bad_row": ("skip", lambda b: b.session.skipped, {"train": 1, "dev": 1}),
        "batch_size": (3, lambda b: b.trainer.args.train_batch_size, 3),
        "seed": (5, lambda b: (b.trainer.args.seed, b.mezo.noise.seed), (5, 5)),
        "objective": ("accuracy + 0.5 * loss", lambda b: [(t.weight, t.name) for t in b.trainer.step_losses.objective.terms],
                      [(1.0, "accuracy"), (0.5, "loss")]),
        "class_weights": ("0=3,1=1", lambda b: [round(w / b.session.task.class_weights[1], 6) for w in b.session.task.class_weights],
                          [3.0, 1.0]),
        "tune": ("lora", lambda b: b.lora.peft_type.value, "LORA"),
        "lora_rank": (3, lambda b: b.lora.r, 3),
        "lora_alpha": (0.5, lambda b: {m.scaling["default"] for m in b.trainer.model.modules() if hasattr(m, "scaling") and
                                       isinstance(m.scaling, dict)}, {0.5 / 3}),
        "lora_targets": ("k_proj, down_proj", lambda b: set(b.lora.target_modules), {"k_proj", "down_proj"}),
        "lora_init": ("eva", lambda b: all(_is_orthogonal(p) for n, p in b.trainer.model.named_parameters() if "lora_A" in n), True),
        "freeze_a": (True, lambda b: {".lora_B." in tensor.name for tensor in b.mezo.tuned}, {True}),
        "steps": (4, lambda b: (b.trainer.args.max_steps, b.mezo.next_step), (4, 4)),
        "lr": (3e-4, lambda b: b.trainer.args.learning_rate, 3e-4),
        "eps": (2e-3, lambda b: b.mezo.estimator.eps, 2e-3),
        "probes": (3, lambda b: b.mezo.estimator.probes, 3),
        "estimator": ("one_sided", lambda b: b.mezo.estimator.name, "one_sided"),
        "normalize": ("sigma", lambda b: b.mezo.estimator.normalize, "sigma"),
        "rule": ("momentum", lambda b: b.mezo.rule.name, "momentum"),
        "momentum": (0.7, lambda b: b.mezo.rule.momentum, 0.7),
        "rule_state": ("window", lambda b: b.mezo.rule.state, "window"),
        "direction": ("rademacher", lambda b: b.mezo.noise.direction.name, "rademacher"),
        "rank": (2, lambda b: b.mezo.noise.structure.rank, 2),
        "refresh": (3, lambda b: b.mezo.noise.structure.refresh, 3),
        "active_layers": (1, lambda b: b.mezo.noise.emphasis.active, 1),
        "modify": ("variance", lambda b: len(b.mezo.noise.emphasis.moved) == len(b.mezo.tuned), True),
        "modify_by": ("gradients", lambda b: b.mezo.weighting.modify_by, "gradients"),
        "perturbation": ("copy", lambda b: b.mezo.perturbation.name, "copy"),
        "weight_decay": (0.02, lambda b: {group["weight_decay"] for group in b.mezo.param_groups}, {0.02}),
        "decay_towards": ("base", lambda b: b.mezo.rule.decay_towards, "base"),
        "lr_scheduler": ("linear", lambda b: b.trainer.args.lr_scheduler_type.value, "linear"),
        "move": ("all", lambda b: b.mezo.move, "all"),
        "clip_coefficient": (0.5, lambda b: b.mezo.clip_coefficient, 0.5),
        "average": ("last:2", lambda b: b.metrics["average"], "last:2"),
        "parts": (2, lambda b: b.mezo.parts, 2),
        "worker_timeout": (90.0, lambda b: b.trainer.args.worker_timeout, 90.0),
        "eval_steps": (2, lambda b: b.dev._every, 2),
        "patience": (3, lambda b: b.dev._patience, 3),
        "save_steps": (3, lambda b: (b.trainer.args.save_strategy.value, b.trainer.args.save_steps), ("steps", 3)),
        "report_to": ("tensorboard", lambda b: (b.trainer.args.report_to, b.trainer.args.logging_steps), (["tensorboard"], 1)),
        "no_before": (True, lambda b: "before" in b.metrics, False),
    },
    "walked": {
        "tune": ("lora", lambda b: b.lora.peft_type.value, "LORA"),
        "lora_targets": ("late-down", lambda b: {n.split(".")[-1] for n in b.lora.target_modules}, {"down_proj"}),
        "lora_init": ("feedback", lambda b: all(p.any() for n, p in b.trainer.model.named_parameters() if "lora_B" in n), True),
        "feedback_steps": (3, lambda b: b.metrics["settings"]["feedback_steps"], 3),
        "prompt_loss_weight": (0.2, lambda b: losses_of_walk(b.session)[1]._weight, 0.2),
        "lr": (1e-3, lambda b: b.trainer.args.learning_rate, 1e-3),
        "steps": (2, lambda b: b.mezo.next_step, 2),
    },
    "rewarded": {
        "task": ("free.yaml", lambda b: b.session.task.name, "free"),
        "objective": ("option_rewards.py:short", lambda b: b.trainer.step_losses.objective.generates, True),
        "temperature": (0.7, lambda b: b.trainer.step_losses.objective._sampling.temperature, 0.7),
        "log_completions": (2, lambda b: b.trainer.step_losses.objective._sample_steps, 2),
        "seed": (5, lambda b: b.trainer.step_losses.objective._sampling.seed, 5),
        "tune": ("prefix", lambda b: b.lora.peft_type.value, "PREFIX_TUNING"),
        "prefix_length": (3, lambda b: b.lora.num_virtual_tokens, 3),
        "rule": ("adam", lambda b: b.mezo.rule.name, "adam"),
        "rule_state": ("exact", lambda b: b.mezo.rule.state, "exact"),
        "steps": (2, lambda b: b.mezo.next_step, 2),
    },
    "examples": {
        "offload": ("disk", lambda b: {type(home_of(p)).__name__ for p in b.trainer.model.parameters()}, {"OnDisk"}),
        "data": ("one.jsonl", lambda b: [b.lengths(s) for s in ("train", "dev", "test")], [12, 4, 4]),
        "assignment": ("example", lambda b: (b.mezo.estimator.assignment, b.mezo.perturbation.name), ("example", "both_signs")),
        "rank": (2, lambda b: b.mezo.noise.structure.rank, 2),
        "refresh": (3, lambda b: b.mezo.noise.structure.refresh, 3),
        "probes_per_pass": (2, lambda b: b.mezo.perturbation.probes, 2),
        "group_size": (3, lambda b: b.mezo.estimator.group_size, 3),
        "stratify": ("label", lambda b: type(b.trainer._get_train_sampler()), StratifiedSampler),
        "epochs": (2.0, lambda b: b.mezo.next_step, 2),
    },
    "timed": {  # it stops before its first step
        "tune": (r"layers\.1\.", lambda b: sum(p.requires_grad for p in b.session.model.parameters()), 9),
        "assignment": ("example", lambda b: b.mezo.estimator.assignment, "example"),
        "refresh": (2, lambda b: b.mezo.noise.structure.refresh, 2),
        "fold": ("refresh", lambda b: b.mezo.pending is not None, True),
        "per_class": (3, lambda b: [b.lengths(split) for split in ("train", "dev")], [6, 6]),
        "time_budget": ("60s", lambda b: (b.session.deadline is not None, b.session.options.steps > 10), (True, True)),
    },
    "adam": {
        "general_text": ("packaged", lambda b: (b.metrics["general_text"]["text"], b.metrics["general_text"]["tokens"] > 4000),
                         ("packaged", True)),
        "method": ("adam", lambda b: type(b.trainer), AdamTrainer),
        "stratify": ("label", lambda b: type(b.trainer._get_train_sampler()), StratifiedSampler),
        "batch_size": (3, lambda b: b.trainer.args.train_batch_size, 3),
        "steps": (2, lambda b: b.trainer.state.global_step, 2),
        "lr": (3e-4, lambda b: b.trainer.args.learning_rate, 3e-4),
        "lr_scheduler": ("cosine", lambda b: b.trainer.args.lr_scheduler_type.value, "cosine"),
        "weight_decay": (0.02, lambda b: {group["weight_decay"] for group in b.trainer.optimizer.param_groups}, {0.0, 0.02}),
        "seed": (5, lambda b: b.trainer.args.seed, 5),
        "device": ("cpu", lambda b: b.trainer.args.use_cpu, True),
        "eval_steps": (1, lambda b: b.dev._every, 1),
        "patience": (3, lambda b: b.dev._patience, 3),
    },
}  # fmt: skip


def test_every_option_is_listed_with_a_value_that_is_not_its_default() -> None:
    declared = config.options(config.Train)
    assert {option for case in CASES.values() for option in case} == set(declared)
    for case in CASES.values():
        for option, (value, _, _) in case.items():
            assert value != declared[option].default, option


def test_trainer_has_the_same_settings_with_the_same_defaults(tmp_path: Path) -> None:
    made = MeZOConfig(output_dir=str(tmp_path))
    declared = config.arguments(config.Train())
    del declared["seed"]  # transformers' own
    assert {name: getattr(made, name) for name in declared} == declared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two tasks and their data, one row of which is bad."""
    folder = tmp_path_factory.mktemp("options")
    support.save_tiny_model(folder / "MODEL")
    for place in (folder, folder / "elsewhere"):
        place.mkdir(exist_ok=True)
        texts = [f"{i} {text} {text} {text} {text}" for i, text in enumerate(support.TEXT * 4)]
        rows = [{"text": text, "label": i % 2, "place": place.name} for i, text in enumerate(texts)]
        bad = [{**rows[0], "text": ""}] if place.name == "elsewhere" else []
        for split, some in (("train", [*rows[:20], *bad]), ("test", rows[20:])):
            write_jsonl(place / f"{split}.jsonl", some)
    data = "train: train.jsonl\ntest: test.jsonl\n"
    write_jsonl(folder / "one.jsonl", rows[:20])
    (folder / "mine.yaml").write_text(f"prompt: '{{text}} It was'\nanswers: {{0: terrible, 1: great}}\n{data}")
    (folder / "free.yaml").write_text(f"prompt: '{{text}} It was'\nmax_new_tokens: 3\n{data}")
    (folder / "option_rewards.py").write_text("def short(completions):\n    return [-len(c) for c in completions]\n")
    return folder


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, Built]:
    """What is built of each case's command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        without = () if find_spec("torchao") else ("quantised",)
        return {name: build(name, folder, patch) for name in CASES if name not in without}


def build(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Built:
    seen: dict[str, Any] = {}
    method = "adam" if name == "adam" else "mezo"
    real, trainer = methods.METHODS[method], AdamTrainer if method == "adam" else MeZOTrainer

    def noted(session: Session, *arguments: Any) -> Any:
        seen["session"] = session
        return None if name == "timed" else real(session, *arguments)

    class Noted(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen["trainer"] = self

    Noted.__name__ = trainer.__name__
    with patch.context() as here:
        here.setitem(methods.METHODS, method, noted)
        here.setattr(f"{trainer.__module__}.{trainer.__name__}", Noted)
        if method == "adam":
            here.setattr("forwardtune.paper.baselines.AdamTrainer", Noted)
        options = {"model": "MODEL", "task": "mine.yaml", "output_dir": folder / name}
        options |= {option: value for option, (value, _, _) in CASES[name].items()}
        if name == "rewarded":
            options |= {"lr": 1e-3, "eps": 1e-3}
        ran = cli("train", *flags(options))
    assert ran.code == (130 if name == "timed" else 0), ran.err
    metrics = read(folder / name)
    log = read_log(folder / name / "steps.jsonl").header["run"] if (folder / name / "steps.jsonl").exists() else {}
    return Built(seen["session"], seen.get("trainer"), metrics, log)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, case in CASES.items() for option in case])
def test_option_reaches_what_is_built(built: dict[str, Built], folder: Path, name: str, option: str) -> None:
    if name not in built:
        pytest.skip("needs torchao")
    value, look, expected = CASES[name][option]
    found = look(built[name])
    assert issubclass(found, expected) if option == "method" else found == expected, found
    if built[name].log:
        written = built[name].log[option]
        assert written == (str(folder / str(value)) if option in ("model", "task", "data", "data_dir") else value)


def test_seed_draws_the_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    def drawn(seed: int) -> list[str]:
        options = config.Train(model="MODEL", task="mine.yaml", device="cpu", train_examples=7, seed=seed)
        return [e.example.row["text"] for e in open_session(options, "train").splits["train"]]

    assert drawn(0) == drawn(0) != drawn(1)
