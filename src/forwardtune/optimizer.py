"""L3: MeZO, an optimizer that needs no gradient. The method itself is :meth:`MeZO.estimate` and :meth:`MeZO.apply`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import InputError, NonFiniteLossError, nearest, warn
from .method.estimators import Estimator, Losses, OneSided, Query, get_estimator
from .method.pending import pending_of
from .method.record import StepRecord, estimated, mean_loss, updates_of
from .method.rule import History, Rule, move_all
from .method.rules import get_rule
from .method.unread import Unread, Used
from .method.weighting import Weighting, each_alone, gradient_norms
from .names import MOVES
from .noise import Direction, Emphasis, LowRank, Noise, get_direction
from .parameters import TunedParameters, require_settings
from .points import Closure, Evaluator, Perturbation, SidePath
from .points.both_signs import BothSigns
from .points.idle import IdleWatch
from .processes import processor, versions
from .storage import Offloaded
from .workers import Alone, Parts, Seen


class InterruptedUpdateError(RuntimeError):
    """An earlier update stopped half-way, so the weights belong to no step."""


class MeZO(torch.optim.Optimizer):
    r"""Memory-efficient zeroth-order optimization; by default SGD.

    One step with minibatch loss L, directions z and n probes:

    .. math::
        c_k = \frac{L(\theta + \epsilon z_k) - L(\theta - \epsilon z_k)}{2\epsilon}, \qquad
        \theta \leftarrow (1 - \eta\lambda)\,\theta - \eta \, \frac{1}{n} \sum_k c_k z_k

    No gradient, activation or direction is stored: directions are regenerated from ``(seed, step, probe, tensor)``. Other
    estimators (:mod:`forwardtune.method.estimators`) and rules (:mod:`forwardtune.method.rules`) take the place of the two equations.

    Example::

        optimizer = MeZO(model, lr=1e-6)
        for batch in loader:
            loss = optimizer.step(lambda: model(**batch).loss)

    The closure is called under ``torch.no_grad()``, 2 n times a step (n + 1 with one-sided probes; a few times more in the first step, to see
    that evaluations can be trusted), and must return the loss of the *same* minibatch each time, as a scalar; lower is better. With
    ``assignment="example"`` it returns the losses of the examples, shape (examples,), each the mean over the example's own terms. Put
    the model in evaluation mode, as dropout would differ between the two sides.

    A step moves what its evaluations went through: a tuned tensor that none of them read (a vision tower in a step on text) stays as it is,
    without weight decay, and so do the rows of a table, and experts in one tensor, that the run has not read so far. With ``perturbation="copy"`` that cannot be seen, and every tuned tensor is moved. Half-precision weights are updated
    with stochastic rounding. torch's global random state is neither read nor changed.

    Args:
        params: a module (all its parameters that require grad are tuned), or parameters, named parameters or parameter
            groups as for any ``torch.optim`` optimizer. Groups may set ``lr`` and ``weight_decay`` (decoupled).
        lr: learning rate: 1e-6 or 1e-7 for models of billions of parameters, 1e-5 to 3e-5 for ones of 100M.
        eps: perturbation scale.
        probes: n, the directions a step, or an example (n-SPSA).
        probes_rise: n rises from 1 to ``probes`` over so many steps, step t with the whole part of ``probes t / probes_rise``.
        direction: ``"gaussian"`` or ``"rademacher"``.
        perturbation: ``"scratch"``, ``"copy"``, ``"side_path"`` or ``"both_signs"`` (:mod:`forwardtune.points`), or ``"auto"``: the side path with
            ``assignment="example"``; else scratch, or copy without a module or where a weight is read on a way that scratch cannot see.
        probes_per_pass: with ``"both_signs"``, so many probes of every example share a forward pass.
        seed: 64-bit seed of all directions and of stochastic rounding.
        move: ``"read"``, a step moves what its evaluations read; ``"all"``, everything that is tuned (the paper's).
        clip_coefficient: largest magnitude of a coefficient; larger ones are clipped. ``None``: no clipping.
        max_skipped: after this many steps in a row with a loss that is not finite, raise.
        module: the module that holds ``params``, if those are not a module.
        estimator: ``"spsa"``, ``"one_sided"``, or an estimator, which brings its own eps, probes, normalisation and assignment.
        normalize: ``"none"``, ``"sigma"`` (FZOO's), ``"rank"`` or ``"spread"`` (over examples, too): what differences of losses are measured in.
        rule: ``"sgd"``, ``"sign"``, ``"momentum"``, ``"adam"``, ``"muon"``, or a rule with settings, such as ``Momentum(0.9)``.
        assignment: ``"shared"``, directions of the minibatch, or ``"example"``, directions of every example.
        group_size: with ``"example"``, so many examples of a minibatch, one after the other, have directions together: best as many as there are
            labels, with minibatches in which examples of different labels follow each other (:class:`~forwardtune.StratifiedSampler`).
        rank: r of low-rank directions ``Z = U V^T / sqrt(r)`` of matrices; 0: full ones. By default 1 with
            ``assignment="example"``, else 0.
        refresh: V stays the same for so many steps (LOZO's nu).
        fold: ``"step"``, every step sweeps the weights, or ``"refresh"``, steps wait until V is drawn anew, and are added to what layers give
            meanwhile (:mod:`forwardtune.method.pending`). Whoever reads the weights on another way than by calling the model, or
            ``state_dict()``, calls :meth:`fold` before.
        active_layers, sparsity, modify, modify_by: where directions fall, and how long they are there
            (:class:`~forwardtune.method.weighting.Weighting`). With ``modify_by="gradients"`` call :meth:`measure_layers` first.
        workers: who evaluates which query: :class:`~forwardtune.workers.ranks.Ranks` shares them between the processes of ``torchrun``.
        parts: into how many parts a minibatch is cut at most. With more than one, :meth:`step` takes :class:`~forwardtune.workers.Parts`.
        storage: where the weights of the module live from now on, tuned and frozen ones: ``OnDisk(folder)`` or ``InHostMemory("cuda")``
            (:mod:`forwardtune.storage`). By default they stay where they are.

    Raises:
        ValueError: an argument out of range, nothing to tune, or a tensor that cannot be perturbed.
        NonFiniteLossError: from :meth:`step`, after ``max_skipped`` skipped steps in a row.
        TypeError: from :meth:`step`, when the closure returns no number, or not one for each example.
        ReadElsewhereError: from :meth:`step`, where the perturbation that was asked for would not be exact.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, algorithm 1.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        probes: int = 1,
        probes_rise: int = 0,
        direction: str | Direction = "gaussian",
        perturbation: str = "auto",
        probes_per_pass: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
        move: str = "read",
        clip_coefficient: float | None = None,
        max_skipped: int = 10,
        module: nn.Module | None = None,
        estimator: str | Estimator = "spsa",
        normalize: str = "none",
        rule: str | Rule = "sgd",
        assignment: str = "shared",
        group_size: int = 1,
        rank: int | None = None,
        refresh: int = 1,
        fold: str = "step",
        active_layers: int | None = None,
        sparsity: float = 0.0,
        modify: str = "none",
        modify_by: str = "parameters",
        workers: Alone | None = None,
        parts: int = 1,
        storage: Offloaded | None = None,
    ) -> None:
        if isinstance(params, nn.Module):
            module = params if module is None else module
        if storage is not None:
            if module is None:
                raise InputError("storage is for all weights of a module: pass MeZO(module, ...) or module=...")
            storage.place(module)
        if isinstance(params, nn.Module):
            params = [parameter for parameter in params.parameters() if parameter.requires_grad]
            if not params:
                raise ValueError("there is nothing to tune: no parameter of the module has requires_grad=True")
        if clip_coefficient is not None and not clip_coefficient > 0:
            raise ValueError(f"clip_coefficient must be positive or None, got {clip_coefficient!r}")
        if not (isinstance(max_skipped, int) and max_skipped >= 1):
            raise ValueError(f"max_skipped must be an integer of at least 1, got {max_skipped!r}")
        if move not in MOVES:
            raise InputError(f"unknown move {move!r}{nearest(str(move), MOVES)}: choose {' or '.join(MOVES)}")
        self.move = move
        if not (isinstance(parts, int) and parts >= 1):
            raise InputError(f"parts must be an integer of at least 1, got {parts!r}")
        self.estimator = get_estimator(estimator, eps, probes, normalize, assignment, group_size)
        if isinstance(probes_rise, bool) or not isinstance(probes_rise, int) or probes_rise < 0:
            raise InputError(f"probes_rise must be a number of steps, got {probes_rise!r}")
        if probes_rise and (self.estimator.per_example or self.estimator.normalize != "none"):
            raise InputError(
                "probes_rise begins with one direction of the minibatch and plain coefficients: use assignment='shared' and normalize='none', or "
                "leave it out"
            )
        self.probes_rise = probes_rise
        rank = int(self.estimator.per_example) if rank is None else rank
        if not rank and refresh != 1:
            raise InputError(
                "refresh is of low-rank directions, V of which stays for a while: set rank, or leave refresh out"
            )
        self.noise = Noise(seed, get_direction(direction), LowRank(rank, refresh) if rank else None)
        self._rule = get_rule(rule)
        self.weighting = Weighting(active_layers, sparsity, modify, modify_by)
        self.weighting.require(self._rule, self.estimator.per_example, perturbation)
        self.history = History()
        self.clip_coefficient = clip_coefficient
        self.max_skipped = max_skipped
        self.module = module
        self.workers, self.parts = workers or Alone(), parts
        self._have_met = False
        #: Called with a :class:`StepRecord` after every step; the step log is one of them.
        self.recorders: list[Callable[[StepRecord], None]] = []
        self.last: StepRecord | None = None
        self._logged_left_out: frozenset[int] = frozenset()
        #: While a list: steps are estimated and put there, and not taken (:mod:`forwardtune.search.held`).
        self.held: list[StepRecord] | None = None
        self.next_step = 0
        self._skipped = 0
        self._idle = IdleWatch()
        self._unread = Unread()
        # What estimate() gathers for the coming step.
        self._pending: list[Losses] | None = None
        self._used = Used()
        self._seconds = 0.0
        self._fold, self._per_pass = fold, probes_per_pass
        #: True while the weights belong to no step; then none can be taken.
        self.interrupted = False
        self._perturbation = perturbation
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._tune()

    def _tune(self) -> None:
        """Take up the tuned tensors, from the parameter groups."""
        self.tuned = TunedParameters.from_groups(self.param_groups, self.module)
        self.rule = self._rule.resolved(self.tuned)
        self.noise = replace(self.noise, emphasis=self.weighting.emphasis(self.tuned))
        self.rule.require(self.estimator, self.noise)
        by_output = self.estimator.per_example or self._perturbation in (SidePath.name, BothSigns.name)
        decays = any(group["weight_decay"] for group in self.param_groups)
        may_wait = by_output and not decays and self.workers.count == 1
        #: What waits to be added to the weights; None where every step does that.
        self.pending = pending_of(self._fold, self.rule, self.noise, self.tuned, self.fold, may_wait=may_wait)
        self.evaluator = self._evaluator(self.noise)

    def _evaluator(self, noise: Noise) -> Evaluator:
        each = self.estimator.per_example
        if self._per_pass > 1 and isinstance(self.estimator, OneSided):
            raise InputError(
                "probes_per_pass puts the rows of both sides into one pass, and estimator='one_sided' has one side: use estimator='spsa'",
                "probes_per_pass",
            )
        return Evaluator(
            self.tuned,
            noise,
            self._perturbation,
            per_example=each,
            pending=self.pending,
            probes_per_pass=self._per_pass,
        )

    @torch.no_grad()
    def measure_layers(self, closure: Closure) -> None:
        """Estimate the norms of the layers' gradients, by which ``modify_by="gradients"`` weights their directions: eight evaluations a layer.

        To be called once, before a step log is begun, which keeps what was found.

        Args:
            closure: evaluates the loss of one minibatch, or the losses of its examples.
        """
        perturbation = "auto" if self.estimator.per_example else self._perturbation
        noise = replace(self.noise, emphasis=each_alone(self.tuned))
        evaluator = Evaluator(self.tuned, noise, perturbation, per_example=False)

        def losses(step: int, queries: Sequence[Query]) -> list[Losses]:
            return evaluator.losses(step, queries, lambda: torch.as_tensor(closure()).double().mean())[0]

        found = gradient_norms(self.tuned, losses, self.estimator.eps)
        self.emphasise(self.weighting.emphasis(self.tuned, found))

    def emphasise(self, emphasis: Emphasis | None) -> None:
        """Let directions fall as was found earlier, at the beginning of a run that goes on."""
        if emphasis != self.noise.emphasis:
            self.noise = replace(self.noise, emphasis=emphasis)
            self.evaluator = self._evaluator(self.noise)

    @property
    def lacks_layers(self) -> bool:
        """Whether :meth:`measure_layers` is to be called before the first step."""
        emphasis = self.noise.emphasis
        return self.weighting.measures and not (emphasis is not None and emphasis.probed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters. Only before the first step: afterwards ids, and so directions, would change."""
        if self.next_step or self._pending is not None:
            raise ValueError(
                "parameters cannot be added after the first estimate: make a new MeZO, with a new step log"
            )
        require_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if hasattr(self, "tuned"):
            try:
                self._tune()
            except ValueError:
                self.param_groups.pop()
                raise

    def train(self) -> None:
        """Raise RuntimeError: a Trainer that calls this before every step would go on to pay a backward pass for nothing.

        transformers calls it, if an optimizer has it, before it evaluates the loss. MeZO itself has no modes.
        """
        raise RuntimeError(
            "this trainer works by backpropagation and steps without a closure, and MeZO needs neither: use "
            "forwardtune.MeZOTrainer(..., args=MeZOConfig(...)) in its place, or call MeZO.step(closure) in a loop of your own"
        )

    @torch.no_grad()
    def step(self, closure: Closure | Parts | None = None) -> float:  # type: ignore[override]
        """Take one step and return the mean of the losses that it saw.

        Args:
            closure: evaluates the loss of the minibatch, or the losses of its examples; or those of its parts. ``None`` applies what :meth:`estimate` has gathered.
        """
        if closure is not None:
            self.estimate(closure)
        return self.apply()

    @torch.no_grad()
    def estimate(self, closure: Closure | Parts) -> float:
        """Query the losses of the coming step; they are added to what earlier calls of the same step gathered.

        Calling it for several microbatches whose losses add up to the minibatch loss is gradient accumulation; losses that come one
        per example are appended.

        Returns:
            The mean of this call's losses.
        """
        self.require_whole_weights()
        self._require_base()
        if self.lacks_layers:
            raise InputError(
                "modify_by='gradients' weights layers by their gradients, which were not estimated yet: call measure_layers(closure) before "
                "the first step, and before a step log is begun",
                "modify_by",
            )
        self.meet()
        began = time.perf_counter()
        before = len(self._pending[0]) if self._pending else 0
        estimator = self.estimator_at(self.next_step)
        queries = [query.after(before) for query in estimator.queries()]
        known = self.evaluator.left_out
        try:
            parts = Parts.of(closure)
            parts.require(self.parts, self.estimator.per_example)
            by_part, seen = self.workers.losses(queries, parts, self._evaluate)
        except BaseException:
            self._forget_estimate()  # the step would be made of a part of its microbatches
            raise
        losses: list[Losses] | None = None
        for own in by_part:
            losses = estimator.merge(losses, own)
        assert losses is not None
        self._pending = estimator.merge(self._pending, losses)
        self.evaluator.leave_out(seen.left_out)
        if seen.left_out != known:  # nothing adds there any more what waits
            self.fold()
        self._used = Used.of(self._used).merged(seen.used)
        self._used -= self.evaluator.left_out  # an earlier microbatch may have had a path
        self._seconds += time.perf_counter() - began
        values = [loss for own in losses for loss in own]
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan

    def estimator_at(self, step: int) -> Estimator:
        """The estimator with the number of probes that a step has."""
        if step >= self.probes_rise:
            return self.estimator
        return replace(self.estimator, probes=max(1, self.estimator.probes * step // self.probes_rise))

    def _evaluate(self, queries: Sequence[Query], closure: Closure) -> tuple[list[Losses], Seen]:
        with self.aside():
            losses, used = self.evaluator.losses(self.next_step, queries, closure)
        return losses, Seen(Used.of(used), self.evaluator.left_out)

    def meet(self) -> None:
        """See to it that all workers are set up alike, once, before the first step.

        Raises:
            InputError: they are not, or there are more of them than evaluations in a step.
        """
        if self._have_met or self.workers.count == 1:
            return
        evaluations = len(self.estimator_at(self.next_step).queries()) * self.parts
        if self.workers.count > evaluations:
            raise InputError(
                f"a step has {evaluations} evaluations, and {self.workers.count} workers would share them: start fewer, or cut the "
                f"minibatch into more parts, at least {-(-self.workers.count * self.parts // evaluations)} (parts)",
                "parts",
            )
        facts: dict[str, Any] = {f"{package} version": version for package, version in versions().items()}
        facts |= {
            "seed": self.noise.seed,
            "direction": self.noise.direction.name,
            "structure": repr(self.noise.structure),
            "emphasis": repr(self.noise.emphasis),
        }
        facts |= self.estimator.settings() | {
            "rule": self.rule.name,
            "rule_settings": self.rule.settings(),
            "probes_rise": self.probes_rise,
            "parts": self.parts,
        }
        facts |= {"learning rates": [float(group["lr"]) for group in self.param_groups], "steps taken": self.next_step}
        facts |= {"tensors": self.tuned.describe(), "weights with the digest": self.tuned.digest()}
        self.workers.require_same(facts, "every rank must be started in the same way, on the same model and data")
        if (difference := self.workers.compare(self.computing())) is not None:
            warn(f"{difference}: losses may differ in their last digits from those of another division of the work")
        self._have_met = True

    def computing(self) -> dict[str, Any]:
        """What this process computes with, on which the last bits of a loss may depend."""
        device = self.tuned[0].device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        return {"processor": name, "threads": torch.get_num_threads()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer; what :meth:`estimate` has gathered is dropped, as gradients would be."""
        self._forget_estimate()
        super().zero_grad(set_to_none)

    def _forget_estimate(self) -> None:
        self._pending, self._used, self._seconds = None, Used(), 0.0

    @torch.no_grad()
    def apply(self) -> float:
        """Move the weights by what was gathered and tell the recorders. Returns the mean loss."""
        if self._pending is None:
            raise RuntimeError(
                "there is no loss to step on: call step(closure), or estimate(closure) before step(). MeZO uses no gradient, "
                "so there is nothing to call backward() for; inside transformers use forwardtune.MeZOTrainer"
            )
        began = time.perf_counter()
        losses, used, seconds = self._pending, self._used, self._seconds
        self._forget_estimate()
        # Where nothing was seen to be read, the closure evaluates the weights on some other way.
        was_used = bool(used)
        if self.move == "all":
            used = Used()
        unused = tuple(t.id for t in self.tuned if t.id not in used) if used else ()
        unread = self._unread.after(used, self.tuned)
        record = estimated(
            self.next_step,
            self.param_groups,
            self.estimator_at(self.next_step),
            losses,
            self.clip_coefficient,
            unused,
            unread,
            self.tuned.numel,
            seconds,
        )
        self._idle.look(record, self.tuned, was_used, self.evaluator.left_out)
        self.next_step += 1
        if self.held is None:
            self.take(record, began)
        else:
            self.held.append(record)
            self.last = record
        assert self.last is not None
        return self.last.loss

    @torch.no_grad()
    def take(self, record: StepRecord, began: float | None = None) -> None:
        """Move the weights by one step and tell the recorders.

        Args:
            record: the step, as estimated.
            began: where ``time.perf_counter()`` stood when this part of the step began; by default it begins now.
        """
        began = time.perf_counter() if began is None else began
        unchanged = self.tuned.numel
        try:
            updates = [] if record.skipped else updates_of(self.rule, record)
        except OverflowError:  # a learning rate or a loss so large that the step does not fit float32
            record, updates = replace(record, coefficients=(), loss=mean_loss(record.losses, skipped=True)), []
        self.interrupted = True
        if self.pending is not None:
            unchanged = self.pending.take(record.step, updates)
        elif updates:
            unchanged = move_all(self.rule, self.noise, self.tuned, [[update] for update in updates], self.history)
        self.interrupted = False
        left_out = tuple(sorted(self.evaluator.left_out - self._logged_left_out))
        self._logged_left_out = self.evaluator.left_out
        seconds = record.seconds + time.perf_counter() - began
        record = replace(record, unchanged=unchanged, seconds=seconds, left_out=left_out)
        self.last = record
        for recorder in self.recorders:
            recorder(record)
        self.workers.taken(record.step + 1, self.tuned.digest)
        self._skipped = self._skipped + 1 if record.skipped else 0
        if self._skipped >= self.max_skipped:
            raise NonFiniteLossError(
                f"the loss was not finite in {self._skipped} steps in a row, the last of them step {self.last.step}; "
                "the weights are as the last good step left them. Lower the learning rate, or eps; in float16 also try "
                "bfloat16 or float32"
            )

    @torch.no_grad()
    def fold(self) -> None:
        """Add the steps that wait to the weights (``fold="refresh"``), before they are read; a call of the model, and ``state_dict()``, do that."""
        if self.pending is not None and self.pending.is_behind:
            self.require_whole_weights()
            self.interrupted = True
            self.pending.fold()
            self.interrupted = False

    def aside(self) -> AbstractContextManager[None]:
        """Inside, a call of the model leaves steps that wait where they are: it adds them itself, or its values do not matter."""
        return nullcontext() if self.pending is None else self.pending.aside()

    @property
    def gathering(self) -> bool:
        """Whether :meth:`estimate` has gathered losses that :meth:`apply` has not used yet."""
        return self._pending is not None

    @property
    def perturbation(self) -> Perturbation | None:
        """How the weights are perturbed; None until the first step has found out."""
        return self.evaluator.perturbation

    @property
    def checking(self) -> bool:
        """Whether the closure is being called by the first step's self-check."""
        return self.evaluator.checking

    def require_whole_weights(self) -> None:
        """Raise InterruptedUpdateError if an update stopped half-way."""
        if self.interrupted:
            raise InterruptedUpdateError(
                "an earlier update was interrupted, so the weights are between two steps: "
                "load the base weights again and replay the step log"
            )

    def _require_base(self) -> None:
        """Raise InputError if weights decay towards those that the run began with, and nobody kept them."""
        anchored = self.rule.decay_towards == "base" and any(group["weight_decay"] for group in self.param_groups)
        if anchored and self.tuned.base is None:
            raise InputError(
                "weights decay towards those that the run began with, which nobody kept: call forwardtune.trajectory.keep_base(path, optimizer) "
                "before the first step, or before the log is resumed; or set decay_towards='zero'"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and pickle: recorders, which write to files, and scratch memory stay behind."""
        self.fold()
        pending = None if self.pending is None else replace(self.pending, recorders=[])
        own = {
            "recorders": [],
            "evaluator": self.evaluator.forgotten(pending),
            "pending": pending,
            "_idle": IdleWatch(),
        }
        return {**self.__dict__, **own}

    def leave_out(self, tensors: Iterable[int]) -> None:
        """These tensors, by id, have no side path: it is known from the run that goes on."""
        self.evaluator.leave_out(tensors)
        self._logged_left_out = self.evaluator.left_out

    def fast_forward(self, records: Sequence[StepRecord], history: History | None = None) -> None:
        """Take over the bookkeeping of a run whose weights were rebuilt from its records, all from step 0 on.

        Args:
            history: what the rule knows after them; needed by rules with moments alone.
        """
        if history is None and self.rule.remembers:
            raise ValueError(f"the rule {self.rule.name!r} remembers earlier steps: pass the history of the replay")
        self.history = history or History()
        self.next_step = len(records)
        if self.pending is not None:
            self.pending.go_on(self.next_step, self.pending.at)
        self._unread = Unread.of_records(records)
        self._skipped = next((i for i, record in enumerate(reversed(records)) if not record.skipped), len(records))

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, with the step number and what the rule remembers: the whole state of MeZO."""
        self.fold()
        own: dict[str, Any] = {"next_step": self.next_step, "seed": self.noise.seed, "skipped": self._skipped}
        own |= {"unread": self._unread.state()}
        if self.pending is not None:
            own |= {"folded_at": list(self.pending.at)}
        if self.noise.emphasis is not None:
            own |= {"emphasis": self.noise.emphasis.content()}
        return {**super().state_dict(), "mezo": own | self.history.state(self.rule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: the state has another seed or rule, or is not MeZO's.
        """
        own = state_dict.get("mezo")
        if own is None:
            raise ValueError("this is not the state of a MeZO optimizer: it has no step number")
        if own["seed"] != self.noise.seed:
            raise ValueError(
                f"the state was saved with seed {own['seed']}, this optimizer has {self.noise.seed}: use the same seed"
            )
        emphasis = own.get("emphasis")
        if (emphasis is None) != (self.noise.emphasis is None):
            raise ValueError(
                "one of the state and this optimizer has directions that fall on some weights alone, or are longer on some, the other has "
                "not: use the same active_layers, sparsity and modify"
            )
        history = History.of_state(own.get("rule"), self.rule, self.tuned)
        super().load_state_dict(state_dict)
        self.history = history
        self.emphasise(None if emphasis is None else Emphasis.of_content(emphasis))
        self._forget_estimate()
        self.next_step = own["next_step"]
        if self.pending is not None:
            self.pending.go_on(self.next_step, own.get("folded_at", ()))
        self._unread = Unread.of_state(own.get("unread"), own["next_step"])
        self._skipped = own["skipped"]
