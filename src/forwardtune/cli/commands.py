"""Every command with its options. Nothing here needs torch: what a command runs is imported when it runs."""

from __future__ import annotations

from typing import Any

from .. import __version__
from .options import add_config, add_options
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
    parser.add_argument("--output-dir", help="new folder for the tuned model and its step log")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    add_config(parser)
    add_options(parser, "train")
    parser.set_defaults(run="train.run")


def _add_plan(commands: Any) -> None:
    """``plan``: what a run would cost."""
    parser = commands.add_parser("plan", help="say what train would cost: memory, time, and the steps that fit a time")
    add_config(parser)
    add_options(parser, "plan")
    parser.set_defaults(run="plan.run")


def _add_evaluations(commands: Any) -> None:
    """``eval | probe``: what a model does on a task without tuning, or after it."""
    evaluated = commands.add_parser("eval", help="measure a model on a task's test examples; prints one JSON object")
    probed = commands.add_parser("probe", help="linear probing: logistic regression on the frozen model's features")
    for parser, command in ((evaluated, "eval"), (probed, "probe")):
        add_options(parser, command)
        parser.add_argument("--output-dir", help="new folder for metrics.json")
        parser.set_defaults(run=f"evaluate.run_{command}")


def _add_sweeps(commands: Any) -> None:
    """``sweep | report``: a table of many runs from one file."""
    parser = commands.add_parser("sweep", help="run methods x tasks x seeds x a grid of options from one file")
    parser.add_argument("file", help="the sweep file (.yaml); docs/sweeps.md describes it")
    parser.add_argument("--output-dir", help="folder of all runs; the same one resumes [runs/NAME]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores [1]")
    parser.add_argument("--launcher", choices=("slurm", "local"), help="submit runs as jobs, --jobs of them at once")
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of submitit, such as slurm_partition=gpu, timeout_min=600 or gpus_per_node=1; may be given several times",
    )
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
