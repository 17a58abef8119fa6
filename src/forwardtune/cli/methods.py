"""The two ways to tune: MeZO, and backpropagation with Adam. Same model, data, objective and measurements."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import memory
from ..config import AUTO, Train, arguments
from ..errors import InputError
from ..evaluation import training_objective
from ..models import load_model, tune
from ..objectives import Sampling, TaskObjective
from ..tasks.batching import collate
from ..tasks.encoding import Encoded
from ..trajectory import Log, read_log, replay
from . import say
from .results import COMPLETIONS, resume_command
from .session import Session, bar
from .watcher import Course, Deadline, DevWatcher, Samples, StepClock, Watcher, keep_tuned, stop_on_interrupt

if TYPE_CHECKING:
    from ..hf.trainer import MeZOTrainer

#: The adapter that a run began with, so that its step log can be replayed anywhere.
INITIAL = "initial.safetensors"
_DEV = "dev.jsonl"
_BEST = "best.pt"
_REWARDS = "objective.jsonl"
# From this share of steps on that moved nothing, because both sides of a probe had the same objective, advice is given.
_MANY_STILL = 0.2
# The same for weights that an update left at the same stored value.
_MANY_ROUNDED, _NEARLY_ALL_ROUNDED = 0.5, 0.999


@dataclass
class Trained:
    """What came of tuning: facts for ``metrics.json``, and the course of the run, a line for each step."""

    facts: dict[str, Any]
    history: list[dict[str, Any]]


def prepare_model(model: Any, tokenizer: Any, *, options: Train, first: Path | None) -> Any:
    """The model with what is to be tuned. An adapter takes its first weights from the file, if there is one."""
    targets = [name for part in (options.lora_targets or "").split(",") if (name := part.strip())] or None
    model = tune(
        model,
        tokenizer,
        options.tune,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=targets,
        prefix_length=options.prefix_length,
        seed=options.seed,
    )
    tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    say(f"tuning {sum(p.numel() for p in tuned.values()):,} weights in {len(tuned)} tensors ({options.tune})")
    if options.method == "adam" and any(p.dtype == torch.float16 for p in tuned.values()):
        raise InputError("Adam cannot tune float16 weights: choose --dtype float32 or bfloat16, or --tune lora")
    if first is not None and first.is_file() and options.tune in ("lora", "prefix"):
        start_from(model, first)
    return model


def keep_first(model: Any, path: Path) -> None:
    """Write the weights that an adapter starts from: random numbers or activations, which another machine may round
    differently."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}, path)


def start_from(model: Any, path: Path) -> None:
    """Give the tuned weights the values in the file.

    Raises:
        InputError: the file is damaged or of another adapter.
    """
    tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        kept = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): restore the file of the run") from None
    if {name: t.shape for name, t in kept.items()} != {name: p.shape for name, p in tuned.items()}:
        raise InputError(f"{path} does not hold the first weights of this adapter: restore the file of the run")
    with torch.no_grad():
        for name, p in tuned.items():
            p.copy_(kept[name])


