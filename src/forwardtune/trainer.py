"""L6: MeZO inside transformers' Trainer. Public methods are overridden; the training loop is Trainer's own."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SchedulerType, TrainOutput
from transformers.training_args import OptimizerNames

from .auto import AUTO, first_settings, number_or_auto
from .automatic import Automatic, has_searched, plan_of
from .cores import SharedCores
from .errors import InputError
from .noise import compile_kernels
from .optimizer import MeZO
from .rules import Rule, get_rule
from .trajectory import LogError, StepLog, read_log
from .trajectory.log import cut_log, require_no_log, require_same_run
from .trajectory.reader import Log
from .trajectory.replay import apply_log

STEP_LOG = "steps.jsonl"
_TRAINER_STATE = "trainer_state.json"
_PLATEAU = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}

Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


if TYPE_CHECKING:
    NumberOrAuto = float | str
else:
    NumberOrAuto = number_or_auto  # HfArgumentParser reads an argument by calling its type


@dataclass
class MeZOConfig(TrainingArguments):
    """``TrainingArguments`` with MeZO's settings and defaults.

    Learning rate and eps are found (:mod:`forwardtune.automatic`), the batch size is 16, and there is no gradient to clip. What
    MeZO cannot honour is refused with what to do instead.

    Raises:
        ValueError: an argument that has no meaning without gradients, or is out of range.
    """

    learning_rate: NumberOrAuto = field(
        default=AUTO,
        metadata={"help": "A number, or auto: found on held-out examples, and lowered when the run no longer gains."},
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "As in Trainer; the paper's is constant."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: see clip_coefficient."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples in a minibatch."})
    eps: NumberOrAuto = field(default=AUTO, metadata={"help": "Perturbation scale, or auto: measured before the run."})
    probes: int = field(default=1, metadata={"help": "Directions a step; each costs two evaluations."})
    direction: str = field(default="gaussian", metadata={"help": "gaussian or rademacher."})
    perturbation: str = field(default="auto", metadata={"help": "auto, scratch or copy."})
    clip_coefficient: float | None = field(default=None, metadata={"help": "Largest magnitude of a coefficient."})
    max_skipped: int = field(default=10, metadata={"help": "Stop after so many non-finite losses in a row."})
    estimator: str = field(default="spsa", metadata={"help": "spsa (two-sided) or one_sided (probes + 1 evaluations)."})
    normalize: str = field(default="none", metadata={"help": "Units of loss differences: none, sigma (FZOO) or rank."})
    rule: str = field(default="sgd", metadata={"help": "sgd, sign, momentum or adam."})
    momentum: float = field(default=0.9, metadata={"help": "For rule momentum. Adam's are adam_beta1 and adam_beta2."})
    adam_beta2: float = field(default=0.95, metadata={"help": "For rule adam; 0.95 keeps its window at 90 steps."})
    rule_state: str = field(default="auto", metadata={"help": "How moments are kept: exact, window or auto."})
    rule_window: int | None = field(default=None, metadata={"help": "Steps in a window; by default 99% of the weight."})
    share_cores: bool = field(
        default=True,
        metadata={"help": "Take fewer threads while other processes keep cores busy; OMP_NUM_THREADS overrides it."},
    )

    def __post_init__(self) -> None:
        for wrong, remedy in (
            (
                self.fp16,
                "fp16=True scales losses for gradients. Load the model in float16 (dtype=torch.float16) instead",
            ),
            (self.deepspeed, "DeepSpeed shards gradients and optimizer state, which MeZO does not have. Drop it"),
            (self.fsdp, "FSDP is not supported. Drop it, or spread a large model with device_map='auto'"),
            (self.max_grad_norm, "there is no gradient to clip. Leave max_grad_norm at 0 and set clip_coefficient"),
            (
                self.gradient_checkpointing or self.activation_checkpointing,
                "checkpointing saves activations for a backward pass that never comes. Drop it",
            ),
            (self.neftune_noise_alpha, "NEFTune perturbs embeddings in training mode, MeZO evaluates. Drop it"),
            (self.torch_compile, "torch_compile is not supported with perturbed weights. Drop it"),
            (
                self.perturbation == "in_place",
                "perturbation='in_place' drifts and cannot be replayed. Use 'auto', or MeZO without Trainer",
            ),
            (self.auto_find_batch_size, "auto_find_batch_size restarts training steps. Choose the batch size"),
        ):
            if wrong:
                raise ValueError(f"MeZO cannot honour this: {remedy}.")
        for name in ("learning_rate", "eps"):
            try:
                setattr(self, name, number_or_auto(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        super().__post_init__()
        if self.optim != OptimizerNames(TrainingArguments.__dataclass_fields__["optim"].default):
            raise ValueError(f"MeZO cannot honour optim={self.optim.value!r}: it is the optimizer itself. Drop it.")

    def make_rule(self) -> Rule:
        """The rule that these settings describe. ``adam_*`` and ``momentum`` are read by the rule of that name alone."""
        kept = {"state": self.rule_state, "window": self.rule_window}
        own: dict[str, dict[str, Any]] = {
            "momentum": {"momentum": self.momentum, **kept},
            "adam": {"beta1": self.adam_beta1, "beta2": self.adam_beta2, "epsilon": self.adam_epsilon, **kept},
        }
        if self.rule not in own and (self.rule_state, self.rule_window) != ("auto", None):
            raise InputError(f"the rule {self.rule!r} remembers nothing: leave rule_state and rule_window out")
        return get_rule(self.rule, **own.get(self.rule, {}))


class MeZOTrainer(Trainer):
    """``transformers.Trainer`` that tunes with forward passes.

    Takes what Trainer takes, with a :class:`MeZOConfig`. Every step goes to ``steps.jsonl`` in the output folder, and
    ``train(resume_from_checkpoint=True)`` continues from the last logged step, with or without a checkpoint: pass the
    base model again.

    Args:
        objective: ``(model, inputs) -> losses``, one per example or their mean, in place of the model's own loss. It
            needs no gradient. Its methods ``begin_step(step, part)`` and ``end_step()``, if it has them, are told of every
            step, and what ``take_statistics()`` returns is logged (:class:`forwardtune.objectives.TaskObjective`).
        run: anything to keep in the step log's header, as JSON.

    Raises:
        ValueError: more than one process or GPU, or an optimizer that is not MeZO.
        LogError: from :meth:`train`, when the output folder holds another run or a damaged log.
    """

    args: MeZOConfig
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *args: Any, objective: Objective | None = None, run: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.objective = objective
        self._part = 0
        self._run = run
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, MeZOConfig):
            raise ValueError("MeZOTrainer needs args=MeZOConfig(...), whose defaults are MeZO's")
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                "MeZOTrainer runs in one process on one device: set CUDA_VISIBLE_DEVICES=0, or spread a large model "
                "with device_map='auto'"
            )
        if self.optimizer is not None and not isinstance(self.optimizer, MeZO):
            raise ValueError(f"MeZOTrainer cannot step {type(self.optimizer).__name__}: pass a MeZO, or none")
        self._own_optimizer = self.optimizer is None
        self._logged_eps: float | None = None
        self._held_out_batches: list[Any] = []
        #: What finds learning rate and eps, and watches the run.
        self.automatic = Automatic(self)
        self.automatic.is_told = self.args.eval_strategy != IntervalStrategy.NO
        #: What chooses the number of threads, on a CPU. Set it to go on with one; else every :meth:`train` has its own.
        self.cores: SharedCores | None = None
        self._keeper = _LogKeeper(self)
        self.add_callback(self._keeper)
        self.add_callback(self.automatic)

    @property
    def mezo(self) -> MeZO:
        """The optimizer, without what Trainer wraps around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """MeZO over the parameters that require grad, in Trainer's two groups: with and without weight decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in tuned if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in tuned if name not in decayed], "weight_decay": 0.0},
            ]
            lr, eps = self.args.learning_rate, self.args.eps
            first_lr, first_eps = first_settings([name for name, _ in tuned])
            if isinstance(eps, str):
                eps = self._logged_eps or first_eps
            self.optimizer = MeZO(
                [group for group in groups if group["params"]],
                lr=first_lr if isinstance(lr, str) else lr,
                eps=eps,
                probes=self.args.probes,
                direction=self.args.direction,
                perturbation=self.args.perturbation,
                seed=self.args.seed,
                clip_coefficient=self.args.clip_coefficient,
                max_skipped=self.args.max_skipped,
                module=model,
                estimator=self.args.estimator,
                normalize=self.args.normalize,
                rule=self.args.make_rule(),
            )
            weights = [tensor.parameter for tensor in self.optimizer.tuned]
            compile_kernels(weights, buffered=self.optimizer.rule.name != "sgd", announce=self.automatic.announce)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of the objective over the batch, or without an objective the model's own loss."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = torch.as_tensor(self.objective(model, inputs), dtype=torch.float32)
        return (losses.mean(), {"losses": losses.reshape(-1)}) if return_outputs else losses.mean()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Query the microbatch at the step's probes. Trainer's ``optimizer.step()`` then moves the weights."""
        model.eval()  # dropout would differ between the two sides of a probe
        inputs = self._prepare_inputs(inputs)
        begin_step, end_step = (getattr(self.objective, name, None) for name in ("begin_step", "end_step"))
        if begin_step is not None:  # both sides of a probe draw the same random numbers
            self._part = self._part + 1 if self.mezo.gathering else 0
            begin_step(self.mezo.next_step, self._part)
        take_statistics = getattr(self.objective, "take_statistics", None)
        share = 1 if self._scaled_for_accumulation(num_items_in_batch) else self.current_gradient_accumulation_steps

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            if take_statistics is not None and self.mezo.perturbation is None:
                take_statistics()  # evaluations of the first step's self-check are no part of the step
            return loss / share

        try:
            loss = self.mezo.estimate(closure)
        finally:
            if end_step is not None:
                end_step()
        if self.cores is not None and self.accelerator.sync_gradients:  # the step's last microbatch
            with torch.no_grad():
                self._keeper.changed_threads = self.cores.look(closure)
        return torch.tensor(loss, device=self.args.device)

    @property
    def can_hold_out(self) -> bool:
        """Whether :meth:`held_out` has a dataset from which examples can be chosen."""
        return hasattr(self._held_out_dataset(), "__len__")

    def _held_out_dataset(self) -> Any:
        dataset: Any = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset

    def held_out(self, batches: int) -> Callable[[], float]:
        """A function that measures the loss of the present weights on so many minibatches of held-out examples.

        They are spread over ``eval_dataset``, or else ``train_dataset``, and are the same every time; so are the random numbers of
        an objective that samples.
        """
        inputs = self._held_out_inputs(batches)
        begin_step, end_step = (getattr(self.objective, name, None) for name in ("begin_step", "end_step"))

        @torch.no_grad()
        def measure() -> float:
            model = self.model
            model.eval()
            if begin_step is not None and end_step is not None:
                begin_step(0, 0)
                end_step()  # nothing of this belongs to a step's statistics
            losses = []
            for batch in inputs:
                with self.compute_loss_context_manager():
                    losses.append(float(self.compute_loss(model, dict(batch))))
            return math.fsum(losses) / len(losses)

        return measure

    def _held_out_inputs(self, batches: int) -> list[dict[str, Any]]:
        dataset = self._held_out_dataset()
        try:
            count = len(dataset)
        except TypeError:
            raise ValueError(
                "learning_rate='auto' and eps='auto' measure held-out examples, and this dataset has no length: pass an "
                "eval_dataset that has one, or give numbers"
            ) from None
        size = self.args.per_device_train_batch_size
        wanted = min(count, batches * size)
        spread = Subset(dataset, [i * count // wanted for i in range(wanted)])
        loader = DataLoader(spread, batch_size=size, collate_fn=self.get_eval_dataloader(spread).collate_fn)
        return [self._prepare_inputs(batch) for batch in loader]

    def _scaled_for_accumulation(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is already a share of the whole accumulated batch, by Trainer's own rule."""
        if self.objective is not None:
            return False
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. ``True`` resumes from the last logged step, a path from that checkpoint."""
        if self._own_optimizer:
            self.optimizer = None
            self.lr_scheduler = None if getattr(self, "_created_lr_scheduler", True) else self.lr_scheduler
        if resume_from_checkpoint:
            log = self._log_to_resume(resume_from_checkpoint)
            if log.steps >= self._max_steps():
                return self._already_trained(log)
            resume_from_checkpoint = self._checkpoint_of(log)
        own = self.cores is None and self.args.share_cores and self.args.device.type == "cpu"
        if own:
            self.cores = SharedCores(self.automatic.announce)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self._keeper.close()
            if own and self.cores is not None:
                self.cores.follow(None)
                self.cores = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the magnitude of the last projected gradient in place of a gradient norm."""
        if logs.pop("grad_norm", None) is not None and self.mezo.last is not None and not self.mezo.last.skipped:
            coefficients = self.mezo.last.coefficients
            logs["projected_gradient"] = sum(map(abs, coefficients)) / len(coefficients)
        take_statistics = getattr(self.objective, "take_statistics", None)
        if take_statistics is not None:
            for name, values in take_statistics().items():
                logs |= {f"objective/{name}/{key}": value for key, value in values.items()}
        if "train_runtime" in logs:  # the closing report comes before the best weights are loaded: the log ends here
            self._keeper.finish()
        super().log(logs, *args, **kwargs)

    @property
    def step_log(self) -> Path:
        """Where the steps are logged."""
        return Path(self.args.output_dir) / STEP_LOG

    # --- resuming ------------------------------------------------------------------------------------------------

    def _log_to_resume(self, wanted: str | Literal[True]) -> Log:
        """The log of the run, cut to the step from which it goes on."""
        log = read_log(self.step_log)
        steps: int | None = log.steps
        complete = self._complete_checkpoints()
        if wanted is not True:
            steps = _steps_of(Path(wanted))
            if steps is None or steps > log.steps:
                raise LogError(f"{wanted} is not a complete checkpoint of the run in {log.path}: choose another one")
        elif self.args.load_best_model_at_end and log.steps and log.steps not in complete:
            # The kill may have come before the last step was evaluated and saved: do that step again.
            steps = log.steps - 1
        if self.args.lr_scheduler_type in _PLATEAU and steps not in complete:
            raise LogError(
                f"lr_scheduler_type={self.args.lr_scheduler_type!r} depends on evaluations, which the step log does not "
                f"hold: resume from a checkpoint by its path ({complete[max(complete)] if complete else 'there is none'})"
            )
        assert steps is not None
        plan = plan_of(log)
        if self.automatic.finds_lr and "held" not in plan:
            raise LogError(f"the run in {log.path} has a learning rate of its own: pass it instead of 'auto'")
        if self.automatic.finds_lr and not has_searched(log, steps):
            steps = 0  # the first steps are all estimated at the base weights, and none was taken before all were
        if self.args.eps == AUTO:
            self._logged_eps = log.header["eps"]
        return cut_log(log, steps) if steps < log.steps else log

    def _checkpoint_of(self, log: Log) -> str | None:
        """The checkpoint at the log's end, made by replay if there is none; None if no step was taken."""
        self._keeper.continues = log
        if log.steps == 0:
            return None
        if self.automatic.finds_lr:
            optimizer = self.create_optimizer()
            assert isinstance(optimizer, MeZO)
            self.automatic.keep_base(optimizer)
        existing = self._complete_checkpoints().get(log.steps)
        return str(existing) if existing else self._checkpoint_by_replay(log)

    def _already_trained(self, log: Log) -> TrainOutput:
        """Bring the model to the end of a run that has taken all its steps, and close its log if a kill did not."""
        optimizer = self.create_optimizer()
        assert isinstance(optimizer, MeZO)
        step_log = StepLog.resume(log.path, optimizer)
        if log.end is None:
            step_log.finish()
        step_log.close()
        self.state = self._state_before(log.steps)
        self.state.global_step = log.steps
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [record.loss for record in log.records if not record.skipped]
        return TrainOutput(log.steps, sum(losses) / max(1, len(losses)), {})

    def _max_steps(self) -> int:
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _complete_checkpoints(self) -> dict[int, Path]:
        folders = Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        return {steps: folder for folder in folders if (steps := _steps_of(folder)) is not None}

    def _checkpoint_by_replay(self, log: Log) -> str:
        """Bring the model from its base weights to the log's end, and save that as Trainer would have."""
        optimizer = self.create_optimizer()
        assert isinstance(optimizer, MeZO)
        require_same_run(log, optimizer)
        apply_log(log, optimizer)
        max_steps = self._max_steps()
        state = self._state_before(log.steps)
        state.global_step = log.steps
        state.compute_steps(self.args, max_steps)
        state.train_batch_size = self.args.train_batch_size
        scheduler = self.create_scheduler(max_steps, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer's steps were taken by replay, unseen by the scheduler
            for _ in range(log.steps):
                scheduler.step()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{log.steps}"
        shutil.rmtree(folder, ignore_errors=True)  # what a kill in mid-save left
        self.save_model(str(folder))
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")
        state.save_to_json(str(folder / _TRAINER_STATE))
        self.optimizer = self.lr_scheduler = None
        return str(folder)

    def _state_before(self, steps: int) -> TrainerState:
        """Trainer's own state at the last checkpoint, or a new one."""
        earlier = {s: folder for s, folder in self._complete_checkpoints().items() if s <= steps}
        if not earlier:
            stateful = [*self.callback_handler.callbacks, self.control]
            return TrainerState(stateful_callbacks=[item for item in stateful if isinstance(item, ExportableState)])
        return TrainerState.load_from_json(str(earlier[max(earlier)] / _TRAINER_STATE))


class _LogKeeper(TrainerCallback):
    """Opens the step log when the optimizer is ready, and closes it."""

    def __init__(self, trainer: MeZOTrainer) -> None:
        self._trainer = trainer
        self._log: StepLog | None = None
        self.continues: Log | None = None
        #: The number of threads, if it was changed in this step.
        self.changed_threads: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer, automatic = self._trainer.mezo, self._trainer.automatic
        if self.continues is not None:
            threads = noted_threads(self.continues, self.continues.steps)
            if self._trainer.cores is not None:
                self._trainer.cores.follow(threads)
            self._log = StepLog.resume(self.continues.path, optimizer)
            if threads is not None:
                self._note_threads()
            automatic.resume(self._log, self.continues)
        else:
            require_no_log(self._trainer.step_log)  # before anything is measured
            plan = automatic.prepare(state.max_steps)
            self._log = StepLog(self._trainer.step_log, optimizer, self._trainer._run)
            automatic.begin(self._log, plan)
            cores = self._trainer.cores
            if cores is not None and torch.get_num_threads() < cores.most:
                self._note_threads()
        self.continues = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.changed_threads is not None:
            self.changed_threads = None
            self._note_threads()

    def _note_threads(self) -> None:
        assert self._log is not None
        self._log.note({"threads": torch.get_num_threads(), "from_step": self._trainer.mezo.next_step})

    def finish(self) -> None:
        if self._log is not None:
            self._trainer.automatic.stop()
            self._log.finish()
            self._trainer.automatic.finish()
            self.close()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def noted_threads(log: Log, steps: int) -> int | None:
    """The number of threads with which a run went on after so many steps; None if that was the largest."""
    noted = (note.content for note in reversed(log.notes) if "threads" in note.content)
    return next((int(content["threads"]) for content in noted if content["from_step"] <= steps), None)


def _steps_of(checkpoint: Path) -> int | None:
    """Steps that a checkpoint holds; None unless it is complete (Trainer writes its state last)."""
    try:
        return int(json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError):
        return None
