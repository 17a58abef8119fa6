"""L1: what describes a run, declared once.

A setting is a field of a dataclass, with its type, default and help, what it belongs to and how far it goes. From these fields come
the command line of ``train``, ``plan``, ``eval`` and ``probe``, the files of ``--config``, the keys of a sweep file, the fields and
arguments of :class:`forwardtune.hf.trainer.MeZOConfig`, and what the step log's header says of a run. Combinations without meaning
are rows of one table (:mod:`.refusals`).

Nothing here needs torch or transformers: what can be refused is refused before they are imported.
"""

from .description import arguments as arguments
from .description import describe as describe
from .description import recorded as recorded
from .description import settings as settings
from .description import with_defaults as with_defaults
from .option import AUTO as AUTO
from .option import NumberOrAuto as NumberOrAuto
from .option import Option as Option
from .option import number_or_auto as number_or_auto
from .option import options as options
from .refusals import Refusal as Refusal
from .refusals import refusal_of as refusal_of
from .refusals import refusals as refusals
from .runs import COMMANDS as COMMANDS
from .runs import SCHEMA as SCHEMA
from .runs import STEPS as STEPS
from .runs import MeZOSettings as MeZOSettings
from .runs import Train as Train
from .runs import as_declared as as_declared
from .runs import group_of as group_of
