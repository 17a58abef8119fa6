"""L0: what is chosen by name. The command line lists these names without importing torch, which their classes need."""

from __future__ import annotations

#: Of :mod:`forwardtune.method.estimators`.
ESTIMATORS = ("spsa", "one_sided")
NORMALIZATIONS = ("none", "sigma", "rank", "spread")
ASSIGNMENTS = ("shared", "example")
#: Of :mod:`forwardtune.strata`: what is spread evenly over minibatches.
STRATA = ("auto", "label", "none")
#: Of :mod:`forwardtune.method.weighting`.
MODIFY = ("none", "variance", "expectation")
MODIFIED_BY = ("parameters", "gradients")
#: Of :mod:`forwardtune.method.rules`, and how they keep their moments.
RULES = ("sgd", "sign", "momentum", "adam", "muon")
STATES = ("auto", "exact", "window")
#: What weight decay pulls the weights towards: zero, or those that the run began with.
DECAYS = ("zero", "base")
#: Of :mod:`forwardtune.noise`.
DIRECTIONS = ("gaussian", "rademacher")
#: Of :mod:`forwardtune.points`.
PERTURBATIONS = ("auto", "scratch", "copy", "side_path", "both_signs")
#: Of :class:`forwardtune.MeZO`: what a step moves.
MOVES = ("read", "all")
FOLDS = ("step", "refresh")
#: Of ``forwardtune train``.
METHODS = ("feedback", "forward", "mezo", "adam")
#: Of transformers, those that need no further settings.
LR_SCHEDULERS = ("constant", "linear", "cosine", "inverse_sqrt", "polynomial")
#: Of :mod:`forwardtune.models`: how a dense checkpoint is quantised as it is loaded.
QUANTISATIONS = ("nf4", "int8", "int4")
#: Of :mod:`forwardtune.storage`: where weights live that the device has no room for.
OFFLOADS = ("cpu", "disk")
#: What A of LoRA is at first, and which of it is taken from examples.
LORA_INITS = ("default", "gaussian", "eva", "errors", "feedback")
FROM_EXAMPLES = ("eva", "errors", "feedback")
#: Of transformers, what a run can be reported to; the packages have the same names.
TRACKERS = ("tensorboard", "wandb", "trackio")
#: Of :mod:`forwardtune.tasks`: what is done with rows that a task cannot use.
ON_BAD_ROW = ("refuse", "skip")
