"""The two ways to tune, with the same model, data, objective and measurements: MeZO, here, and backpropagation with Adam (:mod:`.adam`)."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..averages import AUTO, NONE, candidates
from ..config import arguments
from ..errors import InputError
from ..files import plain
from ..method.record import StepRecord
from ..objectives import Sampling, TaskObjective
from ..run_folder import INITIAL, TERMS, read_lines
from ..storage import storage_named
from ..trajectory import Log, read_log, replay
from ..trajectory.log import add_note
from ..trajectory.replay import tuned_by_header
from ..trajectory.updates import standing
from . import say
from .adam import train_adam
from .callbacks import Copied, ObjectiveLog, Run, Trained, advise, ingredients, reporting
from .dev import dev_metric, plainly, worth_on_dev
from .model import keep_offloaded, load_described
from .results import resume_command
from .session import Session
from .tuned import prepare_model, tensors_of, tuned_weights

if TYPE_CHECKING:
    from ..hf.trainer import MeZOTrainer

# From this share of weights on that an update left at the same stored value, mean over the steps, advice is given.
_MANY_ROUNDED, _NEARLY_ALL_ROUNDED = 0.5, 0.999


def train_mezo(session: Session, folder: Path, log: Log | None, settings: dict[str, Any]) -> Trained | None:
    """Run MeZO, and leave the model at its best step; None when Ctrl-C stopped it."""
    trained = _run_mezo(session, folder, log, settings)  # its trainer goes before the model is loaded again
    folder = session.workers.own(folder)
    if trained is not None:
        step, step_log = trained.facts.get("best_step"), read_log(folder / "steps.jsonl")
        if session.options.average != NONE and _take_average(session, folder, step_log, trained):
            return trained
        last = step_log.rollbacks[-1] if step_log.rollbacks else None
        went_back = last is not None and (last.at, last.to) == (step_log.steps, step)
        behind = step is not None and step < step_log.steps
        if (behind and not went_back) or session.model is None:
            if behind:
                say(f"going back to step {step}, which was best on the dev split")
            _rebuild(session, folder, step_log, steps=step if behind else step_log.steps)
    return trained


def _take_average(session: Session, folder: Path, log: Log, trained: Trained) -> bool:
    """Leave the model at the average of the run's weights that was asked for, or at the best of some; False, and no model, if none of them
    is better on the dev split than the run's best step."""
    automatic, kept = session.options.average == AUTO, sum(standing(log.rollbacks, log.steps))
    texts = candidates(kept) if automatic else [session.options.average]
    worth = partial(worth_on_dev, metric=dev_metric(session))
    best, chosen, tried = trained.facts.get("dev") if automatic else None, None, {}
    for text in texts:
        _rebuild(session, folder, log, steps=log.steps, average=text)
        digest = tuned_by_header(log, session.model).digest()
        if "dev" in session.splits:
            tried[text] = session.evaluate(f"average {text}", "dev", loss_alone=session.watched_by_loss)
            say(f"average {text}: dev {plainly(tried[text])}")
        if best is None or worth(tried[text]) > worth(best):
            best, chosen = tried.get(text), {"of": text, "digest": digest}
    if chosen is None:
        say("no average is better on the dev split")
        session.model = None
        return False
    if chosen["of"] != texts[-1]:
        _rebuild(session, folder, log, steps=log.steps, average=chosen["of"])
    say(f"the weights are the average {chosen['of']} of the run")
    add_note(log.path, {"average": {**chosen, "tried": {text: plain(worth(dev)[0]) for text, dev in tried.items()}}})
    trained.facts.pop("best_step", None)
    trained.facts |= {"average": chosen["of"]} | ({} if best is None else {"dev": best})
    return True


def _rebuild(session: Session, folder: Path, log: Log, **which: Any) -> None:
    """Load the base model again, in the place of the present one, and replay the run over it."""
    options, session.model = session.options, None
    gc.collect()
    model, _ = load_described(options, storage_named(options.offload, folder, options.device))
    session.model = prepare_model(
        model, session.tokenizer, options=options, first=folder / INITIAL, tensors=tensors_of(log)
    )
    keep_offloaded(session.model)
    replay(log, session.model, **which)


