"""L6: what MeZO is compared with: linear probing and backpropagation."""

from .backpropagation import AdamTrainer, adam_arguments
from .probing import Probe, probe

__all__ = ["AdamTrainer", "Probe", "adam_arguments", "probe"]
