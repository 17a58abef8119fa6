"""L6: MeZO inside transformers' Trainer. Public methods are overridden; the training loop is Trainer's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..config import AUTO
from ..cores import SharedCores
from ..errors import InputError, warn
from ..noise import compile_kernels
from ..optimizer import MeZO
from ..search.budget import first_settings
from ..trajectory import read_log
from .automatic import Automatic
from .config import MeZOConfig
from .model_card import describe
from .resuming import LogKeeper, Resumption, steps_in_pass

STEP_LOG = "steps.jsonl"

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
        self._objective = objective  # Trainer's hyperparameter search puts a number of its own into `objective`
        self._part = 0
        self._trial: Any = None
        self._run = run
        given = kwargs.get("model", args[0] if args else None)
        self._use_cache = getattr(getattr(given, "config", None), "use_cache", None)
        with _quantised_base(given):
            super().__init__(*args, **kwargs)
        self._set_use_cache(self._use_cache)
        if not isinstance(self.args, MeZOConfig):
            raise ValueError("MeZOTrainer needs args=MeZOConfig(...), whose defaults are MeZO's")
        if objective is not None:
            self.args.remove_unused_columns = (
                False  # those that the model does not take may be what the objective needs
            )
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                "MeZOTrainer runs in one process on one device: set CUDA_VISIBLE_DEVICES=0, or spread a large model "
                "with device_map='auto'"
            )
        if self.optimizer is not None and not isinstance(self.optimizer, MeZO):
            raise ValueError(f"MeZOTrainer cannot step {type(self.optimizer).__name__}: pass a MeZO, or none")
        self._own_optimizer = self.optimizer is None
        self._rates = [group.get("initial_lr", group["lr"]) for group in self.mezo.param_groups] if self.mezo else []
        self._logged_eps: float | None = None
        self._held_out_batches: list[Any] = []
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Query the microbatch at the step's probes. Trainer's ``optimizer.step()`` then moves the weights."""
        model.eval()  # dropout would differ between the two sides of a probe
        if self.state.global_step == 0 and not self.mezo.gathering:
            self._require_ends(inputs)
        inputs = self._prepare_inputs(inputs)
        begin_step, end_step = (getattr(self._objective, name, None) for name in ("begin_step", "end_step"))
        if begin_step is not None:  # both sides of a probe draw the same random numbers
            self._part = self._part + 1 if self.mezo.gathering else 0
            begin_step(self.mezo.next_step, self._part)
        take_statistics = getattr(self._objective, "take_statistics", None)
        share = 1 if self._scaled_for_accumulation(num_items_in_batch) else self.current_gradient_accumulation_steps

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            if take_statistics is not None and self.mezo.checking:
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

    def _require_ends(self, inputs: dict[str, Any]) -> None:
        """Warn of a collator that leaves no EOS in the labels because padding has the same token."""
        tokenizer: Any = getattr(self.data_collator, "tokenizer", self.processing_class)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None or end != getattr(tokenizer, "pad_token_id", None):
            return
        tokens, seen, labels = (inputs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if tokens is None or seen is None or labels is None or not tokens.shape == seen.shape == labels.shape:
            return
        ends = (tokens == end) & (seen == 1)
        if ends.any() and (labels[ends] == -100).all():
            warn(
                f"padding and end of text are the same token ({tokenizer.eos_token}), and the data collator took it out of the "
                f"labels: none of the {int(ends.sum())} ends in the first minibatch is a target, so the model is not taught to "
                "stop. Give the tokenizer another pad_token before the collator is made, such as its unk_token",
            )

    @property
    def can_hold_out(self) -> bool:
        """Whether :meth:`held_out` has a dataset from which examples can be chosen."""
        return hasattr(self._held_out_dataset(), "__len__")

    @property
    def held_out_metric(self) -> str:
        """The name of the loss on ``eval_dataset`` among an evaluation's metrics; of several datasets, the first."""
        if isinstance(self.eval_dataset, dict) and self.eval_dataset:
            return f"eval_{next(iter(self.eval_dataset))}_loss"
        return "eval_loss"

    def _held_out_dataset(self) -> Any:
        dataset: Any = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset

    def held_out(self, batches: int) -> Callable[[], float]:
        """A function that measures the loss of the present weights on so many minibatches of held-out examples.

        They are spread over ``eval_dataset``, or else ``train_dataset``, and are the same every time; so are the random numbers of
        an objective that samples.
        """
        inputs = self._held_out_inputs(batches)
        begin_step, end_step = (getattr(self._objective, name, None) for name in ("begin_step", "end_step"))

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
        if self._objective is not None:
            return False
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's. ``True`` resumes from the last logged step, a path from that checkpoint of this run."""
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
            if resume_from_checkpoint:
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
        take_statistics = getattr(self._objective, "take_statistics", None)
        if take_statistics is not None:
            for name, values in take_statistics().items():
                logs |= {f"objective/{name}/{key}": value for key, value in values.items()}
        if "train_runtime" in logs:  # the closing report comes before the best weights are loaded: the log ends here
            self._keeper.finish()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which names an optimizer that was not there: with MeZO, what the run found, and how to replay it."""
        super().create_model_card(*args, **kwargs)
        if not self.step_log.exists():
            return  # nothing was trained yet
        best = (
            self.args.load_best_model_at_end and not self.is_in_train and self.state.best_model_checkpoint is not None
        )
        log = read_log(self.step_log)
        card = Path(self.args.output_dir) / "README.md"
        steps = self.state.best_global_step if best else log.steps
        card.write_text(describe(card.read_text(encoding="utf-8"), log, steps), encoding="utf-8")

    @property
    def run_folder(self) -> Path:
        """``output_dir``, or the folder in it that belongs to the present trial of a hyperparameter search."""
        return Path(self._get_output_dir(self._trial))

    @property
    def step_log(self) -> Path:
        """Where the steps are logged."""
        return self.run_folder / STEP_LOG


@contextmanager
def _quantised_base(model: Any) -> Iterator[None]:
    """Inside, Trainer takes a quantised model without an adapter; MeZO tunes its unquantised weights without a gradient.

    Trainer's check looks at this attribute, which transformers sets on models with an adapter of its own.
    """
    mark = "_hf_peft_config_loaded"
    marked = not getattr(model, "is_quantized", False) or getattr(model, mark, False)
    if not marked:
        setattr(model, mark, True)
    try:
        yield
    finally:
        if not marked:
            setattr(model, mark, False)
