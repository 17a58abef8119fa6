"""Combinations of settings without meaning, in one table. They are refused before a model or a data set is opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from ..averages import NONE, average_or_auto
from ..durations import seconds_of
from .option import AUTO, Bounds, Option, number_or_auto, options
from .runs import COMMANDS, POLYNOMIAL_END

_TRAINS = ("train", "plan")
_LOADS = ("train", "plan", "eval", "probe")


@dataclass(frozen=True)
class Refusal:
    """A combination of settings without meaning.

    Attributes:
        template: what to say of it. ``<name>`` is the name of a setting, ``{name}`` its value.
        is_wrong: ``(settings, names that were given) -> whether they are refused``.
        example: settings that are refused for this and for nothing before it.
        commands: whose settings are held against it.
    """

    template: str
    is_wrong: Callable[[Any, frozenset[str]], bool]
    example: Mapping[str, Any]
    commands: tuple[str, ...] = _TRAINS

    def message(self, run: Any, spell: Callable[[str], str] = str) -> str:
        """What to say; ``spell`` turns a setting's name into what the user knows it by."""
        return re.sub(r"<(\w+)>", lambda found: spell(found[1]), self.template).format(**vars(run))


def _has_side_path(run: Any) -> bool:
    return run.assignment == "example" or run.perturbation in ("side_path", "both_signs")


def _are_given(names: frozenset[str], run: Any, given: frozenset[str]) -> bool:
    return names <= given


