"""Every command with its options. Nothing here needs torch: what a command runs is imported when it runs."""

from __future__ import annotations

import argparse
from typing import Any

from .. import __version__, names
from ..durations import seconds_of
from ..errors import InputError
from ..search.auto import number_or_auto
from .parser import Parser

_DESCRIPTION = "Fine-tune language models with forward passes only (MeZO)."


def make_parser() -> Parser:
    """The parser of the command line. ``run`` of what it returns names a function of this package, as ``"train.run"``."""
    parser = Parser(prog="forwardtune", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"forwardtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_plan, _add_evaluations, _add_sweeps, _add_logs):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    """``train``: from a model and a task to a tuned model."""
    parser = commands.add_parser("train", help="tune a model on a task")
    parser.add_argument("--output-dir", required=True, help="new folder for the tuned model and its step log")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    add_options(parser)
    parser.set_defaults(run="train.run")


def _add_plan(commands: Any) -> None:
    """``plan``: what a run would cost."""
    parser = commands.add_parser("plan", help="say what train would cost: memory, time, and the steps that fit a time")
    add_options(parser)
    parser.set_defaults(run="plan.run", output_dir=None, resume=False)


def _add_evaluations(commands: Any) -> None:
    """``eval | probe``: what a model does on a task without tuning, or after it."""
    parser = commands.add_parser("eval", help="measure a model on a task's test examples; prints one JSON object")
    _add_model_options(parser)
    parser.add_argument("--shots", type=int, help="demonstrations before every prompt: in-context learning [0]")
    parser.add_argument(
        "--objective", help="rewards to measure generated text by: module:function, or a sum of several"
    )
    parser.add_argument("--calibrate", action="store_true", help="divide by each answer's likelihood without content")
    parser.add_argument("--output-dir", help="new folder for metrics.json")
    parser.set_defaults(run="evaluate.run_eval")

    parser = commands.add_parser("probe", help="linear probing: logistic regression on the frozen model's features")
    _add_model_options(parser)
    parser.add_argument("--output-dir", help="new folder for metrics.json")
    parser.set_defaults(run="evaluate.run_probe")


def _add_sweeps(commands: Any) -> None:
    """``sweep | report``: a table of many runs from one file."""
    parser = commands.add_parser("sweep", help="run methods x tasks x seeds x a grid of options from one file")
    parser.add_argument("file", help="the sweep file (.yaml); docs/sweeps.md describes it")
    parser.add_argument("--output-dir", help="folder of all runs; the same one resumes [runs/NAME]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores [1]")
    parser.add_argument("--data-dir", help="folder with the data of tasks that do not bring them")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their state; run nothing")
    parser.set_defaults(run="sweeps.run")

    parser = commands.add_parser("report", help="tables and plots of a sweep, finished or not")
    parser.add_argument("folder", help="the sweep's folder")
    parser.add_argument("--output-dir", help="where results.md, results.json and plots go [the sweep's folder]")
    parser.add_argument("--no-plots", action="store_true", help="tables alone, without matplotlib")
    parser.set_defaults(run="sweeps.run_report")


def _add_logs(commands: Any) -> None:
    """``replay | inspect | export``: what can be done with a step log."""
    parser = commands.add_parser("replay", help="rebuild tuned weights from base weights and a step log, bit for bit")
    parser.add_argument("log", help="steps.jsonl or trajectory.safetensors")
    parser.add_argument("--model", required=True, help="the model that the run began with")
    parser.add_argument("--output-dir", required=True, help="new folder for the tuned model")
    parser.add_argument("--steps", type=int, help="replay only this many steps; needed for an unfinished log")
    parser.add_argument("--device", default="cpu", help="where the weights are rebuilt [cpu]")
    parser.set_defaults(run="logs.run_replay")

    parser = commands.add_parser("inspect", help="verify a step log and say what it holds")
    parser.add_argument("log", help="steps.jsonl")
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    parser.set_defaults(run="logs.run_inspect")

    parser = commands.add_parser("export", help="write a run as trajectory.safetensors, four bytes a step and probe")
    parser.add_argument("log", help="steps.jsonl")
    parser.add_argument("--output", default="trajectory.safetensors", help="new file [trajectory.safetensors]")
    parser.set_defaults(run="logs.run_export")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What describes a run."""
    _add_model_options(parser)
    parser.add_argument("--method", choices=names.METHODS, help="mezo, or adam: backpropagation [mezo]")
    parser.add_argument(
        "--objective", help="loss, accuracy, f1, exact_match, module:function, file.py:function, or a sum [loss]"
    )
    parser.add_argument("--temperature", type=float, help="of sampled text; 0 takes the likeliest tokens [0]")
    parser.add_argument(
        "--log-completions",
        type=int,
        metavar="STEPS",
        help="write what the model wrote at every so many steps, and before and after, to completions.jsonl [not]",
    )
    parser.add_argument("--tune", help="all, lora, prefix, or a pattern of parameter names [all]")
    parser.add_argument("--lora-rank", type=int, help="width of the LoRA matrices [8]")
    parser.add_argument("--lora-alpha", type=float, help="scale of LoRA, times 1/rank [16]")
    parser.add_argument("--lora-targets", help="names of the layers to adapt, by commas [query and value projections]")
    parser.add_argument("--prefix-length", type=int, help="positions of the prefix [5]")
    parser.add_argument("--steps", type=int, help="optimizer steps [1000; adam: 5 epochs]")
    parser.add_argument("--time-budget", type=_seconds, help="as many steps as fit this time: 90s, 30m, 1h30m")
    parser.add_argument(
        "--lr", type=_number_or_auto, help="learning rate, or auto: found on held-out data [auto; adam 1e-5]"
    )
    parser.add_argument("--eps", type=_number_or_auto, help="perturbation scale, or auto: measured [auto]")
    parser.add_argument("--probes", type=int, help="directions a step; each costs two forward passes [1]")
    parser.add_argument("--estimator", choices=names.ESTIMATORS, help="two-sided spsa, or one_sided probes [spsa]")
    parser.add_argument(
        "--normalize", choices=names.NORMALIZATIONS, help="units of coefficients over the probes [none]"
    )
    parser.add_argument("--rule", choices=names.RULES, help="how coefficients move the weights [sgd]")
    parser.add_argument("--momentum", type=float, help="of --rule momentum [0.9]")
    parser.add_argument(
        "--rule-state", choices=names.STATES, help="moments of momentum and adam: kept, or rebuilt [auto]"
    )
    parser.add_argument("--direction", choices=names.DIRECTIONS, help="distribution of directions [gaussian]")
    parser.add_argument("--perturbation", choices=names.PERTURBATIONS, help="how to perturb [auto]")
    parser.add_argument("--weight-decay", type=float, help="decoupled, not on norms and biases [0]")
    parser.add_argument("--lr-scheduler", choices=names.LR_SCHEDULERS, help="course of the learning rate [constant]")
    parser.add_argument("--clip-coefficient", type=float, help="largest magnitude of a projected gradient [none]")
    parser.add_argument(
        "--eval-steps",
        type=int,
        help="measure the dev split so often and keep the best step's weights [--lr auto: 20 times in a run]",
    )
    parser.add_argument("--patience", type=int, help="stop after so many of these without improvement [never]")
    parser.add_argument("--save-steps", type=int, help="also save a checkpoint every so many steps [none]")
    parser.add_argument("--no-before", action="store_true", default=None, help="do not evaluate the untuned model")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is evaluated on what."""
    parser.add_argument("--model", help="hub id, local folder, .gguf file, or smollm2-135m (embedded)")
    parser.add_argument("--task", help="a task of the package, such as sst2 or reviews, or a task file (.yaml)")
    parser.add_argument(
        "--data-dir", help="folder with the task's data (.jsonl, .csv, .json, .tsv), instead of the hub"
    )
    parser.add_argument("--dtype", help="auto (as stored), float32, bfloat16 or float16 [auto]")
    parser.add_argument("--device", help="cpu, cuda, mps, or auto to spread over devices [cuda if there is one]")
    parser.add_argument("--batch-size", type=int, help="examples in a minibatch [16]")
    parser.add_argument("--max-length", type=int, help="longest input in tokens; contexts are cut on the left [2048]")
    parser.add_argument("--train-examples", type=int, help="training examples, drawn by --seed [1000]")
    parser.add_argument("--dev-examples", type=int, help="development examples, drawn from the same data [task's own]")
    parser.add_argument("--test-examples", type=int, help="test examples, the same for every seed [1000]")
    parser.add_argument("--per-class", type=int, help="so many training and development examples of each class instead")
    parser.add_argument(
        "--on-bad-row", choices=names.ON_BAD_ROW, help="rows that the task cannot use: refuse or skip [refuse]"
    )
    parser.add_argument("--seed", type=int, help="seed of directions, minibatches and splits [0]")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def _number_or_auto(text: str) -> float | str:
    try:
        return number_or_auto(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        return seconds_of(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