def _run_mezo(session: Session, folder: Path, log: Log | None, settings: dict[str, Any]) -> Trained | None:
    from ..search.notes import found

    options, objective = session.options, make_objective(session)
    trainer = make_trainer(session, folder, objective, options.steps, settings)
    automatic, done = trainer.automatic, log.steps if log else 0
    automatic.announce = say
    automatic.measured_elsewhere = "dev" in session.splits and options.eval_steps is not None
    trainer.add_callback(Copied(lambda: trainer.mezo))
    own = session.workers.own(folder)
    trainer.add_callback(ObjectiveLog(objective, own, session.workers, completions=bool(options.log_completions)))
    if session.stratify == "label":
        shared = f", {options.group_size} of them share a direction" if (options.group_size or 1) > 1 else ""
        say(f"examples are spread over the minibatches by their labels{shared}")
    say(f"tuning for {options.steps} steps{f', {done} of them done' if done else ''}; steps go to {trainer.step_log}")
    run = Run(
        session,
        trainer,
        own,
        last=lambda: trainer.mezo.last,
        held=lambda: trainer.mezo.held is not None,
        report=automatic.measured,
        is_due=automatic.has_jumped,
        since=done if log and log.end else 0,
    )
    with warnings.catch_warnings():
        if options.objective != "loss":  # an accuracy often stands still: advise() says it, with what to do
            warnings.filterwarnings("ignore", message="the tuned weights have not changed the loss")
        run.train(done, resume_from_checkpoint=True if log else None)
    if run.was_interrupted:
        saved = folder / f"checkpoint-{trainer.state.global_step}"
        say(f"stopped after step {trainer.state.global_step} of {options.steps}; the weights so far are in {saved}")
        say(f"go on with: {resume_command(folder, options.objective)}")
        return None
    if run.dev is not None:  # a kill may have come after the last step
        run.dev.measure(trainer.state.global_step, trainer.model)
    step_log = read_log(trainer.step_log)
    flat = sum(record.flat for record in step_log.records)
    advise(options.objective, flat, step_log.steps)
    _advise_on_rounding(step_log)
    facts = {
        **run.facts(step_log.records),
        **found(step_log),
        "perturbation": trainer.mezo.perturbation.name if trainer.mezo.perturbation else options.perturbation,
        "zero_coefficient_steps": flat,
    }
    return Trained(facts, run.history(step_log.records, read_lines(own / TERMS)))


def make_objective(session: Session) -> TaskObjective:
    """The objective that the user named, or the task's loss."""
    options = session.options
    sampling = Sampling(options.temperature, options.seed)
    return TaskObjective(
        options.objective, session.task, session.tokenizer, sampling, sample_steps=options.log_completions
    )


def make_trainer(
    session: Session, folder: Path, objective: TaskObjective, steps: int, run: dict[str, Any] | None = None
) -> MeZOTrainer:
    """The trainer of a run of MeZO, with every option of the command line that concerns it."""
    from ..hf.config import MeZOConfig
    from ..hf.trainer import MeZOTrainer

    options = session.options
    changes = arguments(options)
    if (
        options.perturbation == "auto"
        and options.assignment == "shared"
        and objective.generates
        and options.offload is None
    ):  # which reads every weight at each token
        size = sum(p.nbytes for p in tuned_weights(session.model).values())
        say(
            f"text is generated at every evaluation: weights are perturbed in a copy, {size / 2**20:,.0f} MiB more memory"
        )
        changes["perturbation"] = "copy"
    changes["stratify"] = session.stratify
    changes["average"] = NONE  # the best step is known later than Trainer ends
    try:
        config = MeZOConfig(
            output_dir=str(folder),
            max_steps=steps,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            disable_tqdm=True,
            **reporting(options.report_to, steps),
            remove_unused_columns=False,
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device == "cuda",
            **changes,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    held_out = session.splits.get("dev")
    trainer = MeZOTrainer(args=config, run=run, eval_dataset=held_out, **ingredients(session, objective))
    trainer.cores = session.cores
    return trainer


def require_trackers(report_to: str | None) -> None:
    """Raise InputError unless the packages of what a run is reported to are there."""
    missing = [name for name in (report_to or "").split(",") if name and find_spec(name) is None]
    if missing:
        raise InputError(f"--report-to {report_to} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def weights_of(log: Log) -> int:
    """How many weights are tuned."""
    return sum(math.prod(tensor["shape"]) for tensor in log.header["tensors"])


def unchanged_share(log: Log, steps: Sequence[StepRecord]) -> float | None:
    """The mean share of the weights that these steps of a log left at the same stored value."""
    return sum(step.unchanged for step in steps) / (weights_of(log) * len(steps)) if steps else None


def _advise_on_rounding(log: Log) -> None:
    """Say what helps, if most of what the updates would have changed was too small for the weights' dtype."""
    taken = [record for record in log.records if not record.skipped and not record.flat]
    share = unchanged_share(log, taken) or 0.0
    dtypes = sorted({tensor["dtype"] for tensor in log.header["tensors"]})
    # Half precision rounds at random, which loses nothing on average but adds noise; float32 rounds to the nearest.
    if share > (_MANY_ROUNDED if dtypes == ["float32"] else _NEARLY_ALL_ROUNDED):
        say(
            f"{share:.1%} of the weights kept their stored value ({' and '.join(dtypes)}) in a step, mean: the updates are too "
            "small for it. What helps: a larger --lr, --dtype float32, or an adapter (--tune lora)"
        )


METHODS: dict[str, Callable[[Session, Path, Log | None, dict[str, Any]], Trained | None]] = {
    "feedback": train_mezo,
    "forward": train_mezo,
    "mezo": train_mezo,
    "adam": train_adam,
}
