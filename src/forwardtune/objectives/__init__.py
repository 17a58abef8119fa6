"""L5: objectives, (model, batch) -> one number per example. Lower is better; MeZO asks for no gradient.

``likelihood`` has what has a gradient: scores of options, cross-entropy, preferences. ``generation`` and ``rewards`` measure
what the model writes, and ``mixture`` makes one objective of what the user names.
"""

from .generation import GREEDY, Context, Sampling, Written, generate, write
from .likelihood import (
    learnt_tokens,
    logits_at,
    option_cross_entropy,
    option_likelihoods,
    option_scores,
    preference_margins,
    score_loss,
    target_likelihood,
    task_scores,
)
from .mixture import TaskObjective
from .prompts import WithPrompts, refuse_prompts
from .rewards import Reward, RewardError, load_reward

__all__ = [
    "GREEDY", "Context", "Reward", "RewardError", "Sampling", "TaskObjective", "WithPrompts", "Written", "generate", "learnt_tokens", "load_reward",
    "logits_at", "option_cross_entropy", "option_likelihoods", "option_scores", "preference_margins", "refuse_prompts", "score_loss",
    "target_likelihood", "task_scores", "write",
]  # fmt: skip
