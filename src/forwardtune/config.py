"""L1: what describes a run, declared once.

A setting is a field of a dataclass, with its type, default and help, what it belongs to and how far it goes. From these fields come
the command line of ``train``, ``plan``, ``eval`` and ``probe``, the files of ``--config``, the keys of a sweep file, the fields and
arguments of :class:`forwardtune.hf.trainer.MeZOConfig`, and what the step log's header says of a run. Combinations without meaning
are rows of one table (:mod:`forwardtune.refusals`).

Nothing here needs torch or transformers: what can be refused is refused before they are imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from . import names
from .durations import seconds_of
from .errors import InputError, nearest

#: In place of a number: to be found by the run itself (:mod:`forwardtune.search.rates`).
AUTO = "auto"
#: Version of the files of ``--config``; one that does not say has this.
SCHEMA = 1
#: Steps of a run that is told neither steps nor time.
STEPS = 1000
#: Where transformers lets a polynomial schedule end.
POLYNOMIAL_END = 1e-7


def number_or_auto(value: Any) -> float | str:
    """A positive number, or ``"auto"``. Raises ValueError for anything else."""
    if value == AUTO:
        return AUTO
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is neither a positive number nor 'auto'")
    return number


if TYPE_CHECKING:
    NumberOrAuto = float | str
else:
    NumberOrAuto = number_or_auto  # an argument's text is read by calling its type, here and in HfArgumentParser


@dataclass(frozen=True)
class Bounds:
    """Which numbers a setting may be, in words that follow its name, and one that it may not be."""

    words: str
    allow: Callable[[Any], bool]
    wrong: Any


POSITIVE = Bounds("must be positive", lambda value: 0 < value < math.inf, 0)
NOT_NEGATIVE = Bounds("must not be negative", lambda value: value >= 0, -1)
FINITE = Bounds("must be a number that is not negative", lambda value: 0 <= value < math.inf, -1.0)
FRACTION = Bounds("must be a number from 0 up to 1, 1 excluded,", lambda value: 0 <= value < 1, 1.0)
SEED = Bounds("must be from 0 to 4294967295", lambda value: 0 <= value < 2**32, -1)


@dataclass(frozen=True)
class Option:
    """One setting of a run.

    Attributes:
        help: one line for people, without the default.
        shown: the default in words, where its value does not say it.
        choices: all that it may be.
        bounds: of a number.
        only: another setting -> its values with which this one has an effect. All must hold.
        defaults: method -> default, where it is not the field's.
        free: a resumed run may have another value; everything else comes from its log.
        is_place: it may name a file or a folder.
        required: it has no default that a run could have.
        argument: what :class:`~forwardtune.hf.trainer.MeZOConfig` calls it, if it has it.
        metavar: stands for the value in the help.
        read: text -> value; ``bool`` for a flag.
        name, default: the field's.
    """

    help: str
    shown: str = ""
    choices: tuple[str, ...] | None = None
    bounds: Bounds | None = None
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    free: bool = False
    is_place: bool = False
    required: bool = False
    argument: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    name: str = ""
    default: Any = None

    @property
    def key(self) -> str:
        """Its name in files and, after two dashes, on the command line."""
        return self.name.replace("_", "-")

    def of_file(self, value: Any, where: str) -> Any:
        """The value that a YAML file gives it, read as the command line reads text.

        Raises:
            InputError: it cannot be that; the message begins with ``where``.
        """
        wrong = f"{where}: {self.key} cannot be {value!r}"
        if self.read is bool:
            if not isinstance(value, bool):
                raise InputError(f"{wrong}: it is a flag, write true or false")
            return value
        if value is None or isinstance(value, bool | dict | list):
            raise InputError(
                f"{wrong}: give a number or text (YAML reads yes, no, on and off as true and false: quote them)"
            )
        assert self.read is not None
        try:
            result = self.read(str(value))  # YAML 1.1 reads 1e-6 as text
        except ValueError as error:
            kinds: dict[Any, str] = {int: "it must be a whole number", float: "it must be a number"}
            raise InputError(f"{wrong}: {kinds.get(self.read, error)}") from None
        if self.choices is not None and result not in self.choices:
            raise InputError(f"{wrong}: choose {', '.join(self.choices)}{nearest(str(value), self.choices)}")
        return result


class _Help(str):
    """The help of a field, which carries all else that is declared: HfArgumentParser hands whatever metadata hold to argparse."""

    option: Option


def option(default: Any, help: str, **how: Any) -> Any:
    """A field that is a setting; ``how`` are attributes of :class:`Option`."""
    text = _Help(help)
    text.option = Option(help, **how)
    return field(default=default, metadata={"help": text})


@dataclass
class Data:
    """What is evaluated on what."""

    model: str | None = option(
        None, "hub id, local folder, .gguf file, or smollm2-135m (embedded)", required=True, is_place=True
    )
    task: str | None = option(
        None,
        "a task of the package, such as sst2 or reviews, or a task file (.yaml)",
        required=True,
        is_place=True,
    )
    data_dir: str | None = option(
        None,
        "folder with the task's data (.jsonl, .csv, .json, .tsv), instead of the hub",
        is_place=True,
        free=True,
    )
    dtype: str = option("auto", "auto (as stored), float32, bfloat16 or float16")
    device: str | None = option(
        None, "cpu, cuda, mps, or auto to spread over devices", shown="cuda if there is one", free=True
    )
    batch_size: int = option(
        16,
        "examples in a minibatch",
        bounds=POSITIVE,
        defaults={"adam": 8},
        argument="per_device_train_batch_size",
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


@dataclass
class Evaluation(Data):
    """What ``eval`` measures."""

    shots: int = option(0, "demonstrations before every prompt: in-context learning", bounds=NOT_NEGATIVE)
    objective: str = option(
        "loss", "rewards to measure generated text by: module:function, or a sum of several", shown="none"
    )
    calibrate: bool = option(False, "divide by each answer's likelihood without content")


_MEZO = {"method": ("mezo",)}
_of_mezo = partial(option, only=_MEZO)


@dataclass
class MeZOSettings:
    """What the method is: how the loss is queried, and how coefficients move the weights."""

    eps: NumberOrAuto = _of_mezo(  # noqa: RUF009
        AUTO, "perturbation scale, or auto: measured before the run", defaults={"adam": None}
    )
    probes: int = _of_mezo(1, "directions a step; each costs two forward passes", bounds=POSITIVE)
    estimator: str = _of_mezo(
        "spsa", "two-sided spsa, or one_sided (probes + 1 forward passes)", choices=names.ESTIMATORS
    )
    normalize: str = _of_mezo(
        "none",
        "units of loss differences over the probes: none, sigma (FZOO) or rank",
        choices=names.NORMALIZATIONS,
    )
    rule: str = _of_mezo("sgd", "how coefficients move the weights", choices=names.RULES)
    momentum: float = option(0.9, "of the rule momentum", bounds=FRACTION, only={**_MEZO, "rule": ("momentum",)})
    rule_state: str = option(
        "auto",
        "moments of the rules momentum and adam: kept (exact), or rebuilt (window)",
        choices=names.STATES,
        only={**_MEZO, "rule": ("momentum", "adam")},
    )
    direction: str = _of_mezo("gaussian", "distribution of directions", choices=names.DIRECTIONS)
    perturbation: str = _of_mezo("auto", "how to perturb", choices=names.PERTURBATIONS)
    clip_coefficient: float | None = _of_mezo(
        None, "largest magnitude of a projected gradient", shown="none", bounds=POSITIVE
    )


@dataclass
class Train(MeZOSettings, Data):
    """What ``train`` does, and ``plan`` measures."""

    method: str = option("mezo", "mezo, or adam: backpropagation", choices=names.METHODS)
    objective: str = _of_mezo("loss", "loss, accuracy, f1, exact_match, module:function, file.py:function, or a sum")
    temperature: float = _of_mezo(0.0, "of sampled text; 0 takes the likeliest tokens", bounds=FINITE)
    log_completions: int | None = _of_mezo(
        None,
        "write what the model wrote at every so many steps, and before and after, to completions.jsonl",
        shown="not",
        bounds=POSITIVE,
        free=True,
        metavar="STEPS",
    )
    tune: str = option("all", "all, lora, prefix, or a pattern of parameter names")
    lora_rank: int = option(8, "width of the LoRA matrices", bounds=POSITIVE, only={"tune": ("lora",)})
    lora_alpha: float = option(16.0, "scale of LoRA, times 1/rank", bounds=POSITIVE, only={"tune": ("lora",)})
    lora_targets: str | None = option(
        None,
        "names of the layers to adapt, by commas",
        shown="query and value projections",
        only={"tune": ("lora",)},
    )
    prefix_length: int = option(5, "positions of the prefix", bounds=POSITIVE, only={"tune": ("prefix",)})
    steps: int | None = option(None, "optimizer steps", shown=f"{STEPS}; adam: 5 epochs", bounds=POSITIVE, free=True)
    time_budget: float | None = _of_mezo(None, "as many steps as fit this time: 90s, 30m, 1h30m", read=seconds_of)
    lr: NumberOrAuto = option(  # noqa: RUF009
        AUTO,
        "learning rate, or auto: found on held-out data",
        shown="auto; adam 1e-5",
        defaults={"adam": 1e-5},
        argument="learning_rate",
    )
    lr_scheduler: str = option(
        "constant",
        "course of the learning rate",
        choices=names.LR_SCHEDULERS,
        argument="lr_scheduler_type",
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
        None, "stop after so many of these without improvement", shown="never", bounds=POSITIVE, free=True
    )
    save_steps: int | None = _of_mezo(
        None, "also save a checkpoint every so many steps", shown="none", bounds=POSITIVE, free=True
    )
    no_before: bool | None = option(None, "do not evaluate the untuned model", free=True)


#: Command -> what describes its run.
COMMANDS: dict[str, type[Data]] = {"train": Train, "plan": Train, "eval": Evaluation, "probe": Data}


def options(kind: Any) -> dict[str, Option]:
    """The settings among a dataclass's fields, by name."""
    hints = get_type_hints(kind)
    found = {}
    for one in fields(kind):
        if isinstance(text := one.metadata.get("help"), _Help):
            declared = text.option
            types = [part for part in get_args(hints[one.name]) if part is not NoneType] or [hints[one.name]]
            own = one.name if one.name in MeZOSettings.__dataclass_fields__ else None
            found[one.name] = replace(
                declared,
                name=one.name,
                default=None if one.default is MISSING else one.default,
                read=declared.read or types[0],
                argument=declared.argument or own,
            )
    return found


