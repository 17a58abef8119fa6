"""L1: what describes a run, declared once.

A setting is a field of a dataclass, with its type, default and help, what it belongs to and how far it goes. From these fields come
the command line of ``train``, ``plan``, ``eval`` and ``probe``, the files of ``--config``, the keys of a sweep file, the fields and
arguments of :class:`forwardtune.hf.trainer.MeZOConfig`, and what the step log's header says of a run. Combinations without meaning
are rows of one table (:mod:`.refusals`).

Nothing here needs torch or transformers: what can be refused is refused before they are imported.
"""

from .option import AUTO, NumberOrAuto, Option, number_or_auto, options
from .refusals import Refusal, describe, refusal_of, refusals
from .runs import (
    COMMANDS,
    SCHEMA,
    STEPS,
    Data,
    Evaluation,
    MeZOSettings,
    Train,
    arguments,
    as_declared,
    recorded,
    settings,
    with_defaults,
)

__all__ = [
    "AUTO",
    "COMMANDS",
    "SCHEMA",
    "STEPS",
    "Data",
    "Evaluation",
    "MeZOSettings",
    "NumberOrAuto",
    "Option",
    "Refusal",
    "Train",
    "arguments",
    "as_declared",
    "describe",
    "number_or_auto",
    "options",
    "recorded",
    "refusal_of",
    "refusals",
    "settings",
    "with_defaults",
]
