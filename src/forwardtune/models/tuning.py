"""L5: which weights of a model are tuned: all of them, some of them, or an adapter beside them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, nearest, warn
from ..names import FROM_EXAMPLES, LORA_INITS
from ..parameters import dtype_name
from .error_directions import start_from_errors
from .feedback import start_from_feedback
from .kinds import is_adapted, model_kind
from .late import expert_stacks, late, late_down, late_mlp
from .prefix import add_prefix
from .principal import start_from_inputs
from .quantised import is_quantised, is_quantised_layer, keep_as_stored, storage_of, with_weights

MODES = ("all", "late-mlp", "lora", "prefix")
#: As peft calls every linear layer but the vocabulary head, as a target of LoRA.
ALL_LINEAR = "all-linear"
#: The same of the layers that write what feed-forward blocks found, and of queries and values, all but the first third (:mod:`.late`).
LATE_DOWN, LATE_ATTENTION = "late-down", "late-attention"

# How libraries name the query and value projections, or the one that holds both, where peft has no default. Latent attention (MLA)
# projects values from a latent.
_PROJECTIONS = tuple(
    names.split()
    for names in (
        "q_proj v_proj", "query value", "query_proj value_proj", "q_lin v_lin", "query_key_value", "qkv_proj", "Wqkv",
        "c_attn", "attn_qkv", "q v", "q_b_proj kv_b_proj", "q_proj kv_b_proj", "Wq Wv", "project_q project_v",
    )
)  # fmt: skip


_STARTS: dict[str, Callable[[Any, Iterable[Mapping[str, Any]]], Any]] = {
    "eva": start_from_inputs,
    "errors": start_from_errors,
    "feedback": start_from_feedback,
}


def tune(
    model: Any,
    tokenizer: Any,
    mode: str,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: Sequence[str] | None = None,
    lora_init: str = "default",
    freeze_a: bool = False,
    inputs: Iterable[Mapping[str, Any]] | None = None,
    prefix_length: int = 5,
    seed: int = 0,
) -> Any:
    """The model with the weights that shall be tuned, and those alone, requiring grad; in evaluation mode.

    ==================  ==================================================================================
    mode                what is tuned
    ==================  ==================================================================================
    ``all``             every weight
    ``late-mlp``        the feed-forward matrices of all layers but the first third; where a model has none, all matrices of
                        these layers (:mod:`.late`)
    ``lora``            ``B A`` in ``W + (alpha / rank) B A``, of the query and value projections (Hu et al., ICLR
                        2022); A and B by ``lora_init``; no dropout
    ``prefix``          keys and values of ``prefix_length`` positions before the text (:mod:`.prefix`)
    anything else       parameters whose name the regular expression is found in (``re.search``), biases for example:
                        ``bias$``. A tied tensor, such as a head that is the embedding too, is one parameter: naming
                        one of its places tunes all of them, which a warning says
    ==================  ==================================================================================

    Adapters are float32 whatever the model is, and the same for a seed on every device. torch's global random state is
    left alone. The model is changed in place; for adapters the result is a ``peft`` model around it.

    Args:
        model: from :func:`load_model`, or any such model without an adapter.
        tokenizer: its tokenizer; ``prefix`` draws tokens from it.
        lora_targets: last parts of the names of the modules to adapt, patterns that are found in whole names (``re.search``), ``all-linear``,
            which is every linear layer but the head, ``late-down``, the linear layers of all layers but the first third that lead from a
            feed-forward block back to the width of the model, ``late-attention``, the query and value projections of these, or last parts
            of the names of tensors that hold a slice for every expert, all of which are ``experts``; by default the modules that ``peft`` adapts in this architecture, else the query and value projections by
            their usual names. A tied head gets a copy of its weights, as merging would move the embedding too; a warning says so.
        lora_init: what A is at first; B is zero. ``default`` and ``gaussian`` are random, peft's; of each layer's inputs ``eva`` takes the principal
            directions (:mod:`.principal`), ``errors`` those that go with the errors of the predictions (:mod:`.error_directions`). With ``feedback`` A
            has both, and B is where a walk along the errors ends (:mod:`.feedback`).
        freeze_a: tune B alone.
        inputs: for ``eva``, ``errors`` and ``feedback``, minibatches of model inputs; for the latter two with labels. ``feedback`` takes a step on each of up to 100.
        seed: of A, or of the tokens that the prefix starts from.

    Raises:
        InputError: a pattern or a target that matches nothing, a size that is not positive, a model that has an adapter already, or one that the mode cannot tune.

    Defaults are the MeZO paper's, appendix E.5.
    """
    keep_as_stored(model)
    if is_adapted(model):
        raise InputError("the model has an adapter already: give the base model, or merge the adapter and save that")
    if mode == "lora":
        if lora_init not in LORA_INITS:
            raise InputError(
                f"LoRA starts as {', '.join(LORA_INITS)}, not as {lora_init!r}{nearest(lora_init, LORA_INITS)}"
            )
        if (lora_init in FROM_EXAMPLES) != (inputs is not None):
            raise InputError(
                "inputs, a few minibatches, and lora_init='eva', 'errors' or 'feedback', which start from them, belong together"
            )
        model = _add_lora(model, lora_rank, lora_alpha, lora_targets, lora_init, seed)
        if inputs is not None:
            _STARTS[lora_init](model, inputs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not (freeze_a and ".lora_A." in name))
    elif mode == "prefix":
        if prefix_length < 1:
            raise InputError(f"the prefix must have a positive length, got {prefix_length}: 5 is usual")
        with _wrapping(seed):  # of values that are overwritten at once
            model = add_prefix(model, tokenizer, prefix_length, seed)
    else:
        if not mode:
            raise InputError(
                f"nothing is named to be tuned: choose {', '.join(MODES)}, or a pattern of parameter names"
            )
        if mode in ("all", "late-mlp") and is_quantised(model):
            raise InputError(
                "the model is quantised: integers stand in the place of most weights and cannot be moved by small steps. Choose lora or prefix, "
                "or a pattern of other weights, such as 'norm|bias'"
            )
        if mode == "late-mlp":
            mode = "|".join(f"^{re.escape(name)}$" for name in late_mlp(model))
        _select(model, "" if mode == "all" else mode)
    return model.eval()


def _select(model: nn.Module, pattern: str) -> None:
    """Let the parameters whose names match require grad, and no others. Tied ones have several names; one suffices."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"{pattern!r} is no regular expression ({error}): choose {', '.join(MODES)}, or a pattern of names"
        ) from None
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in named if expression.search(name)}
    if not chosen:
        parts = {part for name, _ in named for part in name.split(".") if not part.isdigit()}
        raise InputError(
            f"no parameter has {pattern!r} in its name{nearest(pattern, [*MODES, *sorted(parts)]) or '.'} Names are "
            f"{_some([name for name, _ in named])}: choose {', '.join(MODES)}, or a pattern that is found in one"
        )
    for names in _tied(model):
        named_by, others = ([n for n in names if bool(expression.search(n)) == found] for found in (True, False))
        if named_by and others:
            warn(
                f"{' and '.join(named_by)} is tied to {' and '.join(others)}, one tensor in both places: it is tuned in both"
            )
    for name, parameter in storage_of(model):
        if id(parameter) in chosen:
            raise InputError(
                f"{name} is quantised ({dtype_name(parameter.dtype)} {type(parameter.data).__name__}) and cannot be tuned itself: choose "
                "lora or prefix, or a pattern of other weights, such as 'norm|bias'"
            )
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in chosen)


