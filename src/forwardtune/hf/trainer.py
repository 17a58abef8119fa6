"""L6: MeZO inside transformers' Trainer. Public methods are overridden; the training loop is Trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..config import AUTO, MeZOSettings, options
from ..cores import SharedCores
from ..errors import InputError
from ..noise import compile_kernels
from ..optimizer import MeZO
from ..points.both_signs import BothSigns
from ..search.budget import first_settings
from ..trajectory import read_log
from .automatic import Automatic
from .config import MeZOConfig
from .data_sets import prepared_data
from .example_losses import ExampleLosses
from .given import quantised_base, warn_of_missing_ends
from .log_keeper import LogKeeper, steps_in_pass
from .model_card import describe
from .resuming import Resumption
from .run_logs import RunLogs

_ARGUMENTS = signature(MeZO).parameters

Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


class MeZOTrainer(Trainer):
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

    Raises:
        ValueError: more than one process or GPU, or an optimizer that is not MeZO.
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
        self._example_losses = ExampleLosses()
        self._objective = objective  # Trainer's hyperparameter search puts a number of its own into `objective`
        self._part = 0
        self._trial: Any = None
        #: Which log a run writes.
        self.run_logs = RunLogs()
        self._run = run
        asked = signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        given = asked.get("model")
        if not isinstance(asked.get("args"), MeZOConfig):
            raise ValueError("MeZOTrainer needs args=MeZOConfig(...), whose defaults are MeZO's")
        self._use_cache = getattr(getattr(given, "config", None), "use_cache", None)
        self._data = prepared_data(asked, objective, formatting_func)
        if self._data is not None:
            objective = self._objective = self._data.objective
        with quantised_base(given):
            Trainer.__init__(**asked)
        self._set_use_cache(self._use_cache)
        if self._data is not None:
            self._data.settle(self)
        if objective is not None:  # which may need what the model does not take
            self.args.remove_unused_columns = False
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                "MeZOTrainer runs in one process on one device: set CUDA_VISIBLE_DEVICES=0, or spread a large model "
                "with device_map='auto'"
            )
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
        self._logged_eps: float | None = None
        #: What finds learning rate and eps, and watches the run.
        self.automatic = Automatic(self)
        #: What chooses the number of threads, on a CPU. Set it to go on with one; else every :meth:`train` has its own.
        self.cores: SharedCores | None = None
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
            tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in tuned if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in tuned if name not in decayed], "weight_decay": 0.0},
            ]
            lr, eps = self.args.learning_rate, self.args.eps
            first_lr, first_eps = first_settings([name for name, _ in tuned])
            settings = {name: getattr(self.args, name) for name in options(MeZOSettings) if name in _ARGUMENTS}
            settings["eps"] = (self._logged_eps or first_eps) if eps == AUTO else eps
            settings["rule"] = self.args.make_rule()
            if self.args.assignment == "example" and self.args.perturbation == AUTO:
                settings["perturbation"] = (
                    BothSigns.name
                )  # here the closure is known to call the model with the same input
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
        if self._objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = torch.as_tensor(self._objective(model, inputs), dtype=torch.float32)
        return (losses.mean(), {"losses": losses.reshape(-1)}) if return_outputs else losses.mean()

    def example_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The losses of the batch's examples, shape (batch,): the objective's, or :class:`~.example_losses.ExampleLosses`."""
        if self._objective is None:
            return self._example_losses(model, inputs, model(**inputs))
        losses = torch.as_tensor(self._objective(model, inputs), dtype=torch.float32)
        if losses.ndim != 1:
            raise InputError(
                f"assignment='example' needs a loss for every example, and the objective returned shape {tuple(losses.shape)}: return the "
                "losses, shape (batch,), or use assignment='shared'"
            )
        return losses

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Query the microbatch at the step's probes. Trainer's ``optimizer.step()`` then moves the weights."""
        model.eval()  # dropout would differ between the two sides of a probe
        self._part = self._part + 1 if self.mezo.gathering else 0
        if self.state.global_step == 0 and self._part == 0:
            warn_of_missing_ends(inputs, getattr(self.data_collator, "tokenizer", self.processing_class))
        inputs = self._prepare_inputs(inputs)
        # Both sides of a probe draw the same random numbers.
        self.tell_objective("begin_step", self.mezo.next_step, self._part)
        share = 1 if self._scaled_for_accumulation(num_items_in_batch) else self.current_gradient_accumulation_steps
        per_example = self.mezo.estimator.per_example

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                if per_example:
                    loss = self.example_losses(model, inputs)
                else:
                    loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch) / share
            if self.mezo.checking:  # evaluations of the first step's self-check are no part of the step
                self.tell_objective("take_statistics")
            return loss

        try:
            loss = self.mezo.estimate(closure)
        finally:
            self.tell_objective("end_step")
        if self.cores is not None and self.accelerator.sync_gradients:  # the step's last microbatch
            with torch.no_grad():
                self._keeper.changed_threads = self.cores.look(closure)
        if per_example:  # Trainer adds up what its microbatches give
            loss /= self.current_gradient_accumulation_steps
        return torch.tensor(loss, device=self.args.device)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's. Conversations and texts are made into tokens here, too."""
        if self._data is not None and eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._data.prepare_eval(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def tell_objective(self, method: str, *arguments: int) -> Any:
        """Call a method of the objective, if it has it."""
        return getattr(self._objective, method, lambda *arguments: None)(*arguments)

    def _scaled_for_accumulation(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is already a share of the whole accumulated batch, by Trainer's own rule."""
        if self._objective is not None:
            return False
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        return bool(by_model or self.compute_loss_func is not None if stated is None else stated)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's. ``True`` resumes from the last logged step, a path from that checkpoint of this run.

        A second call goes on from the present weights, with a log of its own beside the first one's (:class:`.run_logs.RunLogs`).
        """
        self._trial = trial
        self.args.validate()
        self.forget_own()
        self._logged_eps = None
        if trial is not None:
            if resume_from_checkpoint:
                raise InputError("a trial of a hyperparameter search cannot be resumed: search again in another folder")
            for name in ("learning_rate", "eps"):
                # A trial's value is cast to the type of the one before: text takes numbers and "auto" alike.
                setattr(self.args, name, str(getattr(self.args, name)))
        own = self.cores is None and self.args.share_cores and self.args.device.type == "cpu"
        if own:
            self.cores = SharedCores(self.automatic.announce)
        try:
            checkpoint = None
            if not resume_from_checkpoint:
                self.run_logs.begin(self.run_folder)
            else:
                self.run_logs.go_on(self.run_folder, self.model)
                resumption = Resumption(self, resume_from_checkpoint, self._keeper.lock())
                if self.args.eps == AUTO:
                    self._logged_eps = resumption.log.header["eps"]
                if resumption.is_over:
                    return resumption.finish()
                checkpoint = resumption.checkpoint()
                self._keeper.continues = resumption.log
            self._set_use_cache(self.args.use_cache)
            return super().train(checkpoint, trial, *args, **kwargs)
        finally:
            self._set_use_cache(self._use_cache)
            self._keeper.close()
            if own and self.cores is not None:
                self.cores.follow(None)
                self.cores = None
            if trial is not None:
                self.automatic.forget()

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
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self._keeper.mark(folder)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the magnitude of the last projected gradient in place of a gradient norm."""
        if logs.pop("grad_norm", None) is not None and self.mezo.last is not None and not self.mezo.last.skipped:
            coefficients = self.mezo.last.present
            logs["projected_gradient"] = sum(map(abs, coefficients)) / len(coefficients)
        for name, values in (self.tell_objective("take_statistics") or {}).items():
            logs |= {f"objective/{name}/{key}": value for key, value in values.items()}
        if "train_runtime" in logs:  # the closing report comes before the best weights are loaded: the log ends here
            self._keeper.finish()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which names an optimizer that was not there: with MeZO, what the run found, and how to replay it."""
        super().create_model_card(*args, **kwargs)
        if not self.step_log.exists():
            return  # nothing was trained yet
        log, steps = read_log(self.step_log), None
        if self.args.load_best_model_at_end and not self.is_in_train and self.state.best_model_checkpoint is not None:
            steps = self.state.best_global_step
        card = Path(self.args.output_dir) / "README.md"
        card.write_text(
            describe(card.read_text(encoding="utf-8"), log, log.steps if steps is None else steps), encoding="utf-8"
        )

    @property
    def run_folder(self) -> Path:
        """``output_dir``, or the folder in it that belongs to the present trial of a hyperparameter search."""
        return Path(self._get_output_dir(self._trial))

    @property
    def step_log(self) -> Path:
        """Where the steps are logged."""
        return self.run_logs.path(self.run_folder)
