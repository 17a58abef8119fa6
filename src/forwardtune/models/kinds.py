"""L5: causal or masked: what kind of language model a checkpoint or a loaded model is."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal

from ..errors import InputError

Kind = Literal["causal", "masked"]

_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
# A checkpoint of one of these may hold a language model's head under another name; its weights tell.
_NO_TASK = ("Model", "ForPreTraining")
# A language model with what feeds it images.
_PACKAGED = ("ForConditionalGeneration", "ForImageTextToText")
_REMEDY = "give a causal language model (GPT, Llama, Qwen, Gemma, OPT ...) or a masked one (BERT, RoBERTa ...)"


def model_kind(model: Any) -> Kind:
    """What a loaded language model predicts: ``causal`` the next token, ``masked`` the token behind a mask.

    It is read off the name of the model's class, below any adapter. Raises InputError for a model of another kind, such as
    T5 or a classifier.
    """
    base = base_model(model)
    if _is_encoder_decoder(base.config):
        raise InputError(f"{type(base).__name__} is an encoder-decoder: {_REMEDY}")
    for cls in type(base).__mro__:
        if (kind := _kind_of_class(cls.__name__)) is not None:
            return kind
    if takes_text_alone(type(base)):
        return "causal"
    raise InputError(f"{type(base).__name__} is not a causal or masked language model: {_REMEDY}")


def checkpoint_kind(config: Any) -> Kind:
    """The kind of a checkpoint, by its configuration: the class that it was saved from, or else what its type can be.

    A vision-language model, which takes text alone as well, is a causal one. Raises InputError if it is of another kind.
    """
    from transformers.models.auto import modeling_auto

    saved_from = config.architectures or []
    what = " ".join(saved_from) or f"a model of type {config.model_type}"
    if _is_encoder_decoder(config):
        raise InputError(f"it holds {what}, an encoder-decoder: {_REMEDY}")
    for name in saved_from:
        if (kind := _kind_of_class(name)) is not None:
            return kind
    if all(name.endswith(_NO_TASK) for name in saved_from):
        # Types that could be either, such as BERT, are encoders unless they say otherwise.
        if type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            return "masked"
        if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
            return "causal"
    if any(map(is_package, saved_from)):
        if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
            return "causal"
        seen = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if type(config) in seen and takes_text_alone(seen[type(config)]):
            return "causal"
    raise InputError(f"it holds {what}, which is not a causal or masked language model: {_REMEDY}")


def loader_of(config: Any) -> Any:
    """The class of ``transformers`` that loads the language model of a checkpoint: without what feeds it images, where there is a class
    without.

    Raises InputError as :func:`checkpoint_kind`.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if checkpoint_kind(config) == "masked":
        return transformers.AutoModelForMaskedLM
    if type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForImageTextToText
        own = getattr(transformers, (config.architectures or [""])[0], None)  # Mllama's, once it was saved alone
        if getattr(own, "config_class", None) is type(config):
            return own
    return transformers.AutoModelForCausalLM


def is_package(name: str) -> bool:
    """Whether a class of this name holds a language model with what feeds it other things than text."""
    return name.endswith(_PACKAGED)


def takes_text_alone(cls: type) -> bool:
    """Whether a class of ``transformers`` is a vision-language model whose forward pass needs no image."""
    from transformers.models.auto import modeling_auto

    if cls.__name__ not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return False
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return any(p.name == "input_ids" for p in named) and all(p.default is not p.empty for p in named)


def _is_encoder_decoder(config: Any) -> bool:
    return any(getattr(one, "is_encoder_decoder", False) for one in (config, config.get_text_config()))


def base_model(model: Any) -> Any:
    """The model below its adapter, if it has one."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: Any) -> bool:
    """Whether the model is wrapped by ``peft``."""
    # Importing peft takes seconds, and without it there is no such model.
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _kind_of_class(name: str) -> Kind | None:
    """The kind of a ``transformers`` class, by the suffix that says so or by the library's own lists."""
    from transformers.models.auto import modeling_auto

    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith(_CAUSAL_HEADS) or name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    if name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    return None