def train_mezo(session: Session, folder: Path, log: Log | None, settings: dict[str, Any]) -> Trained | None:
    """Run MeZO; None when Ctrl-C stopped it."""
    from ..search.notes import found

    options, inference_peak = session.options, session.inference_peak()
    objective = make_objective(session)
    trainer = make_trainer(session, folder, objective, options.steps, settings)
    trainer.automatic.announce = say
    course = Course(objective, folder / _REWARDS)
    trainer.add_callback(course)
    if options.log_completions:
        trainer.add_callback(Samples(objective, folder / COMPLETIONS))
    done = log.steps if log else 0
    say(f"tuning for {options.steps} steps{f', {done} of them done' if done else ''}; steps go to {trainer.step_log}")

    def last_loss() -> float:
        record = trainer.mezo.last
        return math.nan if record is None or record.skipped else record.loss

    def last_still() -> bool:
        record = trainer.mezo.last
        return record is not None and record.flat

    def held() -> bool:
        return trainer.mezo.held is not None

    clock = Deadline(session.deadline, lambda: not held())
    trainer.add_callback(clock)
    dev = _watch_dev(session, folder, heard=partial(_hear, trainer, session), held=held, is_over=lambda: clock.is_over)
    trainer.automatic.is_measured = dev is not None and options.eval_steps is not None
    advise = partial(_advise, options.objective)
    seen: dict[str, Any] = {"raised": options.objective != "loss", "still": last_still, "advise": advise}
    with warnings.catch_warnings():
        if options.objective != "loss":  # an accuracy often stands still: _advise says it, with what to do
            warnings.filterwarnings("ignore", message="the tuned weights have not changed the loss")
        peak = _run(trainer, session, done, last_loss, dev, resume=bool(log), **seen)
    stopped = "patience" if dev is not None and dev.gave_up else "time" if clock.is_over else None
    if trainer.state.global_step < options.steps and stopped is None:
        saved = folder / f"checkpoint-{trainer.state.global_step}"
        say(f"stopped after step {trainer.state.global_step} of {options.steps}; the weights so far are in {saved}")
        say(f"go on with: {resume_command(folder, options.objective)}")
        return None
    if dev is not None:  # a kill may have come after the last step
        dev.measure(trainer.state.global_step, trainer.model)
    step_log = read_log(trainer.step_log)
    records = step_log.records
    perturbation = trainer.mezo.perturbation.name if trainer.mezo.perturbation else options.perturbation
    facts = _facts(len(records), sum(r.skipped for r in records), sum(r.seconds for r in records), peak, inference_peak)
    facts["perturbation"] = perturbation
    facts |= found(step_log)
    if stopped is not None:
        facts["stopped"] = stopped
    facts["zero_coefficient_steps"] = sum(record.flat for record in records)
    advise(facts["zero_coefficient_steps"], len(records))
    rounded = _rounded_away(step_log)
    if rounded:
        say(rounded)
    history = _history([(record.loss, record.seconds) for record in records], dev, course.lines)
    best = dev.best if dev else None
    if best is not None:
        facts["dev"], facts["best_step"] = best["dev"], best["step"]
        last = step_log.rollbacks[-1] if step_log.rollbacks else None
        went_back = last is not None and (last.at, last.to) == (len(records), best["step"])
        if best["step"] < len(records) and not went_back:
            session.model = None  # trainer and model go before the model is loaded again
            del trainer, clock
            _go_back(session, step_log.path, best["step"])
    return Trained(facts, history)