def _add_lora(model: Any, rank: int, alpha: float, targets: Sequence[str] | None, init: str, seed: int) -> Any:
    import peft

    if rank < 1 or not 0 < alpha < float("inf"):
        raise InputError(f"LoRA needs a positive rank and alpha, got {rank} and {alpha}: 8 and 16 are usual")
    stacks = expert_stacks(model)
    names = {name.rpartition(".")[2] for name in stacks}
    given = [t for target in targets or () for t in (sorted(names) if target == "experts" and names else [target])]
    of_experts = [target for target in given if target in names]
    modules = [target for target in given if target not in names]
    wanted = [] if of_experts and not modules else _lora_targets(model, modules)
    layers = matching(model, wanted)
    for place in untie(model, layers):
        warn(
            f"{place} is tied to the embedding, one tensor in both places: LoRA adapts the head alone, which gets a copy of its weights, "
            "so that the adapter can be merged without moving the embedding"
        )
    config = peft.LoraConfig(
        # There is no task of masked language modelling in peft; without one the model is called as it is.
        task_type="CAUSAL_LM" if model_kind(model) == "causal" else None,
        r=rank,
        lora_alpha=int(alpha)
        if alpha == int(alpha)
        else alpha,  # other readers of adapter_config.json expect an integer
        lora_dropout=0.0,
        init_lora_weights=init if init == "gaussian" else True,  # eva is no concern of peft's
        target_modules=wanted,
        target_parameters=sorted({_behind_layers(name) for name in stacks if name.rpartition(".")[2] in of_experts})
        or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )
    model.requires_grad_(False)
    with _wrapping(seed), with_weights(model):
        return peft.get_peft_model(model, config)