def as_declared(name: str) -> Any:
    """A field with the default and the help of a setting of ``train``, for a class that has it by another name."""
    one = options(Train)[name]
    return field(default=one.default, metadata={"help": one.help})


def with_defaults(command: str, given: Mapping[str, Any]) -> Any:
    """The description of a command's run, with defaults for what was not given. Nothing is refused."""
    declared = options(COMMANDS[command])
    known = {name: value for name, value in given.items() if value is not None}
    method = known.get("method", "mezo")
    return COMMANDS[command](**{name: one.defaults.get(method, one.default) for name, one in declared.items()} | known)


def recorded(run: Any) -> Train:
    """The description that a step log's header has; what it does not say is default."""
    told = run if isinstance(run, dict) else {}
    described: Train = with_defaults("train", {name: told[name] for name in options(Train) if name in told})
    return described


def settings(run: Any) -> dict[str, Any]:
    """What is recorded of a run in the step log's header and in ``metrics.json``."""
    return {name: value for name in options(type(run)) if (value := getattr(run, name)) is not None}


def arguments(run: Any) -> dict[str, Any]:
    """A run's settings that are arguments of :class:`~forwardtune.hf.trainer.MeZOConfig`, by its names for them."""
    return {one.argument: getattr(run, name) for name, one in options(type(run)).items() if one.argument}
