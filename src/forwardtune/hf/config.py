"""``TrainingArguments`` for MeZO."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import TrainingArguments

from ..averages import NONE, average_or_auto
from ..config import AUTO, MeZOSettings, NumberOrAuto, as_declared, number_or_auto
from ..errors import InputError, nearest, warn
from ..method.estimators import get_estimator
from ..method.rule import Rule
from ..method.rules import get_rule
from ..names import STRATA
from ..processes import Launch
from .sharing import as_one_process, take_place

# What has no meaning without gradients, and no effect on a loss.
_OF_GRADIENTS = (
    "max_grad_norm", "optim", "optim_args", "optim_target_modules", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs",
)  # fmt: skip


@dataclass
class MeZOConfig(MeZOSettings, TrainingArguments):
    """``TrainingArguments`` with MeZO's settings and defaults (:class:`forwardtune.config.MeZOSettings`).

    Learning rate and eps are found (``docs/automatic.md``), the batch size is 16, and there is no gradient to clip. A run
    that finds its learning rate and evaluates does so before the first step too (``eval_on_start``), and after the last one.
    Arguments copied from a run with gradients are taken: what only says how gradients are clipped, stored or used is ignored, with one
    warning that lists it. What would change the result, and MeZO cannot honour, is refused with what to do instead.

    In several processes (``torchrun``, ``accelerate launch``) each takes the whole minibatch, and they share its evaluations: ``world_size``
    is 1 for all that Trainer divides between processes, ``process_index`` says which one writes (``docs/scale.md``).

    Raises:
        ValueError: an argument that cannot be honoured, or is out of range.
    """

    learning_rate: NumberOrAuto = as_declared("lr")  # noqa: RUF009
    lr_scheduler_type: str = as_declared("lr_scheduler")
    max_grad_norm: float = field(default=0.0, metadata={"help": "Ignored: see clip_coefficient."})
    per_device_train_batch_size: int = as_declared("batch_size")
    offload: str | None = as_declared("offload")
    max_skipped: int = field(default=10, metadata={"help": "Stop after so many non-finite losses in a row."})
    adam_beta2: float = field(default=0.95, metadata={"help": "For rule adam; 0.95 keeps its window at 90 steps."})
    rule_window: int | None = field(
        default=None, metadata={"help": "Steps in a window; by default as many as hold 99 percent of the weight."}
    )
    share_cores: bool = field(
        default=True,
        metadata={"help": "Take fewer threads while other processes keep cores busy; OMP_NUM_THREADS overrides it."},
    )

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest input in tokens that conversations and texts are cut to, or packed into."},
    )
    packing: bool = field(default=False, metadata={"help": "Put several conversations or texts into a row."})
    eval_packing: bool | None = field(
        default=None, metadata={"help": "The same for eval_dataset; by default as packing."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "How far preferences may move the model from its reference (DPO)."}
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain texts."})
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Learn the assistant's turns of messages alone (TRL's default is all of them)."}
    )
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Learn the completion alone where there is a prompt; by default yes."}
    )

    def __post_init__(self) -> None:
        self.validate()
        super().__post_init__()

    @cached_property
    def _setup_devices(self) -> torch.device:
        launch = Launch.read()
        if launch.count == 1:
            return super()._setup_devices
        with as_one_process():
            device: torch.device = super()._setup_devices
        self._n_gpu = int(device.type == "cuda")
        return take_place(self.distributed_state, launch) or device

    def validate(self) -> None:
        """Read numbers that came as text, and raise ValueError for what MeZO cannot honour.

        A run does it again when it begins, as fields may be set later: by hand, or by ``Trainer.hyperparameter_search``.
        """
        Launch.read()
        self._ignore_what_is_of_gradients()
        full_eval = "evaluate() casts the model itself, and training goes on with what was rounded. Load the model in"
        for wrong, remedy in (
            (
                self.fp16,
                "fp16=True scales losses for gradients. Load the model in float16 (dtype=torch.float16) instead",
            ),
            (self.bf16_full_eval, f"{full_eval} bfloat16 (dtype=torch.bfloat16), or set bf16=True to compute in it"),
            (self.fp16_full_eval, f"{full_eval} float16 (dtype=torch.float16)"),
            (self.deepspeed, "DeepSpeed shards gradients and optimizer state, which MeZO does not have. Drop it"),
            (self.fsdp, "FSDP is not supported. Drop it, or spread a large model with device_map='auto'"),
            (self.neftune_noise_alpha, "NEFTune perturbs embeddings in training mode, MeZO evaluates. Drop it"),
            (self.torch_compile, "torch_compile is not supported with perturbed weights. Drop it"),
            (self.auto_find_batch_size, "auto_find_batch_size restarts training steps. Choose the batch size"),
        ):
            if wrong:
                raise ValueError(f"MeZO cannot honour this: {remedy}.")
        for name in ("learning_rate", "eps"):
            try:
                setattr(self, name, number_or_auto(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        # What the optimizer would refuse once the model is loaded, it refuses now.
        eps = 1.0 if isinstance(self.eps, str) else self.eps
        get_estimator(self.estimator, eps, self.probes, self.normalize, self.assignment, self.group_size or 1)
        if self.stratify not in STRATA:
            raise InputError(
                f"unknown stratify {self.stratify!r}{nearest(str(self.stratify), STRATA)}: choose one of {', '.join(STRATA)}"
            )
        rule = self.make_rule()
        if average_or_auto(self.average) != NONE:
            rule.reach([], [])  # refused where the rule is not linear
            if self.sparsity:
                raise InputError(
                    "an average is a sum of directions, which with sparsity depend on the weights: leave one of them out"
                )
        if self.learning_rate == AUTO and self.eval_strategy != "no":
            self.eval_on_start = True  # the untuned model is a point to go back to

    def _ignore_what_is_of_gradients(self) -> None:
        """Take back what says how gradients are clipped, stored or used, with one warning that lists it: no loss depends on it."""
        fields = self.__dataclass_fields__
        of_adam = ("adam_beta1", "adam_beta2", "adam_epsilon") if self.rule != "adam" else ()
        names = [name for name in (*_OF_GRADIENTS, *of_adam) if name in fields]  # versions differ
        given = {name: getattr(self, name) for name in names}
        ignored = {name: value for name, value in given.items() if value and value != fields[name].default}
        for name in ignored:
            setattr(self, name, fields[name].default)
        if ignored:
            listed = ", ".join(f"{name}={getattr(value, 'value', value)!r}" for name, value in ignored.items())
            clip = " clip_coefficient limits a projected gradient." if "max_grad_norm" in ignored else ""
            warn(
                f"ignored, as there is neither a backward pass nor another optimizer than MeZO's rule: {listed}.{clip}"
            )

    def make_rule(self) -> Rule:
        """The rule that these settings describe. ``adam_*`` and ``momentum`` are read by the rule of that name alone."""
        kept = {"state": self.rule_state, "window": self.rule_window}
        own: dict[str, dict[str, Any]] = {
            "momentum": {"momentum": self.momentum, **kept},
            "muon": {"momentum": self.momentum, "window": self.rule_window},
            "adam": {"beta1": self.adam_beta1, "beta2": self.adam_beta2, "epsilon": self.adam_epsilon, **kept},
        }
        if self.rule not in own and (self.rule_state, self.rule_window) != ("auto", None):
            raise InputError(f"the rule {self.rule!r} remembers nothing: leave rule_state and rule_window out")
        anchored = {"decay_towards": self.decay_towards} if self.decay_towards != "zero" else {}
        return get_rule(self.rule, **own.get(self.rule, {}), **anchored)