def _behind_layers(name: str) -> str:
    """What stands behind the number of a layer: ``model.layers.3.mlp.experts.down_proj`` -> ``mlp.experts.down_proj``."""
    return re.sub(r".*\.\d+\.", "", name)


def untie(model: Any, layers: Sequence[Any]) -> list[str]:
    """Give those of the layers whose weight is tied a copy of their own, and let the configuration say so. Returns their names."""
    tied = {id(dict(model.named_parameters(remove_duplicate=False))[names[0]]) for names in _tied(model)}
    found = []
    for name, module in model.named_modules():
        if any(module is layer for layer in layers) and id(getattr(module, "weight", None)) in tied:
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
            found.append(f"{name}.weight")
    if found:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return found


def lora_modules(model: Any) -> dict[str, int]:
    """The last parts of the names of what a LoRA adapter adapts, modules and tensors of experts, and how many there are of each."""
    names = [*model.targeted_module_names, *model.targeted_parameter_names]
    return dict(sorted(Counter(name.rpartition(".")[2] for name in names).items()))


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _lora_targets(model: nn.Module, given: Sequence[str] | None) -> list[str] | str:
    """Which modules get LoRA: those given, peft's default for the architecture, or the usual names."""
    layers = [name for name, module in model.named_modules() if _is_linear(module)]
    advice = f"Layers are {_some(layers)}: give the last parts of such names as LoRA targets"
    if ALL_LINEAR in (given or ()):
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        return sorted({name.rpartition(".")[2] for name in layers if model.get_submodule(name) is not head})
    sets = {LATE_DOWN: late_down, LATE_ATTENTION: _late_attention}
    meant = [name for target in given or () for name in (sets[target](model) if target in sets else [target])]
    if given and not meant:
        raise InputError(f"{type(model).__name__} has no query and value projections in late layers. {advice}")
    given = [name for target in meant for name in _named(target, layers)]
    for target in given:
        if not matching(model, [target]):
            near = nearest(target, {name.rpartition(".")[2] for name in layers}) or "."
            raise InputError(f"no linear layer is called {target!r}{near} {advice}")
    if found := given or _projections(model):
        return found
    raise InputError(f"no query and value projections were found in {type(model).__name__}. {advice}")


def _projections(model: nn.Module) -> list[str] | str | None:
    """What peft adapts in this architecture, else the usual names of query and value projections."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    default = DEFAULTS.get(getattr(model.config, "model_type", ""))
    if default:
        return default if isinstance(default, str) else list(default)
    return next((usual for usual in _PROJECTIONS if all(matching(model, [name]) for name in usual)), None)


def _late_attention(model: nn.Module) -> list[str]:
    """Names of those of them that lie in attention, in all layers but the first third; none in a model without."""
    layers, names = set(matching(model, _projections(model) or [])), late(model)
    found = [name for name, module in model.named_modules() if module in layers and name.startswith(names)]
    return [name for name in found if re.search(r"attn|attention", name)]


def _named(target: str, layers: Sequence[str]) -> list[str]:
    """The layers that a pattern is found in; a name, or what is found nowhere, as it is."""
    try:
        found = [] if re.fullmatch(r"[\w.-]*", target) else [name for name in layers if re.search(target, name)]
    except re.error as error:
        raise InputError(f"{target!r} is neither a layer's name nor a regular expression ({error})") from None
    return found or [target]


def matching(model: nn.Module, targets: Collection[str] | str) -> list[Any]:
    """The linear layers that peft would adapt for these targets."""
    pattern = targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    return [layer for name, layer in model.named_modules() if _is_linear(layer) and re.fullmatch(pattern, name)]


def _is_linear(module: nn.Module) -> bool:
    """Whether LoRA can stand beside it; quantised layers need not be torch's own."""
    return isinstance(module, (nn.Linear, Conv1D)) or (is_quantised_layer(module) and hasattr(module, "in_features"))


def _some(names: Sequence[str]) -> str:
    """A few of the names, those of repeated layers once."""
    distinct = {re.sub(r"\d+", "*", name): name for name in reversed(names)}
    return ", ".join([*reversed(distinct.values())][:8]) + (" ..." if len(distinct) > 8 else "")


@contextmanager
def _wrapping(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from the seed; afterwards it is as it was. Other devices' are not touched."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # What peft asks of transformers is none of the user's business.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        torch.default_generator.manual_seed(seed)
        yield
