"""What a practitioner would use where memory is short, and what MeZO offers in its place: each as a model and a step on it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from forwardtune import MeZO
from forwardtune.models import tune
from forwardtune.models.quantised import keep_as_stored, let_go_of_file, quantisation
from forwardtune.storage import OnDisk

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Method:
    """A way to tune.

    Attributes:
        title: of its row.
        lr: the middle of the rates that are tried.
        tune: all weights, LoRA of rank 8 in float32 on query and value projections, or late-mlp.
        optimizer: ``mezo``; ``adam`` with states in the weights' dtype; ``adam8bit``, that of bitsandbytes.
        nf4: whether frozen linear layers are stored in 4 bits.
        offload: whether all weights, tuned ones too, live in a private file (``--offload disk``).
        mapped: whether frozen weights stay in their file, from which the kernel reads them when they are wanted.
        recompute: whether a layer keeps its input alone, and is computed again when the backward pass comes to it.
        settings: of :class:`~forwardtune.MeZO`.
        learns_as: the method whose steps move the weights alike; itself by default.
    """

    title: str
    lr: float
    tune: str = "lora"
    optimizer: str = "adam"
    nf4: bool = False
    offload: bool = False
    mapped: bool = False
    recompute: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    learns_as: str | None = None


METHODS = {
    "adam": Method("Adam, all weights", 3e-5, tune="all"),
    "lora": Method("Adam, LoRA", 1e-3),
    "lora_checkpoint": Method("Adam, LoRA, gradient checkpointing", 1e-3, recompute=True, learns_as="lora"),
    # The weights of a layer are read when it is computed, computed again and walked back, one layer after the other, as MeBP does.
    "lora_by_layer": Method(
        "Adam, LoRA, layer by layer from a file", 1e-3, recompute=True, mapped=True, learns_as="lora"
    ),
    "qlora": Method("8-bit Adam, LoRA over NF4, gradient checkpointing", 1e-3, "lora", "adam8bit", True, recompute=True),
    "mezo": Method("MeZO, all weights", 3e-5, "all", "mezo"),
    "mezo_example": Method(
        "MeZO, all weights, a direction for every example", 1e-4, "all", "mezo", settings={"assignment": "example"}
    ),
    "forward": Method(
        "late feed-forward matrices, a direction for every example (`--method forward`)", 6e-4, "late-mlp", "mezo",
        settings={"assignment": "example"},
    ),
    "mezo_offload": Method(
        "MeZO, all weights, offloaded to a file", 3e-5, "all", "mezo", offload=True, mapped=True, learns_as="mezo"
    ),
    "mezo_lora": Method("MeZO, LoRA", 1e-3, "lora", "mezo", settings={"eps": 1e-2}),
    "mezo_lora_mapped": Method(
        "MeZO, LoRA, frozen weights in a file", 1e-3, "lora", "mezo", mapped=True, settings={"eps": 1e-2}, learns_as="mezo_lora"
    ),
    "mezo_nf4": Method("MeZO, LoRA over NF4", 1e-3, "lora", "mezo", nf4=True, settings={"eps": 1e-2}),
}  # fmt: skip


def load(method: Method, folder: Path) -> tuple[Any, Any]:
    """The checkpoint as the method holds it, with what it tunes, and its tokenizer if there is one."""
    how: dict[str, Any] = {"quantization_config": quantisation("nf4", DTYPE, "cpu"), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, **how if method.nf4 else {})
    keep_as_stored(model)
    if not method.mapped:
        let_go_of_file(model)
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
    model = tune(model, tokenizer, method.tune)
    if method.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def stepper(method: Method, model: Any, lr: float, seed: int = 0) -> Callable[[Callable[[], Tensor]], object]:
    """A step on a closure of losses, one for each example."""
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if method.optimizer == "mezo":
        storage = OnDisk(tempfile.gettempdir()) if method.offload else None
        mezo = MeZO(model.eval(), lr=lr, seed=seed, storage=storage, **{"eps": 1e-3, **method.settings})
        return lambda losses: mezo.step(losses if mezo.estimator.per_example else lambda: losses().mean())
    optimizer: Any
    if method.optimizer == "adam8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(tuned, lr=lr, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(tuned, lr=lr, weight_decay=0.0, foreach=False)
    model.train(method.recompute)  # transformers recomputes in training mode alone; there is no dropout

    def step(losses: Callable[[], Tensor]) -> None:
        losses().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Watch:
    """Anonymous memory of this process: the most that it held inside, looked at every two milliseconds.

    What is mapped from a file counts as little as other programs' page cache does: the kernel drops it when memory is wanted.
    """

    def __init__(self) -> None:
        self.peak = 0

    def __enter__(self) -> Watch:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