def make_trainer(
    session: Session, folder: Path, objective: TaskObjective, steps: int, run: dict[str, Any] | None = None
) -> MeZOTrainer:
    """The trainer of a run of MeZO, with every option of the command line that concerns it."""
    from ..hf.config import MeZOConfig
    from ..hf.trainer import MeZOTrainer

    options = session.options
    try:
        config = MeZOConfig(
            output_dir=str(folder),
            max_steps=steps,
            **{**arguments(options), "perturbation": perturbation_of(session, objective)},
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device == "cuda",
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    held_out = session.splits.get("dev")
    trainer = MeZOTrainer(args=config, run=run, eval_dataset=held_out, **_ingredients(session, objective))
    trainer.cores = session.cores
    return trainer


def train_adam(session: Session, folder: Path, log: Log | None, settings: dict[str, Any]) -> Trained | None:
    """Run backpropagation with Adam; None when Ctrl-C stopped it."""
    from ..paper.baselines import AdamTrainer, adam_arguments

    options, inference_peak = session.options, session.inference_peak()
    arguments = adam_arguments(
        str(folder),
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type=options.lr_scheduler,
        weight_decay=options.weight_decay,
        seed=options.seed,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
    )
    trainer = AdamTrainer(args=arguments, **_ingredients(session, training_objective(session.task)))
    clock = StepClock(lambda: trainer.last_loss)
    trainer.add_callback(clock)
    say(f"tuning for {options.steps} steps by backpropagation")
    dev = _watch_dev(session, folder, keep_tuned(folder / _BEST))
    peak = _run(trainer, session, 0, lambda: trainer.last_loss, dev)
    if trainer.state.global_step < options.steps:
        (folder / _BEST).unlink(missing_ok=True)
        say(f"stopped after step {trainer.state.global_step} of {options.steps}; nothing was saved")
        return None
    losses = [loss for loss, _ in clock.steps]
    seconds = sum(seconds for _, seconds in clock.steps)
    facts = _facts(len(losses), sum(not math.isfinite(loss) for loss in losses), seconds, peak, inference_peak)
    best = dev.best if dev else None
    if best is not None:
        facts["dev"], facts["best_step"] = best["dev"], best["step"]
        if best["step"] < len(losses):
            session.model.load_state_dict(torch.load(folder / _BEST, weights_only=True), strict=False)
    (folder / _BEST).unlink(missing_ok=True)
    session.model.eval()
    return Trained(facts, _history(clock.steps, dev))


METHODS: dict[str, Callable[[Session, Path, Log | None, dict[str, Any]], Trained | None]] = {
    "mezo": train_mezo,
    "adam": train_adam,
}


def _ingredients(session: Session, objective: Callable[[Any, Any], torch.Tensor]) -> dict[str, Any]:
    """What both trainers get."""

    def minibatch(examples: list[Encoded]) -> dict[str, Any]:
        return {**collate(examples, session.layout), "examples": examples}

    return {
        "model": session.model,
        "train_dataset": session.splits["train"],
        "data_collator": minibatch,
        "processing_class": session.tokenizer,
        "objective": objective,
    }


def make_objective(session: Session) -> TaskObjective:
    """The objective that the user named, or the task's loss."""
    options = session.options
    sampling = Sampling(options.temperature, options.seed)
    return TaskObjective(
        options.objective, session.task, session.tokenizer, sampling, sample_steps=options.log_completions
    )


def perturbation_of(session: Session, objective: TaskObjective) -> str:
    """Generation reads every weight at each token, so they are perturbed once, in a copy."""
    options = session.options
    if options.perturbation != "auto" or not objective.generates:
        return str(options.perturbation)
    size = sum(p.numel() * p.element_size() for p in session.model.parameters() if p.requires_grad)
    say(f"text is generated at every evaluation: weights are perturbed in a copy, {size / 2**20:,.0f} MiB more memory")
    return "copy"


def _watch_dev(
    session: Session,
    folder: Path,
    improved: Callable[[Any], object] | None = None,
    heard: Callable[[int, dict[str, float]], object] | None = None,
    held: Callable[[], bool] = lambda: False,
    is_over: Callable[[], bool] = lambda: False,
) -> DevWatcher | None:
    if "dev" not in session.splits:
        return None
    evaluate, options = partial(session.evaluate, "dev", "dev"), session.options
    return DevWatcher(
        evaluate,
        _judge(session),
        options.eval_steps,
        folder / _DEV,
        improved,
        heard=heard,
        patience=options.patience,
        untuned=options.lr == AUTO,  # which goes back to it where nothing is better
        held=held,
        is_over=is_over,
    )


def _hear(trainer: Any, session: Session, step: int, dev: dict[str, float]) -> None:
    """Tell the run's watch what was measured on the development split, as something that should fall."""
    judge = _judge(session)
    trainer.automatic.measured(step, dev[judge] if judge == "loss" else -dev[judge])


def _judge(session: Session) -> str:
    """What steps are compared by on the development split: the loss where that is tuned, as it is less noisy."""
    return "loss" if session.options.objective == "loss" and session.task.loss != "none" else session.metric


def _run(
    trainer: Any,
    session: Session,
    done: int,
    loss: Callable[[], float],
    dev: DevWatcher | None,
    resume: bool = False,
    **seen: Any,
) -> int:
    """Train with a progress bar, until the end or Ctrl-C; the peak memory in bytes."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    memory.reset_peak(session.model.device)
    with bar(session.options.steps, "tuning", "step", done) as progress, stop_on_interrupt() as interrupted:
        held = (lambda: trainer.mezo.held is not None) if session.options.method == "mezo" else (lambda: False)
        trainer.add_callback(Watcher(progress, interrupted, loss, held, session.options.method == "mezo", **seen))
        if dev is not None:
            trainer.add_callback(dev)
        trainer.train(**({"resume_from_checkpoint": True} if resume else {}))
    return memory.peak(session.model.device)


def _go_back(session: Session, step_log: Path, step: int) -> None:
    """Load the base model again and bring it to an earlier step: the log is the checkpoint."""
    gc.collect()
    options = session.options
    say(f"going back to step {step}, which was best on the dev split")
    dtype = read_log(step_log).header["run"].get("dtype", "auto")
    model, _ = load_model(options.model, dtype=dtype, device=options.device)
    session.model = prepare_model(model, session.tokenizer, options=options, first=step_log.parent / INITIAL)
    replay(step_log, session.model, steps=step)


def _facts(steps: int, skipped: int, seconds: float, peak: int, inference_peak: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "seconds_per_step": seconds / max(1, steps),
        "peak_memory_bytes": peak,
        "inference_peak_memory_bytes": inference_peak,
        "steps": steps,
        "skipped_steps": skipped,
    }


def _rounded_away(log: Log) -> str | None:
    """Advice, where most of what the updates would have changed was too small for the weights' dtype."""
    taken = [record for record in log.records if not record.skipped and not record.flat]
    tensors = log.header["tensors"]
    weights = sum(math.prod(tensor["shape"]) for tensor in tensors)
    if not taken:
        return None
    share = sum(record.unchanged for record in taken) / (weights * len(taken))
    dtypes = sorted({tensor["dtype"] for tensor in tensors})
    # Half precision rounds at random, which loses nothing on average but adds noise; float32 rounds to the nearest.
    if share <= (_MANY_ROUNDED if dtypes == ["float32"] else _NEARLY_ALL_ROUNDED):
        return None
    return (
        f"{share:.1%} of the weights kept their stored value ({' and '.join(dtypes)}) in a step, mean: the updates are too small for it. "
        "What helps: a larger --lr, --dtype float32, or an adapter (--tune lora)"
    )


def _advise(objective: str, still: int, steps: int) -> None:
    """Say what helps, if many steps moved nothing."""
    if still <= _MANY_STILL * steps:
        return
    what = f"in {still} of {steps} steps ({still / steps:.0%}) both sides of the probe had the same"
    if objective == "loss":  # which is smooth: the model is broken, or rounding hides the perturbation
        say(f"{what} loss, so they moved nothing. What helps: a lower --lr, if the loss has risen; else a larger --eps")
    else:
        say(
            f"{what} objective, so they moved nothing. What helps: more --probes, a larger --batch-size, a larger --eps, or an "
            "objective with a smooth part such as 'accuracy + 0.1 * loss', where the task has answers"
        )


def _history(
    steps: list[tuple[float, float]], dev: DevWatcher | None, objective: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """A line for each step with its loss and the seconds so far, then the measurements on the dev split."""
    seconds = [0.0, *accumulate(seconds for _, seconds in steps)]
    lines: list[dict[str, Any]] = [
        {"step": i, "seconds": seconds[i], "loss": loss} for i, (loss, _) in enumerate(steps, start=1)
    ]
    for line in objective:
        lines[line["step"] - 1]["objective"] = line["objective"]
    measured = [] if dev is None else dev.lines
    return lines + [{"step": m["step"], "seconds": seconds[m["step"]], "dev": m["dev"]} for m in measured]
