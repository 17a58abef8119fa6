"""What a run tunes: all weights, some, or an adapter, whose first weights are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from ..config import COMMANDS, Train, describe
from ..errors import InputError
from ..evaluation import prepare, training_objective
from ..models import (
    a_of,
    expert_stacks,
    freeze_unreached,
    lacks_place,
    lora_modules,
    start_from_errors,
    start_from_feedback,
    start_from_inputs,
    tune,
)
from ..models.feedback import FOR_A, refuse_no_layer
from ..models.tuning import LATE_ATTENTION
from ..names import FROM_EXAMPLES
from ..objectives import WithPrompts, logits_at, refuse_prompts
from ..strata import StratifiedSampler
from ..tasks import Task
from ..tasks.encoded import Encoded
from ..trajectory import Log
from ..trajectory.updates import Trajectory
from . import say
from .options import flag
from .progress import bar
from .session import Session

# Weight of the loss over prompts in the walk, where text is written.
_PROMPTS = 0.3
# Minibatches of the training examples from which A of LoRA starts.
_BATCHES = {"eva": 8, "errors": 32}


def prepare_model(
    model: Any,
    tokenizer: Any,
    task: Task | None = None,
    *,
    options: Train,
    first: Path | None,
    tensors: Collection[str] | None = None,
    frozen: list[str] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """The model with what is to be tuned. An adapter takes its first weights from the file, if there is one.

    Args:
        given: the settings that somebody gave. If the method is none of them, the model decides on it, and the options change with it; so does the task on which layers
            LoRA adapts where it starts from the errors.
        tensors: names of the tuned tensors of the run that goes on; None: the model shows what text enters.
        frozen: takes the names of the parts that it does not enter.

    Raises:
        InputError: Adam cannot tune it; or the file is damaged, or of another adapter.
    """
    if given is not None:
        _suit(options, model, task, given)
        if options.prompt_loss_weight and task is not None:
            refuse_prompts(model, task)
    model = tune(
        model,
        tokenizer,
        options.tune,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=[name for part in (options.lora_targets or "").split(",") if (name := part.strip())] or None,
        lora_init="default" if options.lora_init in FROM_EXAMPLES else options.lora_init,  # until there are inputs
        freeze_a=options.freeze_a,
        prefix_length=options.prefix_length,
        seed=options.seed,
    )
    if tensors is not None:
        of_run = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in tensors}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in of_run)
    elif options.method != "adam" and options.move == "read" and (parts := freeze_unreached(model)):
        numel = sum(parts.values())
        say(
            f"text does not enter {', '.join(parts)}: these {numel:,} weights stay as they are (--move all tunes them too)"
        )
        if frozen is not None:
            frozen += parts
    tuned = tuned_weights(model)
    say(f"tuning {sum(p.numel() for p in tuned.values()):,} weights in {len(tuned)} tensors ({options.tune})")
    if options.tune == "lora":
        say(_adapted(model))
        if options.lora_init == "feedback":
            refuse_no_layer(model)
    if options.method == "adam" and any(p.dtype == torch.float16 for p in tuned.values()):
        raise InputError("Adam cannot tune float16 weights: choose --dtype float32 or bfloat16, or --tune lora")
    if first is not None and first.is_file() and options.tune in ("lora", "prefix"):
        try:
            kept = load_file(first)
        except SafetensorError as error:
            raise InputError(f"{first} is damaged ({error}): restore the file of the run") from None
        begun = first_weights(model)
        if {name: t.shape for name, t in kept.items()} != {name: p.shape for name, p in begun.items()}:
            raise InputError(f"{first} does not hold the first weights of this adapter: restore the file of the run")
        for name, p in begun.items():
            p.copy_(kept[name])
    elif first is not None and options.lora_init in FROM_EXAMPLES:
        raise InputError(
            f"{first} is missing, which holds what the run took from its examples: restore the file of the run"
        )
    return model


def _suit(options: Any, model: Any, task: Task | None, given: Mapping[str, Any]) -> None:
    """Where nobody named the method: ``forward``, for a model that has no place for ``feedback``. Where nobody named the layers: those of attention, too, for text that is
    written, whose words attention takes from the prompt; where there are labels they bring nothing (docs/feedback.md). So it is with a loss over prompts."""
    if options.method != "feedback":
        return
    why = lacks_place(model) if "method" not in given else None
    if why is not None:
        command = next(name for name, kind in COMMANDS.items() if kind is type(options))
        vars(options).update(vars(describe(command, {**given, "method": "forward"}, spell=flag)))
        say(f"{why}: the method is forward")
    elif task is not None and task.free_text:
        if given.get("lora_targets") is None:
            options.lora_targets = f"{options.lora_targets},{LATE_ATTENTION}"
        if given.get("prompt_loss_weight") is None:
            options.prompt_loss_weight = _PROMPTS


def start_from_examples(session: Session) -> None:
    """Let LoRA start from what the options say of some of the training examples; of rank 0, for all."""
    options, init = session.options, session.options.lora_init
    objective, examples = training_objective(session.task), session.splits["train"]
    if init == "feedback":
        begun = first_weights(_walked(session))
    else:
        count = _BATCHES[init] * options.batch_size
        examples = examples[:: max(1, len(examples) // count)][:count]
        batches = list(_minibatches(session, examples))
        if init == "eva":
            begun = first_weights(start_from_inputs(session.model, batches, logits_at))
        else:
            begun = first_weights(start_from_errors(session.model, batches, objective))
    for name, kept in load(session.workers.bytes_of(0, lambda: save(begun))).items():
        begun[name].copy_(kept)
    if init != "feedback":
        rows = {name: int(a.any(dim=1).sum()) for name, a in begun.items() if ".lora_A." in name}
        some_rows = f", {max(rows.values())} of {options.lora_rank} rows" if init == "errors" else ""
        say(f"  A from the {'inputs' if init == 'eva' else 'errors'} of {len(examples)} training examples{some_rows}")


def _walked(session: Session) -> Any:
    """The model whose adapter went along the errors of its minibatches, watched by the loss of the dev split where there is one."""
    options, train = session.options, session.splits["train"]
    labels = [example.label for example in train] if session.stratify == "label" else [0] * len(train)
    sampler = StratifiedSampler(labels, options.seed)
    order = chain.from_iterable(repeat(sampler))
    some = (train[i] for i in islice(order, options.feedback_steps * options.batch_size))
    losses: list[float] = []
    objective, lowered = losses_of_walk(session)

    def counted(losses: Any, model: Any, batch: Any) -> torch.Tensor:
        progress.update()
        return losses(model, batch)

    def watched() -> float:
        losses.append(session.evaluate("start", "dev", loss_alone=True)["loss"])
        return losses[-1]

    say(f"starting from {options.feedback_steps} minibatches' errors, a forward pass each")
    with bar(options.feedback_steps + min(FOR_A, options.feedback_steps) + 1, "errors", "pass") as progress:
        model = start_from_feedback(
            session.model, _minibatches(session, some), partial(counted, objective), lowered=partial(counted, lowered),
            steps=options.feedback_steps, watched=watched if "dev" in session.splits else None,
        )  # fmt: skip
    if losses:
        say(f"  dev loss {losses[0]:.4f} -> {min(losses):.4f}")
    return model


def losses_of_walk(session: Session) -> tuple[Any, Any]:
    """Those that A starts from, and those that the steps lower."""
    objective, weight = training_objective(session.task), session.options.prompt_loss_weight
    return objective, WithPrompts(session.task, weight, session.options.seed) if weight else objective


def input_of_walk(session: Session, examples: Sequence[Encoded]) -> dict[str, Any]:
    """A minibatch; where prompts are learned from, too, each stands by itself."""
    layout = session.layout
    if session.options.prompt_loss_weight and layout is not None:
        layout = replace(layout, begun=False)
    return prepare(session.model, session.tokenizer, examples, layout)


def _minibatches(session: Session, examples: Iterable[Encoded]) -> Iterator[dict[str, Any]]:
    """Of the options' size, as model inputs."""
    some = iter(examples)
    while batch := list(islice(some, session.options.batch_size)):
        yield input_of_walk(session, batch)


def _adapted(model: Any) -> str:
    """What is said of the places of an adapter, and of experts that it does not reach."""
    places = lora_modules(model)
    said = f"  LoRA on {', '.join(f'{name} ({count})' for name, count in places.items())}"
    beyond = {name: p for name, p in expert_stacks(model).items() if name.rpartition(".")[2] not in places}
    if beyond:
        numel = sum(p.numel() for p in beyond.values())
        said += f"; not on the experts, {numel:,} weights: --lora-targets NAMES,experts reaches them"
    return said


def keep_first(model: Any, path: Path) -> None:
    """Write the weights that an adapter starts from: random numbers or activations, which another machine may round
    differently."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.contiguous() for name, p in first_weights(model).items()}, path)


def first_weights(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter starts from: what is tuned of it, and a frozen A beside that."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for tuned in tuned_weights(model) for name in (a_of(tuned), tuned)}


def tuned_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def tensors_of(log: Log | Trajectory) -> frozenset[str]:
    """The names of the tensors that the run of a log tunes."""
    return frozenset(tensor["name"] for tensor in log.header["tensors"])