_LENGTHS = {"steps": 3, "epochs": 2.0, "time_budget": 60.0}
_COMBINATIONS = (
    Refusal(
        "<quantize> {quantize} leaves integers in the place of most weights, and <tune> {tune} would have to move them: give <tune> "
        "lora, prefix, or a pattern of names, such as 'norm|bias'",
        lambda run, given: run.quantize is not None and run.tune in ("all", "late-mlp"),
        {"quantize": "nf4", "tune": "all"},
    ),
    Refusal(
        "<quantize> int4 cannot be written to a file by torchao, and <tune> {tune} changes weights of the model itself: give <tune> lora or "
        "prefix, or <quantize> nf4 or int8",
        lambda run, given: run.quantize == "int4" and run.tune not in ("lora", "prefix"),
        {"quantize": "int4", "tune": "norm"},
    ),
    Refusal(
        "<method> adam goes backwards through the model, which <quantize> int4 cannot: give <quantize> nf4 or int8, or <method> mezo",
        lambda run, given: run.quantize == "int4" and run.method == "adam",
        {"quantize": "int4", "tune": "lora", "method": "adam"},
    ),
    Refusal(
        "<offload> cpu keeps weights in the memory of the host, and with <device> cpu the host computes: give <offload> disk",
        lambda run, given: run.offload == "cpu" and run.device == "cpu",
        {"offload": "cpu", "device": "cpu"},
        _LOADS,
    ),
    Refusal(
        "<offload> {offload} lets one device compute, and <device> auto spreads the model over several: leave one of them out",
        lambda run, given: run.offload is not None and run.device == "auto",
        {"offload": "disk", "device": "auto"},
        _LOADS,
    ),
    *(
        Refusal(
            "<quantize> {quantize} keeps its integers on the device, and <offload> {offload} would take them away: leave one of them out",
            lambda run, given: run.quantize is not None and run.offload is not None,
            {"quantize": "nf4", "offload": "disk", **beside},
            commands,
        )
        for commands, beside in ((_TRAINS, {"tune": "lora"}), (("eval", "probe"), {}))
    ),
    Refusal(
        "<perturbation> copy has a second set of all tuned weights in memory, which <offload> {offload} is to save: leave <perturbation> out",
        lambda run, given: run.offload is not None and run.perturbation == "copy",
        {"offload": "disk", "perturbation": "copy"},
    ),
    Refusal(
        "<method> adam keeps gradients and moments of all weights in memory: leave it out, or <offload>",
        lambda run, given: run.offload is not None and run.method == "adam",
        {"offload": "disk", "method": "adam"},
    ),
    Refusal(
        "<data> and <data_dir> both say where the examples are: leave one of them out",
        lambda run, given: run.data is not None and run.data_dir is not None,
        {"data": "mine.jsonl", "data_dir": "mine"},
        ("train", "plan", "eval", "probe"),
    ),
    Refusal(
        "<eval_steps> measures development examples, and <dev_examples> is 0: leave one of them out",
        lambda run, given: run.eval_steps is not None and run.dev_examples == 0,
        {"eval_steps": 2, "dev_examples": 0},
    ),
    Refusal(
        "<general_text> compares with the untuned model, and <no_before> leaves that out: leave one of them out",
        lambda run, given: run.general_text is not None and bool(run.no_before),
        {"general_text": "packaged", "no_before": True},
        ("train",),
    ),
    Refusal(
        "<decay_towards> base says what weight decay pulls towards, and there is none: give <weight_decay> too",
        lambda run, given: run.decay_towards == "base" and not run.weight_decay,
        {"decay_towards": "base"},
    ),
    Refusal(
        "<average> {average} is a sum of directions, and what <rule> {rule} adds is none: give <rule> sgd or momentum, or leave <average> out",
        lambda run, given: run.average != NONE and run.rule in ("sign", "adam", "muon"),
        {"average": "last:10", "rule": "adam"},
    ),
    Refusal(
        "<average> is a sum of directions, and which weights those of <sparsity> reach depends on the weights: leave one of them out",
        lambda run, given: run.average != NONE and run.sparsity > 0,
        {"average": "last:10", "sparsity": 0.5},
    ),
    Refusal(
        "<decay_towards> base is not for <rule> muon, nor beside <sparsity>, which leaves weights alone by their size: leave it out",
        lambda run, given: run.decay_towards == "base" and (run.rule == "muon" or run.sparsity > 0),
        {"decay_towards": "base", "weight_decay": 0.1, "sparsity": 0.5},
    ),
    Refusal(
        "<average> auto chooses on development examples, and <dev_examples> is 0: name an average, such as last:100",
        lambda run, given: run.average == AUTO and run.dev_examples == 0,
        {"average": AUTO, "dev_examples": 0},
    ),
    Refusal(
        "<method> feedback is LoRA that starts from the errors: leave <tune> and <lora_init> out, or give <method> forward or mezo",
        lambda run, given: run.method == "feedback" and (run.tune, run.lora_init) != ("lora", "feedback"),
        {"method": "feedback", "tune": "all"},
    ),
    Refusal(
        "<lora_init> feedback reads the head's weights once the pass has left them, and <offload> takes them away: leave one of them out",
        lambda run, given: run.tune == "lora" and run.lora_init == "feedback" and run.offload is not None,
        {"method": "feedback", "offload": "disk"},
    ),
    Refusal(
        "<lr> auto is found with forward passes, by <method> mezo: give a number for adam",
        lambda run, given: run.method == "adam" and run.lr == AUTO,
        {"method": "adam", "lr": AUTO},
    ),
    *(
        Refusal(
            f"<{one}> and <{other}> both say how long to tune: leave one of them out",
            partial(_are_given, frozenset((one, other))),
            {one: _LENGTHS[one], other: _LENGTHS[other]},
        )
        for one, other in (("steps", "time_budget"), ("steps", "epochs"), ("epochs", "time_budget"))
    ),
    Refusal(
        "<patience> counts measurements of the dev split: give <eval_steps> too",
        lambda run, given: (
            run.patience is not None and run.eval_steps is None and (run.lr != AUTO or run.dev_examples == 0)
        ),
        {"patience": 2, "lr": 1e-6},
    ),
    Refusal(
        "<normalize> {normalize} compares the probes of a step, and there is one: give <probes> 2 or more",
        lambda run, given: (
            run.normalize != "none" and run.probes < 2 and (run.normalize, run.assignment) != ("spread", "example")
        ),
        {"normalize": "sigma", "probes": 1},
    ),
    Refusal(
        "<perturbation> {perturbation} moves the weights for the whole minibatch, and with <assignment> example every example has a "
        "direction of its own: leave <perturbation> out",
        lambda run, given: run.assignment == "example" and run.perturbation in ("scratch", "copy"),
        {"assignment": "example", "perturbation": "copy"},
    ),
    Refusal(
        "<tune> prefix has no side path, by which <assignment> example and <perturbation> side_path evaluate: leave them out, or give <tune> lora "
        "or <method> mezo",
        lambda run, given: run.tune == "prefix" and _has_side_path(run),
        {"tune": "prefix", "assignment": "example"},
    ),
    Refusal(
        "<probes_per_pass> is of directions of examples with two sides, whose rows can be put together: give <assignment> example too, and "
        "leave <perturbation> and <estimator> out",
        lambda run, given: (
            run.probes_per_pass > 1
            and (
                run.assignment != "example" or run.estimator != "spsa" or run.perturbation not in ("auto", "both_signs")
            )
        ),
        {"probes_per_pass": 2},
    ),
    Refusal(
        "<group_size> is of examples that have directions of their own: give <assignment> example too, or leave it out",
        lambda run, given: (run.group_size or 1) > 1 and run.assignment != "example",
        {"group_size": 2, "method": "mezo"},
    ),
    Refusal(
        "<refresh> is of low-rank directions, one factor of which stays for a while: give <rank> too",
        lambda run, given: run.refresh != 1 and not run.rank and not (run.rank is None and run.assignment == "example"),
        {"refresh": 50},
    ),
    Refusal(
        "<fold> refresh lets steps wait until a factor of their directions is drawn anew, while the side path adds them to what layers give: give "
        "<refresh> 2 or more, and <assignment> example or <perturbation> side_path, with <rule> sgd, and leave <weight_decay>, <active_layers>, "
        "<sparsity>, <modify> and <offload> out",
        lambda run, given: (
            run.fold == "refresh"
            and not (
                run.refresh > 1
                and (run.assignment == "example" or run.perturbation in ("side_path", "both_signs"))
                and (run.rule, run.modify, run.active_layers) == ("sgd", "none", None)
                and not (run.weight_decay or run.sparsity or run.offload not in (None, "none"))
            )
        ),
        {"fold": "refresh", "assignment": "example"},
    ),
    Refusal(
        "<probes_rise> begins with one direction of the minibatch and plain coefficients: leave <assignment> and <normalize> out",
        lambda run, given: run.probes_rise > 0 and (run.assignment, run.normalize) != ("shared", "none"),
        {"probes_rise": 10, "assignment": "example"},
    ),
    Refusal(
        "<rule> muon works in the space that low-rank directions share, one direction a step: give <rank>, and <refresh> 10 or more, and leave "
        "<probes>, <assignment>, <active_layers>, <sparsity> and <modify> out",
        lambda run, given: (
            run.rule == "muon"
            and (
                not run.rank
                or (run.probes, run.assignment, run.active_layers) != (1, "shared", None)
                or (run.sparsity, run.modify) != (0, "none")
            )
        ),
        {"rule": "muon"},
    ),
    Refusal(
        "<sparsity> leaves weights alone by their size, which <rule> {rule} does not know of: leave <rule> out",
        lambda run, given: run.sparsity > 0 and run.rule != "sgd",
        {"sparsity": 0.5, "rule": "adam"},
    ),
    Refusal(
        "<sparsity> is of weights one by one, and the side path, by which <assignment> example and <perturbation> side_path evaluate, "
        "multiplies with whole directions: leave them out",
        lambda run, given: run.sparsity > 0 and _has_side_path(run),
        {"sparsity": 0.5, "assignment": "example"},
    ),
    Refusal(
        f"<lr_scheduler> polynomial ends at a learning rate of {POLYNOMIAL_END:g}, and <lr> is {{lr:g}}: give a larger "
        "one, or <lr_scheduler> linear",
        lambda run, given: run.lr_scheduler == "polynomial" and run.lr != AUTO and run.lr <= POLYNOMIAL_END,
        {"lr_scheduler": "polynomial", "lr": 1e-7},
    ),
    Refusal(
        "training runs on the first device of its kind, not on {device}: choose it with CUDA_VISIBLE_DEVICES, and give "
        "<device> cuda",
        lambda run, given: run.device is not None and ":" in run.device,
        {"device": "cuda:1"},
    ),
    Refusal(
        "<device> meta holds no weights: leave it out (forwardtune plan --no-weights estimates without them)",
        lambda run, given: run.device == "meta",
        {"device": "meta"},
        ("train", "plan", "eval", "probe"),
    ),
    Refusal(
        "plan measures steps of forward passes, not of <method> {method}: leave <method> out",
        lambda run, given: run.method == "adam",
        {"method": "adam"},
        ("plan",),
    ),
    Refusal(
        "<objective> {objective}: eval always measures the task's own metric and loss. Give a reward, module:function, "
        "or leave it out",
        lambda run, given: run.objective != "loss" and ":" not in run.objective,
        {"objective": "accuracy"},
        ("eval",),
    ),
)


