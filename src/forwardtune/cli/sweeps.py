"""``forwardtune sweep | report``: a table of many runs from one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..paper.extra import PLOTS, PROBING, require
from ..paper.report import write_page, write_report
from ..paper.sweep import SweepFolder, read_sweep, run_sweep
from ..paper.sweep.bases import prepare_bases
from ..paper.sweep.plan import slug
from ..paper.sweep.submitted import LAUNCHING, Submitter
from ..run_folder import is_run
from . import say


def run(options: argparse.Namespace) -> int:
    """Do the runs of a sweep file that are not done yet. 1 if some failed."""
    if options.jobs < 1:
        raise InputError(f"--jobs must be positive, got {options.jobs}")
    sweep = read_sweep(Path(options.file), options.data_dir)
    if any(run.command == "probe" for run in sweep.runs):
        require("linear probes", PROBING)
    if options.launcher:
        require(f"jobs of --launcher {options.launcher}", LAUNCHING, extra="slurm")
    elif options.launcher_option:
        raise InputError("--launcher-option belongs to --launcher slurm or local: give it too, or leave it out")
    folder = SweepFolder(Path(options.output_dir or Path("runs") / slug(sweep.name)))
    if options.dry_run:
        folder.require_same_runs(sweep.runs)
        for run in sweep.runs:
            say(f"{folder.state(run):9} {run.title}")
            say(f"{'':9} forwardtune {' '.join(run.arguments(str(folder.of(run))))}")
        return 0
    with folder.locked() as lock:
        folder.require_same_runs(sweep.runs)
        pending = [run for run in sweep.runs if folder.state(run) != "finished"]
        folder.write_plan(sweep)
        say(f"{sweep.name}: {len(sweep.runs)} runs in {folder.path}, {len(sweep.runs) - len(pending)} of them finished")
        if pending:
            say(f"a run's output goes to a .log beside its folder, the first one's to {folder.log_file(pending[0])}")
            if not sweep.keep_models:
                say("weights of finished runs are removed, step logs stay (keep-models: true keeps the weights)")
        bases = prepare_bases(folder.path, pending, say)
        submit = None
        if options.launcher:
            submit = Submitter(options.launcher, folder.path / "jobs", options.launcher_option)
        outcome = run_sweep(sweep, folder, bases=bases, jobs=options.jobs, say=say, lock=lock, submit=submit)
    again = f"forwardtune sweep {options.file} --output-dir {folder.path}"
    again += f" --data-dir {options.data_dir}" if options.data_dir else ""
    again += "".join(f" --launcher-option {one}" for one in options.launcher_option)
    again += f" --launcher {options.launcher} --jobs {options.jobs}" if options.launcher else ""
    if outcome.stopped:
        say(f"stopped with {outcome.finished} of {len(sweep.runs)} runs finished; go on with: {again}")
        return 130
    if outcome.failed:
        say(f"{len(outcome.failed)} of {len(sweep.runs)} runs failed; try them again with: {again}")
    say(f"table and plots: forwardtune report {folder.path}")
    return 1 if outcome.failed else 0


def run_report(options: argparse.Namespace) -> None:
    """Write tables and plots of a sweep, or the page of runs."""
    folders = [Path(name) for name in options.folder]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder; give one that forwardtune train or sweep wrote to")
    if len(folders) > 1 or is_run(folders[0]):
        _report_runs(folders, options)
        return
    folder = folders[0]
    if not options.no_plots:
        require("plots", PLOTS, ", or add --no-plots for the tables alone")
    output = Path(options.output_dir) if options.output_dir else folder
    for path in write_report(folder, output, plots=not options.no_plots):
        say(str(path))


def _report_runs(folders: list[Path], options: argparse.Namespace) -> None:
    if len(folders) > 1 and options.output_dir is None:
        raise InputError("a page of several runs belongs to none of them: say where it goes, with --output-dir")
    if not options.no_plots:
        require("plots", PLOTS, ", or add --no-plots for a page without them")
    output = Path(options.output_dir) if options.output_dir else folders[0] / "report"
    for path in write_page(folders, output, plots=not options.no_plots):
        say(str(path))
