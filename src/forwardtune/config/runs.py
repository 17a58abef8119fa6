"""The settings of every command that runs something, each declared once."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .. import names
from ..averages import FORMS, NONE, average_or_auto
from ..durations import seconds_of
from ..errors import nearest
from .option import AUTO, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, NumberOrAuto, option, options

#: Version of the files of ``--config``; one that does not say has this.
SCHEMA = 1
#: Steps of a run that is told neither steps nor time.
STEPS = 1000
#: Where transformers lets a polynomial schedule end.
POLYNOMIAL_END = 1e-7


def trackers(text: str) -> str:
    """Names of what a run is reported to, by commas. Raises ValueError for another one."""
    named = [part.strip() for part in text.split(",") if part.strip()]
    for name in named:
        if name not in names.TRACKERS:
            raise ValueError(f"{name!r} is none of {', '.join(names.TRACKERS)}{nearest(name, names.TRACKERS)}")
    return ",".join(named)


@dataclass
class Data:
    """What is evaluated on what."""

    model: str | None = option(
        None, "hub id, local folder, .gguf file, or smollm2-135m (embedded)", required=True, is_place=True
    )
    task: str | None = option(
        None, "a task of the package, such as sst2 or reviews, or a task file (.yaml)", required=True, is_place=True
    )
    data_dir: str | None = option(
        None, "folder with files named after the task's splits, instead of the hub", is_place=True, free=True
    )
    data: str | None = option(
        None,
        "the examples: a file, folder, pattern, or data set of the hub (NAME, NAME:CONFIG, NAME@REVISION)",
        shown="the task's own",
        is_place=True,
        free=True,
    )
    streaming: bool = option(False, "read the first 10,000 rows alone, of data that are large")
    dtype: str = option("auto", "auto (as stored), float32, bfloat16 or float16")
    quantize: str | None = option(
        None, "quantise the model as it is loaded", shown="as stored", choices=names.QUANTISATIONS
    )
    offload: str | None = option(
        None,
        "where weights live that the device has no room for: cpu (the host's memory), disk (a private file of the run)",
        shown="on the device",
        choices=names.OFFLOADS,
        free=True,
    )
    device: str | None = option(
        None, "cpu, cuda, mps, or auto to spread over devices", shown="cuda if there is one", free=True
    )
    attn_implementation: str | None = option(
        None,
        "eager, sdpa, flash_attention_2 or another that transformers knows",
        shown="the fastest that is installed and works: FlashAttention on a GPU, or sdpa",
    )
    batch_size: int = option(
        16, "examples in a minibatch", bounds=POSITIVE, defaults={"adam": 8}, argument="per_device_train_batch_size"
    )
    max_length: int = option(2048, "longest input in tokens; contexts are cut on the left", bounds=POSITIVE)
    train_examples: int = option(1000, "training examples, drawn by the seed", bounds=POSITIVE)
    dev_examples: int | None = option(
        None, "development examples, drawn from the same data", shown="task's own", bounds=NOT_NEGATIVE
    )
    test_examples: int = option(1000, "test examples, the same for every seed", bounds=POSITIVE)
    per_class: int | None = option(
        None, "so many training and development examples of each class instead", bounds=POSITIVE
    )
    on_bad_row: str = option("refuse", "rows that the task cannot use: refuse or skip", choices=names.ON_BAD_ROW)
    seed: int = option(0, "seed of directions, minibatches and splits", bounds=SEED, argument="seed")


_GENERAL = "also measure the perplexity of a text: a file, or packaged (3,500 words, for a first look)"


@dataclass
class Evaluation(Data):
    """What ``eval`` measures."""

    general_text: str | None = option(None, _GENERAL, shown="not", is_place=True, free=True)

    shots: int = option(0, "demonstrations before every prompt: in-context learning", bounds=NOT_NEGATIVE)
    objective: str = option(
        "loss", "rewards to measure generated text by: module:function, or a sum of several", shown="none"
    )
    calibrate: bool = option(False, "divide by each answer's likelihood without content")


def _as_of_data(name: str) -> Any:
    """The field that :class:`Data` has under this name."""
    one = Data.__dataclass_fields__[name]
    return field(default=one.default, metadata=one.metadata)


@dataclass
class Asking:
    """A model that is asked for what has no answer yet."""

    model: str | None = option(None, "folder of a run, or any model as train takes it", required=True, is_place=True)
    dtype: str = _as_of_data("dtype")
    device: str | None = _as_of_data("device")
    quantize: str | None = _as_of_data("quantize")
    attn_implementation: str | None = _as_of_data("attn_implementation")


@dataclass
class Prediction(Asking):
    """What ``predict`` answers."""

    task: str | None = option(
        None, "the task that says how a row is put to the model", shown="the run's", required=True, is_place=True
    )
    batch_size: int = _as_of_data("batch_size")
    max_length: int = _as_of_data("max_length")
    on_bad_row: str = option(
        "refuse", "rows that the task cannot use: refuse, or skip (no prediction)", choices=names.ON_BAD_ROW
    )


@dataclass
class Generation(Asking):
    """What ``generate`` writes."""

    max_new_tokens: int = option(256, "longest answer in tokens", bounds=POSITIVE)
    temperature: float = option(0.0, "of sampled text; 0 takes the likeliest tokens", bounds=FINITE)
    seed: int = option(0, "of sampled text", bounds=SEED)
    compare: bool = option(False, "show what the untuned model says beside it")


@dataclass
class Chat(Generation):
    """What ``chat`` says."""

    system: str | None = option(None, "what the model is told before the conversation", shown="nothing")


_MEZO = {"method": ("feedback", "forward", "mezo")}
_of_mezo = partial(option, only=_MEZO)


@dataclass
class MeZOSettings:
    """What the method is: how the loss is queried, and how coefficients move the weights."""

    eps: NumberOrAuto = _of_mezo(  # noqa: RUF009
        AUTO, "perturbation scale, or auto: measured before the run", defaults={"adam": None}
    )
    probes: int = _of_mezo(1, "directions a step; each costs two forward passes", bounds=POSITIVE)
    probes_rise: int = _of_mezo(0, "steps over which the number of probes rises from 1 to that", bounds=NOT_NEGATIVE)
    estimator: str = _of_mezo(
        "spsa", "two-sided spsa, or one_sided (probes + 1 forward passes)", choices=names.ESTIMATORS
    )
    normalize: str = _of_mezo(
        "none",
        "units of loss differences: none, sigma (FZOO) or rank over the probes, spread over all directions of a step",
        choices=names.NORMALIZATIONS,
    )
    rule: str = _of_mezo("sgd", "how coefficients move the weights", choices=names.RULES)
    momentum: float = option(
        0.9, "of the rules momentum and muon", bounds=FRACTION, only={**_MEZO, "rule": ("momentum", "muon")}
    )
    rule_state: str = option(
        "auto",
        "moments of the rules momentum and adam: kept (exact), or rebuilt (window)",
        choices=names.STATES,
        only={**_MEZO, "rule": ("momentum", "adam")},
    )
    direction: str = _of_mezo("gaussian", "distribution of directions", choices=names.DIRECTIONS)
    assignment: str = _of_mezo(
        "shared",
        "directions shared by the minibatch, or one for each example",
        choices=names.ASSIGNMENTS,
        defaults={"feedback": "example", "forward": "example"},
    )
    group_size: int | None = _of_mezo(
        None,
        "examples that share a direction, where examples have directions of their own",
        shown="as many as there are labels, where minibatches are stratified; else 1",
        bounds=POSITIVE,
    )
    stratify: str = option(
        "none",
        "spread the training examples evenly over minibatches by label, or none; auto: by label where they have some",
        choices=names.STRATA,
        defaults={"feedback": "auto", "forward": "auto"},
    )
    rank: int | None = _of_mezo(
        None,
        "of low-rank directions of matrices; 0: full ones",
        shown="0; 1 for each example",
        bounds=NOT_NEGATIVE,
        defaults={"feedback": 0},
    )
    refresh: int = _of_mezo(1, "steps for which one factor of low-rank directions stays", bounds=POSITIVE)
    fold: str = _of_mezo(
        "step",
        "when steps of low-rank directions sweep the weights: every one, or all since a refresh at the next",
        choices=names.FOLDS,
    )
    active_layers: int | None = _of_mezo(
        None, "layers that a step perturbs and moves, drawn by the seed", shown="all", bounds=POSITIVE
    )
    sparsity: float = _of_mezo(0.0, "share of every matrix, its largest weights, that stays as it is", bounds=FRACTION)
    modify: str = _of_mezo(
        "none",
        "lengths of directions by layers: variance or expectation modified (MeZO, appendix B)",
        choices=names.MODIFY,
    )
    modify_by: str = option(
        "parameters",
        "what modified directions go by: the norm of a layer's parameters, or of its gradients (8 forward passes a layer, once)",
        choices=names.MODIFIED_BY,
        only={**_MEZO, "modify": ("variance", "expectation")},
    )
    perturbation: str = _of_mezo("auto", "how to perturb", choices=names.PERTURBATIONS)
    probes_per_pass: int = _of_mezo(
        1, "probes of every example that share a forward pass, in which it has twice as many rows", bounds=POSITIVE
    )
    move: str = _of_mezo(
        "read", "what a step moves: what was read, or all that is tuned (the paper's)", choices=names.MOVES
    )
    clip_coefficient: float | None = _of_mezo(
        None, "largest magnitude of a projected gradient", shown="none", bounds=POSITIVE
    )
    average: str = _of_mezo(
        NONE,
        f"leave an average of the run's weights: {FORMS}; auto: if one is better on the dev split",
        read=average_or_auto,
        free=True,
    )
    decay_towards: str = _of_mezo(
        "zero",
        "what weight decay pulls towards: zero, or base, the weights that the run began with",
        choices=names.DECAYS,
    )
    parts: int | None = _of_mezo(
        None,
        "cut the minibatch into so many parts, for workers to share beside the queries",
        shown="1; 8 with more workers than queries",
        bounds=POSITIVE,
    )
    worker_timeout: float = _of_mezo(
        600.0,
        "a worker that has not answered for so long is gone: 90s, 10m",
        read=seconds_of,
        free=True,
    )


@dataclass
class Train(MeZOSettings, Data):
    """What ``train`` does, and ``plan`` measures."""

    method: str = option(
        "mezo",
        "feedback, what won the comparison: an adapter that starts from the errors; forward: late weights, a direction for each example; mezo, the "
        "paper's; or adam: backpropagation",
        shown="feedback where the model has a place for it, else forward; mezo where a setting of the method is given",
        choices=names.METHODS,
    )
    objective: str = _of_mezo("loss", "loss, accuracy, f1, exact_match, module:function, file.py:function, or a sum")
    class_weights: str | None = option(
        None, "weights of classes in the loss: balanced, or labels with weights such as spam=5,ham=1", shown="all alike"
    )
    temperature: float = _of_mezo(0.0, "of sampled text; 0 takes the likeliest tokens", bounds=FINITE)
    log_completions: int | None = _of_mezo(
        None,
        "write what the model wrote at every so many steps, and before and after, to completions.jsonl",
        shown="not",
        bounds=POSITIVE,
        free=True,
        metavar="STEPS",
    )
    tune: str = option(
        "all",
        "all, late-mlp, lora, prefix, or a pattern of parameter names",
        defaults={"feedback": "lora", "forward": "late-mlp"},
    )
    lora_rank: int = option(8, "width of the LoRA matrices", bounds=POSITIVE, only={"tune": ("lora",)})
    lora_alpha: float = option(16.0, "scale of LoRA, times 1/rank", bounds=POSITIVE, only={"tune": ("lora",)})
    lora_targets: str | None = option(
        None,
        "names of the layers to adapt, or patterns of them, by commas; all-linear: all but the head; late-down: those behind late feed-forward blocks; "
        "late-attention: query and value projections of late layers; experts: those in one tensor",
        shown="query and value projections; feedback late-down, for free text late-attention too",
        only={"tune": ("lora",)},
        defaults={"feedback": "late-down"},
    )
    feedback_steps: int = option(
        100,
        "forward passes of the walk along the errors that LoRA starts from",
        bounds=POSITIVE,
        only={"lora_init": ("feedback",)},
    )
    prompt_loss_weight: float | None = option(
        None,
        "of the walk's steps: weight of the loss of a few tokens of each prompt, beside that of the answer",
        shown="0; feedback 0.3 for free text",
        bounds=FINITE,
        only={"lora_init": ("feedback",)},
    )
    lora_init: str = option(
        "default",
        "what A of LoRA is at first: random (default, gaussian), or of each layer's inputs the principal directions (eva), or those that go with the "
        "errors of the predictions (errors); feedback: both, and B from a walk along the errors",
        choices=names.LORA_INITS,
        only={"tune": ("lora",)},
        defaults={"feedback": "feedback"},
    )
    freeze_a: bool = option(
        False, "tune B of LoRA alone, as feedback does", only={"tune": ("lora",)}, defaults={"feedback": True}
    )
    prefix_length: int = option(5, "positions of the prefix", bounds=POSITIVE, only={"tune": ("prefix",)})
    steps: int | None = option(None, "optimizer steps", shown=f"{STEPS}; adam: 5 epochs", bounds=POSITIVE, free=True)
    epochs: float | None = option(
        None,
        "passes over the training examples, in place of steps",
        shown="as many as the steps take",
        bounds=POSITIVE,
        free=True,
    )
    time_budget: float | None = _of_mezo(None, "as many steps as fit this time: 90s, 30m, 1h30m", read=seconds_of)
    lr: NumberOrAuto = option(  # noqa: RUF009
        AUTO,
        "learning rate, or auto: found on held-out data",
        shown="auto; adam 1e-5",
        defaults={"adam": 1e-5},
        argument="learning_rate",
    )
    lr_scheduler: str = option(
        "constant", "course of the learning rate", choices=names.LR_SCHEDULERS, argument="lr_scheduler_type"
    )
    weight_decay: float = option(0.0, "decoupled, not on norms and biases", bounds=FINITE, argument="weight_decay")
    eval_steps: int | None = option(
        None,
        "measure the dev split so often and keep the best step's weights",
        shown="lr auto: 20 times in a run",
        bounds=POSITIVE,
        free=True,
    )
    patience: int | None = option(
        None,
        "stop after so many of these without improvement",
        shown="never; 5 for labels with feedback, unless lr, eval-steps, objective or average is given",
        bounds=POSITIVE,
        free=True,
    )
    save_steps: int | None = _of_mezo(
        None, "also save a checkpoint every so many steps", shown="none", bounds=POSITIVE, free=True
    )
    report_to: str | None = option(
        None, f"{', '.join(names.TRACKERS)}, or several by commas", shown="none", free=True, read=trackers
    )
    general_text: str | None = option(None, f"{_GENERAL}, before and after", shown="not", is_place=True, free=True)
    no_before: bool | None = option(None, "do not evaluate the untuned model", free=True)


#: Command -> what describes its run.
COMMANDS: dict[str, type[Any]] = {
    "train": Train, "plan": Train, "eval": Evaluation, "probe": Data, "predict": Prediction,
    "generate": Generation, "chat": Chat, "merge": Asking,
}  # fmt: skip


#: What declares settings -> what they are about, as ``--help`` puts them together.
_GROUPS: dict[type, str] = {Data: "model and data", MeZOSettings: "method", Train: "run", Evaluation: "measuring"}


def group_of(kind: type, name: str) -> str:
    """What a setting of a description is about."""
    home = next(cls for cls in reversed(kind.__mro__) if name in inspect.get_annotations(cls))
    return _GROUPS.get(home, "options")


def as_declared(name: str) -> Any:
    """A field with the default and the help of a setting of ``train``, for a class that has it by another name."""
    one = options(Train)[name]
    return field(default=one.default, metadata={"help": one.help})