@lru_cache
def refusals(command: str) -> tuple[Refusal, ...]:
    """What a command refuses, in this order: what would have no effect, numbers out of bounds, combinations, what is missing."""
    declared, commands = options(COMMANDS[command]), (command,)
    idle, beyond, missing = [], [], []
    for name, one in declared.items():
        for other, values in one.only.items():
            belongs = " or ".join(f"<{other}> {value}" for value in values)
            unlike = next(
                value for value in declared[other].choices or (declared[other].default,) if value not in values
            )
            is_idle = partial(_is_idle, name, other, values)
            example = {other: unlike, name: _example(one)}
            idle.append(Refusal(f"<{name}> belongs to {belongs}: leave it out", is_idle, example, commands))
        if one.bounds is not None:
            template = f"<{name}> {one.bounds.words}{'' if one.bounds.words.endswith(',') else ','} got {{{name}}}"
            example = {**{other: values[0] for other, values in one.only.items()}, name: one.bounds.wrong}
            beyond.append(Refusal(template, partial(_is_beyond, name, one.bounds), example, commands))
        if one.required:
            missing.append(Refusal(f"<{name}> is missing", partial(_is_missing, name), {name: None}, commands))
    return (*idle, *beyond, *(row for row in _COMBINATIONS if command in row.commands), *missing)


def _is_idle(name: str, other: str, values: tuple[str, ...], run: Any, given: frozenset[str]) -> bool:
    return name in given and getattr(run, other) not in values


def _is_beyond(name: str, bounds: Bounds, run: Any, given: frozenset[str]) -> bool:
    value = getattr(run, name)
    return value is not None and not bounds.allow(value)


def _is_missing(name: str, run: Any, given: frozenset[str]) -> bool:
    return not getattr(run, name)


def _example(one: Option) -> Any:
    """A value that is no default."""
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    samples = {int: 2, bool: True, float: 0.5, number_or_auto: 1e-3, seconds_of: 60.0, average_or_auto: AUTO}
    return samples.get(one.read, "loss")


def refusal_of(command: str, run: Any, given: frozenset[str]) -> Refusal | None:
    """The first row of the table that these settings fall under."""
    return next((row for row in refusals(command) if row.is_wrong(run, given)), None)
