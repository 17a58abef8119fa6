"""L6: one Trainer on every rank, all of them with the same data, as if each were alone; what they share is the evaluations."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from ..processes import Launch
from ..workers import Alone, cut

#: Where the collated parts of a minibatch are, and how many examples each has.
PARTS, SIZES = "parts", "examples_in_parts"
#: Parts of a minibatch where there are more workers than queries, unless a number is given.
USUAL_PARTS = 8
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def as_one_process() -> Iterator[None]:
    """Inside, accelerate sees no launcher: it would divide the data, and wrap the model for gradients that are not there."""
    hidden = {name: os.environ.pop(name) for name in _OF_LAUNCHERS if name in os.environ}
    logger = logging.getLogger("transformers.training_args")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises to launch what was launched
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.update(hidden)


def take_place(state: Any, launch: Launch) -> torch.device | None:
    """Tell accelerate's state which process this is, so that one of them writes, and which GPU it has, if any."""
    state.process_index, state.local_process_index = launch.rank, launch.local_rank
    if state.device.type != "cuda":
        return None
    state.device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(state.device)
    device: torch.device = state.device
    return device


@contextmanager
def writing(trainer: Any) -> Iterator[None]:
    """Inside, this process writes what rank 0 alone would: something into a folder of its own."""
    state, model = trainer.args.distributed_state, trainer.model
    rank, state.process_index = state.process_index, 0
    if trainer.workers.count > 1:  # transformers asks torch as well
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        state.process_index = rank
        model.__dict__.pop("should_save_on_this_rank", None)


class InParts:
    """A data collator that cuts a minibatch, and collates each part by itself."""

    def __init__(self, collator: Callable[[list[Any]], Any], parts: int) -> None:
        self._collator, self._parts = collator, parts

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        parts = cut(features, self._parts)
        return {PARTS: [self._collator(list(part)) for part in parts], SIZES: [len(part) for part in parts]}


def parts_of(inputs: Any) -> list[Any]:
    """The inputs of a minibatch by part."""
    return list(inputs[PARTS]) if isinstance(inputs, Mapping) and SIZES in inputs else [inputs]


def digest_of(inputs: Any) -> bytes:
    """Of the tensors of a minibatch."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)

    add(inputs)
    return digest.digest()


class DividedPredictions:
    """A data loader whose batches are predicted by all ranks, a round of one batch each at a time.

    Args:
        predict: what Trainer predicts of a batch: nested tensors.

    Attributes:
        ready: the predictions of the batches that come next.
    """

    def __init__(self, loader: Any, workers: Alone, predict: Callable[[Any], Any]) -> None:
        self._loader, self._workers, self._predict = loader, workers, predict
        self.ready: list[Any] = []
        self._size: int | None = None

    def cut(self, value: Any) -> Any:
        """What Trainer gathers of a batch, in the place of accelerate: a loss stands for every example of a full batch, also in a
        short one."""
        return (
            value[: self._size] if isinstance(value, Tensor) and value.ndim == 1 and has_length(self.dataset) else value
        )

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while batch_round := list(islice(batches, self._workers.count)):
            self.ready = self._predicted(batch_round)
            for batch in batch_round:
                self._size = find_batch_size(batch)
                yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def _predicted(self, batches: Sequence[Any]) -> list[Any]:
        rank, content = self._workers.rank, io.BytesIO()
        try:
            if rank < len(batches):
                torch.save(self._predict(batches[rank]), content)
        except Exception as error:
            self._workers.tell(error)
            raise
        every = self._workers.all_bytes(content.getvalue())[: len(batches)]
        return [torch.load(io.BytesIO(one), weights_only=True) for one in every]
