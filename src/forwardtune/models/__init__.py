"""L5: models. Loading and saving them, what kind they are, and which of their weights are tuned.

This package is the one part of the library that knows ``peft``.
"""

from .attention import takes_lengths
from .error_directions import start_from_errors
from .feedback import lacks_place, start_from_feedback
from .kinds import Kind, model_kind
from .late import expert_stacks
from .loading import blank_model, context_length, load_model, require_device, save_model
from .merging import merge_adapter
from .places import EMBEDDED_MODEL
from .prefix import forward, stateful_layers
from .principal import a_of, start_from_inputs
from .quantised import KEPT_QUANTISED, checkpoint_format, is_quantised, weights_of
from .reached import freeze_unreached, unreached
from .tuning import lora_modules, tune

__all__ = [
    "EMBEDDED_MODEL", "KEPT_QUANTISED", "Kind", "a_of", "blank_model", "checkpoint_format", "context_length", "expert_stacks",
    "forward", "freeze_unreached", "is_quantised", "lacks_place", "load_model", "lora_modules", "merge_adapter", "model_kind", "require_device", "save_model",
    "start_from_errors", "start_from_feedback", "start_from_inputs", "stateful_layers", "takes_lengths", "tune", "unreached", "weights_of",
]  # fmt: skip
