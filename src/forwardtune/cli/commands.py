"""Every command with its options. Nothing here needs torch: what a command runs is imported when it runs."""

from __future__ import annotations

import argparse
from typing import Any

from ..averages import FORMS, NONE, average_or_none
from ..durations import bytes_of
from ..names import OFFLOADS, QUANTISATIONS
from .options import add_config, add_options, typed
from .parser import Parser

_DESCRIPTION = "Fine-tune language models with forward passes only (MeZO)."


_SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> Parser:
    """The parser of the command line. ``run`` of what it returns names a function of this package, as ``"train.run"``."""
    parser = Parser(prog="forwardtune", description=_DESCRIPTION)
    parser.add_argument(
        "--version", action="store_true", help="print the version, with --verbose those of packages too"
    )
    parser.add_argument("--verbose", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=_SHELLS,
        default=argparse.SUPPRESS,
        help="print what makes a shell complete commands and options",
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for add in (_add_train, _add_plan, _add_evaluations, _add_talk, _add_publishing, _add_sweeps, _add_logs):
        add(commands)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion script and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        from .completion import script  # needs a package, which help does not

        print(script(parser, values))
        parser.exit()


def _command(commands: Any, name: str, help: str, example: str, usage: str | None = None) -> Parser:
    """A command, with an example below its help."""
    parser: Parser = commands.add_parser(
        name,
        usage=usage,
        help=help,
        description=help,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_train(commands: Any) -> None:
    """``train``: from a model and a task to a tuned model."""
    parser = _command(
        commands,
        "train",
        "tune a model on a task",
        "forwardtune train --model smollm2-135m --task reviews --dtype bfloat16 --time-budget 30m --output-dir run",
        usage="%(prog)s [options]",
    )
    first = add_options(parser, "train", first=("model", "task", "output_dir", "time_budget", "tune"))
    first.add_argument("--output-dir", help="new folder for the tuned model and its step log")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    parser.add_argument(
        "--overwrite", action="store_true", help="move what is in --output-dir aside, to a folder beside it"
    )
    add_config(parser)
    parser.set_defaults(run="train.run")


def _add_plan(commands: Any) -> None:
    """``plan``: what a run would cost."""
    parser = _command(
        commands,
        "plan",
        "say what train would cost: memory, time, and the steps that fit a time; and what other ways to tune would",
        "forwardtune plan --model smollm2-135m --task reviews --dtype bfloat16",
        usage="%(prog)s [options]",
    )
    first = add_options(parser, "plan", first=("model", "task", "dtype", "time_budget", "tune"))
    first.add_argument(
        "--no-weights",
        action="store_true",
        help="estimate from the model's config.json alone; nothing is loaded or run",
    )
    first.add_argument(
        "--memory",
        type=typed(bytes_of),
        help="of the machine that it is for, as 80GB or 24GiB [what is free on this one]",
    )
    parser.add_argument("--alone", action="store_true", help="measure the run that is asked for, no other ways")
    add_config(parser)
    parser.set_defaults(run="plan.run")


def _add_evaluations(commands: Any) -> None:
    """``eval | probe``: what a model does on a task without tuning, or after it."""
    evaluated = _command(
        commands,
        "eval",
        "measure a model on a task's test examples; prints one JSON object",
        "forwardtune eval --model run --task reviews",
        usage="%(prog)s [options]",
    )
    probed = _command(
        commands,
        "probe",
        "linear probing: logistic regression on the frozen model's features",
        "forwardtune probe --model smollm2-135m --task reviews",
        usage="%(prog)s [options]",
    )
    for parser, command in ((evaluated, "eval"), (probed, "probe")):
        add_options(parser, command, first=("model", "task", "data_dir", "batch_size", "test_examples"))
        parser.add_argument("--output-dir", help="new folder for metrics.json")
        parser.set_defaults(run=f"evaluate.run_{command}")


def _add_talk(commands: Any) -> None:
    """``predict | generate | chat``: what a tuned model says to what has no answer yet."""
    parser = _command(
        commands,
        "predict",
        "answer the rows of a file with a tuned model",
        "forwardtune predict --model run --input new.csv --output answers.csv",
        usage="%(prog)s [options]",
    )
    first = add_options(parser, "predict", first=("model", "task"))
    first.add_argument("--input", required=True, help="the rows, as the run's data: .csv, .tsv, .jsonl, .json")
    first.add_argument("--output", required=True, help="new file, .csv, .tsv or .jsonl; what was begun is gone on with")
    parser.set_defaults(run="predict.run")

    parser = _command(
        commands,
        "generate",
        "write on behind a text with a tuned model",
        "forwardtune generate --model run --prompt 'The film was' --compare",
    )
    parser.add_argument("--prompt", action="append", help="the text to go on from; may be given again [stdin]")
    add_options(parser, "generate")
    parser.set_defaults(run="talk.run_generate")

    parser = _command(commands, "chat", "talk to a tuned model", "forwardtune chat --model run --compare")
    add_options(parser, "chat", json=False)
    parser.set_defaults(run="talk.run_chat")


def _add_publishing(commands: Any) -> None:
    """``merge | push``: where a tuned model goes."""
    parser = _command(
        commands,
        "merge",
        "put an adapter into its base model, as one ordinary folder",
        "forwardtune merge --model run --output-dir merged --dtype bfloat16",
    )
    add_options(parser, "merge", json=False)
    parser.add_argument("--output-dir", required=True, help="new folder for the model")
    parser.set_defaults(run="publish.run_merge")

    parser = _command(
        commands,
        "push",
        "upload a run's model to the hub, without predictions or samples",
        "forwardtune push run --repo me/reviews --private",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="of the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument(
        "--with-predictions", action="store_true", help="upload what was answered to the test examples too"
    )
    parser.add_argument("--with-samples", action="store_true", help="upload completions too, and with both the report")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded")
    parser.set_defaults(run="publish.run_push")


def _add_sweeps(commands: Any) -> None:
    """``sweep | report``: a table of many runs from one file."""
    parser = _command(
        commands,
        "sweep",
        "run methods x tasks x seeds x a grid of options from one file",
        "forwardtune sweep sweeps/opt-13b.yaml --output-dir runs/opt-13b",
    )
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

    parser = _command(
        commands,
        "report",
        "a page of a run, or of several; tables and plots of a sweep; finished or not",
        "forwardtune report run",
    )
    parser.add_argument("folder", nargs="+", help="the folder of a run, those of several, or that of a sweep")
    parser.add_argument(
        "--output-dir", help="where the page goes, or tables and plots [RUN/report; the sweep's folder]"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables alone, without matplotlib")
    parser.set_defaults(run="sweeps.run_report")

    parser = _command(
        commands,
        "compare",
        "two runs on the same test examples: a paired test, and what flipped",
        "forwardtune compare run other",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="the folder of a run, or of eval --output-dir")
    parser.add_argument("--all", action="store_true", help="show all examples that flipped, not the first ten")
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    parser.set_defaults(run="compare.run")


def _add_logs(commands: Any) -> None:
    """``replay | inspect | export``: what can be done with a step log."""
    parser = _command(
        commands,
        "replay",
        "rebuild tuned weights from base weights and a step log, bit for bit",
        "forwardtune replay run/steps.jsonl --model smollm2-135m --output-dir again",
    )
    parser.add_argument("log", help="steps.jsonl, the folder of a run, or trajectory.safetensors")
    parser.add_argument("--model", required=True, help="the model that the run began with")
    parser.add_argument("--output-dir", required=True, help="new folder for the tuned model")
    parser.add_argument("--steps", type=int, help="replay only this many steps; needed for an unfinished log")
    parser.add_argument(
        "--average",
        type=typed(average_or_none),
        help=f"an average of its weights: {FORMS}, or none [what an export says, else none]",
    )
    parser.add_argument("--device", default="cpu", help="where the weights are rebuilt [cpu]")
    parser.add_argument("--quantize", choices=QUANTISATIONS, help="how the run quantised its model [as the log says]")
    parser.add_argument("--offload", choices=OFFLOADS, help="where weights live that the device has no room for")
    parser.set_defaults(run="logs.run_replay")

    parser = _command(commands, "inspect", "verify a step log and say what it holds", "forwardtune inspect run")
    parser.add_argument("log", help="steps.jsonl, or the folder of a run")
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    parser.set_defaults(run="logs.run_inspect")

    parser = _command(
        commands,
        "export",
        "write a run as trajectory.safetensors, four bytes a step and probe",
        "forwardtune export run/steps.jsonl --output trajectory.safetensors",
    )
    parser.add_argument("log", help="steps.jsonl, or the folder of a run")
    parser.add_argument("--output", default="trajectory.safetensors", help="new file [trajectory.safetensors]")
    parser.add_argument(
        "--average", type=typed(average_or_none), default=NONE, help="what the file is replayed to [none]"
    )
    parser.set_defaults(run="logs.run_export")
