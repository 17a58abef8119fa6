"""L6: MeZO inside transformers' Trainer. Public methods are overridden; the training loop is Trainer's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..averages import NONE
from ..config import AUTO, MeZOSettings, options
from ..cores import SharedCores
from ..errors import InputError
from ..method.estimators import get_estimator
from ..models import unreached
from ..noise import compile_kernels
from ..optimizer import MeZO
from ..parameters import require_values
from ..points.both_signs import BothSigns
from ..processes import Launch
from ..search.budget import first_settings
from ..storage import is_offloaded, storage_named
from ..strata import Stratified
from ..trajectory import read_log
from ..trajectory.shared import any_has_log, share_log
from ..workers import Alone, workers_of_launch
from .automatic import Automatic
from .averaging import Averaging
from .config import MeZOConfig
from .data_sets import prepared_data
from .given import is_text, quantised_base, warn_of_missing_ends
from .log_keeper import LogKeeper, steps_in_pass
from .model_card import describe
from .resuming import Resumption
from .run_logs import RunLogs
from .sharing import USUAL_PARTS, DividedPredictions, InParts, parts_of
from .step_losses import Objective, StepLosses

_ARGUMENTS = signature(MeZO).parameters


class MeZOTrainer(Stratified, Trainer):
    """``transformers.Trainer`` that tunes with forward passes.

    Takes what Trainer takes, with a :class:`MeZOConfig`. Every step goes to ``steps.jsonl`` in the output folder, and
    ``train(resume_from_checkpoint=True)`` continues from the last logged step, with or without a checkpoint: pass the
    base model again. A resumed run may have another learning rate, which holds from then on; the log has both.

    Args:
        objective: ``(model, inputs) -> losses``, one per example or their mean, in place of the model's own loss. It
            needs no gradient. It gets every column of the data, whatever ``remove_unused_columns`` says: a data collator
            that cannot batch one, such as text, wants it removed from the data. Its methods ``begin_step(step, part)`` and ``end_step()``, if it has them, are told of every
            step, and what ``take_statistics()`` returns is logged (:class:`forwardtune.objectives.TaskObjective`).
        run: anything to keep in the step log's header, as JSON.
        formatting_func: row -> text, which is tuned on in place of the columns.

    A ``train_dataset`` with ``messages``, ``prompt`` and ``completion``, or ``text`` is made into tokens and labels as by TRL's SFTTrainer
    (:class:`.chat_data.ChatData`), and one with ``chosen`` and ``rejected`` into preferences as by its DPOTrainer
    (:class:`.preference_data.PreferenceData`), unless ``objective`` or ``data_collator`` is given; ``max_length``, ``packing``, ``beta``
    and what is learnt are in :class:`MeZOConfig`.

    In several processes (``torchrun``, ``accelerate launch``) each has the whole model and all the data, and they share the evaluations of
    a step and of held-out examples (:class:`~forwardtune.workers.ranks.Ranks`, ``docs/scale.md``). Rank 0 writes; every rank keeps the step
    log, the others in ``ranks/`` in the output folder. A group that ``torchrun --max-restarts`` starts again goes on from it by itself.

    Raises:
        ValueError: more than one GPU in one process, or an optimizer that is not MeZO.
        LogError: from :meth:`train`, when the output folder holds another run or a damaged log.
    """

    args: MeZOConfig
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        run: dict[str, Any] | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._trial: Any = None
        #: Which log a run writes.
        self.run_logs = RunLogs()
        self._run = run
        #: Parts of the model that the text does not enter, by name: they are not tuned.
        self.frozen: list[str] = []
        asked = signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        given = asked.get("model")
        if not isinstance(asked.get("args"), MeZOConfig):
            raise ValueError("MeZOTrainer needs args=MeZOConfig(...), whose defaults are MeZO's")
        self._use_cache = getattr(getattr(given, "config", None), "use_cache", None)
        self._data = prepared_data(asked, objective, formatting_func)
        if self._data is not None:
            objective = self._data.objective
        #: What a step is estimated from.
        self.step_losses = StepLosses(self, objective)
        arguments = asked["args"]
        self.storage = storage_named(arguments.offload, arguments.output_dir, arguments.device)
        if isinstance(given, nn.Module):
            if self.storage is not None:
                self.storage.place(given)  # before Trainer moves it to the device
            require_values(given)
        with quantised_base(given):
            Trainer.__init__(**asked)
        if self.storage is not None:
            self.accelerator.device_placement = False
        self._set_use_cache(self._use_cache)
        if self._data is not None:
            self._data.settle(self)
        if objective is not None:  # which may need what the model does not take
            self.args.remove_unused_columns = False
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                "one process of MeZOTrainer runs on one device: set CUDA_VISIBLE_DEVICES=0, start a process for each with torchrun, or "
                "spread a large model with device_map='auto'"
            )
        #: The processes that share the run.
        self.workers: Alone = workers_of_launch(self.args.worker_timeout)
        self._divided: DividedPredictions | None = None
        if self.args.assignment == "example" and objective is None:
            for given, what in (
                (self.compute_loss_func, "compute_loss_func"),
                (self.args.label_smoothing_factor, "label_smoothing_factor"),
            ):
                if given:
                    raise InputError(
                        f"{what} gives one loss for the batch, and assignment='example' needs one for every example: pass "
                        "MeZOTrainer(objective=...), a function of model and inputs that returns the losses, shape (batch,)"
                    )
        if self.optimizer is not None and not isinstance(self.optimizer, MeZO):
            raise ValueError(f"MeZOTrainer cannot step {type(self.optimizer).__name__}: pass a MeZO, or none")
        self._own_optimizer = self.optimizer is None
        self._rates = [group.get("initial_lr", group["lr"]) for group in self.mezo.param_groups] if self.mezo else []
        if self.mezo is not None and self.mezo.workers is not self.workers:
            self.mezo.workers = self.workers
        self._logged: dict[str, Any] = {}
        #: What finds learning rate and eps, and watches the run.
        self.automatic = Automatic(self)
        #: What chooses the number of threads, on a CPU. Set it to go on with one; else every :meth:`train` has its own.
        self.cores: SharedCores | None = None
        #: What puts an average in the place of a run's weights.
        self.averaging = Averaging(self)
        self._keeper = LogKeeper(self)
        self.add_callback(self._keeper)
        self.add_callback(self.automatic)

    @property
    def mezo(self) -> MeZO:
        """The optimizer, without what Trainer wraps around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """MeZO over the parameters that require grad, in Trainer's two groups: with and without weight decay."""
        self.args.validate()  # a trial's settings are known only now
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            left = self._left_out(model)
            tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in left]
            groups = [
                {"params": [p for name, p in tuned if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in tuned if name not in decayed], "weight_decay": 0.0},
            ]
            lr, eps = self.args.learning_rate, self.args.eps
            first_lr, first_eps = first_settings([name for name, _ in tuned])
            settings = {name: getattr(self.args, name) for name in options(MeZOSettings) if name in _ARGUMENTS}
            settings["eps"] = self._logged.get("eps", first_eps) if eps == AUTO else eps
            settings |= {"parts": self._parts(), "workers": self.workers}
            settings["rule"] = self.args.make_rule()
            settings["group_size"] = self._group_size()
            if self.args.assignment == "example" and self.args.perturbation == AUTO and self.workers.count == 1:
                # Here the closure is known to call the model with the same input; several workers have a side each.
                settings["perturbation"] = BothSigns.name
            self.optimizer = MeZO(
                [group for group in groups if group["params"]],
                lr=first_lr if isinstance(lr, str) else lr,
                seed=self.args.seed,
                max_skipped=self.args.max_skipped,
                module=model,
                **settings,
            )
            weights = [tensor.parameter for tensor in self.optimizer.tuned]
            compile_kernels(
                weights,
                buffered=self.optimizer.rule.name != "sgd",
                structure=self.optimizer.noise.structure,
                announce=self.automatic.announce,
            )
        return self.optimizer

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As Trainer's. Offloaded weights stay where they live."""
        if self.storage is not None:
            self.storage.place(model)  # of model_init; another one has moved already
        elif not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def _left_out(self, model: nn.Module) -> set[int]:
        """The ids of the weights of parts that text does not enter, of a run on text; of a run that goes on, those which it left out."""
        if self._logged:
            self.frozen = self._logged["run"].get("frozen", [])
            tuned = {tensor["name"] for tensor in self._logged["tensors"]}
            kept = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in tuned}
            return {id(p) for p in model.parameters()} - kept if self.frozen else set()
        parts = unreached(model.eval()) if self.args.move == "read" else {}
        if parts and self._data is None and not is_text(self.train_dataset):
            parts = {}
        self.frozen = list(parts)
        left = {id(p): p.numel() for part in parts.values() for p in part}
        if parts:
            self.automatic.announce(
                f"text does not enter {', '.join(parts)}: these {sum(left.values()):,} weights stay as they are (move='all' tunes them too)"
            )
        return set(left)

    @property
    def stratify(self) -> str:  # type: ignore[override]
        """As in the settings."""
        return self.args.stratify

    def _group_size(self) -> int:
        """How many examples share a direction: as was said, or as the run's log has it."""
        if self.args.assignment != "example":
            return 1
        if self.args.group_size is not None:
            return int(self.args.group_size)
        return int(self._logged.get("group_size", 1)) if self._logged else self.examples_in_group()

    def _parts(self) -> int:
        """Into how many parts minibatches are cut: as was said, or as the run's log has it."""
        if self.args.parts is not None:
            return int(self.args.parts)
        if self._logged:
            return int(self._logged.get("parts", 1))
        args = self.args
        estimator = get_estimator(args.estimator, 1.0, args.probes, args.normalize, args.assignment)
        return 1 if self.workers.count <= len(estimator.queries()) else USUAL_PARTS

    def get_train_dataloader(self) -> Any:
        """As Trainer's, with minibatches in parts where there are several."""
        collator: Any = getattr(self, "data_collator")  # noqa: B009
        parts = self.mezo.parts if self.mezo is not None else self._parts()
        if parts > 1:
            self.data_collator = InParts(collator, parts)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def forget_own(self) -> None:
        """Let the optimizer and the scheduler be made again, unless they came from the user."""
        if self._own_optimizer:
            self.optimizer = None
        if self._created_lr_scheduler:
            self.lr_scheduler = None

    def given_rates(self, groups: int) -> list[float]:
        """The learning rate of every group as the user gave it, before any schedule."""
        return [float(self.args.learning_rate)] * groups if self._own_optimizer else self._rates

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of the objective over the batch, or without an objective the model's own loss."""
        objective = self.step_losses.objective
        if objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = torch.as_tensor(objective(model, inputs), dtype=torch.float32)
        return (losses.mean(), {"losses": losses.reshape(-1)}) if return_outputs else losses.mean()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Query the microbatch at the step's probes. Trainer's ``optimizer.step()`` then moves the weights."""
        model.eval()  # dropout would differ between the two sides of a probe
        if self.state.global_step == 0 and not self.mezo.gathering:
            warn_of_missing_ends(parts_of(inputs)[0], getattr(self.data_collator, "tokenizer", self.processing_class))
        parts = self.step_losses.parts(model, self._prepare_inputs(inputs), num_items_in_batch)
        loss = self.step_losses.estimate(parts)
        if self.cores is not None and self.accelerator.sync_gradients:  # the step's last microbatch
            with torch.no_grad(), self.mezo.aside():
                self._keeper.changed_threads = self.cores.look(parts.closures[0])
        if self.mezo.estimator.per_example:  # Trainer adds up what its microbatches give
            loss /= self.current_gradient_accumulation_steps
        return torch.tensor(loss, device=self.args.device)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's. Conversations and texts are made into tokens here, too."""
        if self._data is not None and eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._data.prepare_eval(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As Trainer's, over all parts."""
        return super()._get_num_items_in_batch([part for batch in batch_samples for part in parts_of(batch)], device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer's, over all parts."""
        of_one = super().floating_point_ops
        return sum(of_one(part) for part in parts_of(inputs))

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; several workers predict a batch each, and every one of them has all predictions."""
        if self.workers.count == 1 or self.args.batch_eval_metrics:  # which asks the loader whether a batch is the last
            return super().evaluation_loop(dataloader, *args, **kwargs)
        loss_only = args[1] if len(args) > 1 else kwargs.get("prediction_loss_only")
        loss_only = self.args.prediction_loss_only if loss_only is None else loss_only
        ignored = args[2] if len(args) > 2 else kwargs.get("ignore_keys")

        step = super().prediction_step
        self._divided = DividedPredictions(
            dataloader, self.workers, lambda batch: step(self.model, batch, loss_only, ignored)
        )
        self.gather_function = self._divided.cut
        try:
            return super().evaluation_loop(self._divided, *args, **kwargs)
        finally:
            self._divided = None

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; within :meth:`evaluation_loop` of several workers, what one of them predicted."""
        if self._divided is not None:
            return send_to_device(self._divided.ready.pop(0), self.args.device)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's. ``True`` resumes from the last logged step, a path from that checkpoint of this run.

        A second call goes on from the present weights, with a log of its own beside the first one's (:class:`.run_logs.RunLogs`).
        """
        self._trial = trial
        self.args.validate()
        self.averaging.require()
        self.forget_own()
        self._logged = {}
        if Launch.read().restarts and not resume_from_checkpoint:  # what the launcher starts again goes on
            resume_from_checkpoint = any_has_log(self.step_log, self.workers)
        if trial is not None:
            if resume_from_checkpoint:
                raise InputError("a trial of a hyperparameter search cannot be resumed: search again in another folder")
            for name in ("learning_rate", "eps"):
                # A trial's value is cast to the type of the one before: text takes numbers and "auto" alike.
                setattr(self.args, name, str(getattr(self.args, name)))
        own = self.cores is None and self.args.share_cores and self.args.device.type == "cpu"
        own = own and self.workers.count == 1  # of several, each would decide for itself
        if own:
            self.cores = SharedCores(self.automatic.announce)
        checkpoint, resumption = None, None
        try:
            if not resume_from_checkpoint:
                self.run_logs.begin(self.run_folder)
            else:
                self.run_logs.go_on(self.run_folder, self.model)
                lock = self._keeper.lock()
                share_log(self.step_log, self.workers)
                resumption = Resumption(self, resume_from_checkpoint, lock)
                self._logged = resumption.log.header
                if resumption.is_over:
                    result = resumption.finish()
                else:
                    checkpoint = resumption.checkpoint()
                    self._keeper.continues = resumption.log
            if resumption is None or not resumption.is_over:
                self._set_use_cache(self.args.use_cache)
                result = super().train(checkpoint, trial, *args, **kwargs)
        finally:
            self._set_use_cache(self._use_cache)
            self._keeper.close()
            if checkpoint is not None and not self.workers.is_first and Path(checkpoint).parent == self.run_folder:
                shutil.rmtree(checkpoint, ignore_errors=True)  # made for this resumption; rank 0 keeps its own
            if own and self.cores is not None:
                self.cores.follow(None)
                self.cores = None
            if trial is not None:
                self.automatic.forget()
        self.averaging.take(self._loaded_step)
        return result

    @property
    def _loaded_step(self) -> int | None:
        """After how many steps the model has the weights of, where Trainer went back to the best checkpoint."""
        went_back = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return self.state.best_global_step if went_back else None

    def _set_use_cache(self, value: bool | None) -> None:
        """Trainer switches the cache of keys and values off, and leaves it so in what is saved: a tuned model keeps its own setting."""
        if value is not None:
            self.model.config.use_cache = value

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As Trainer's, which takes data without a length for one pass that lasts for the whole run, resumed ones too."""
        values = super().set_initial_training_values(args, dataloader)
        log = self._keeper.continues
        steps = None if log is None or args.ignore_data_skip or has_length(dataloader) else steps_in_pass(log)
        if steps is None:
            return values
        epochs, _, examples, samples, batch, _, max_steps = values
        return epochs, steps, examples, samples, batch, steps * args.gradient_accumulation_steps, max_steps

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. A checkpoint also says which steps of the log it follows from."""
        super().save_model(output_dir, _internal_call)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR) and self.args.should_save:
            self._keeper.mark(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, by rank 0 alone; the others know afterwards which one is best."""
        if self.workers.is_first:
            super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = self.workers.first(lambda: self.state.best_model_checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the magnitude of the last projected gradient in place of a gradient norm."""
        if logs.pop("grad_norm", None) is not None and self.mezo.last is not None and not self.mezo.last.skipped:
            coefficients = self.mezo.last.present
            logs["projected_gradient"] = sum(map(abs, coefficients)) / len(coefficients)
        self.step_losses.tell("gather", self.workers)
        for name, values in (self.step_losses.tell("take_statistics") or {}).items():
            logs |= {f"objective/{name}/{key}": value for key, value in values.items()}
        if "train_runtime" in logs:  # the closing report comes before the best weights are loaded: the log ends here
            self._keeper.finish()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which names an optimizer that was not there: with MeZO, what the run found, and how to replay it."""
        super().create_model_card(*args, **kwargs)
        if not self.step_log.exists():
            return  # nothing was trained yet
        log, steps = read_log(self.step_log), None if self.is_in_train else self._loaded_step
        card = Path(self.args.output_dir) / "README.md"
        card.write_text(
            describe(
                card.read_text(encoding="utf-8"),
                log,
                log.steps if steps is None or self.averaging.taken != NONE else steps,
                self.averaging.taken,
            ),
            encoding="utf-8",
        )

    @property
    def run_folder(self) -> Path:
        """``output_dir``, or the folder in it that belongs to the present trial of a hyperparameter search; of another rank than 0, its
        own in that."""
        return self.workers.own(Path(self._get_output_dir(self._trial)))

    @property
    def step_log(self) -> Path:
        """Where the steps are logged."""
        return self.run_logs.path(self.run_folder)
