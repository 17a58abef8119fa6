"""Seconds to replay logged steps, against the seconds that training took.

    python benchmarks/replay.py

A few steps of a model of SmolLM2-135M's shape are trained and timed (batch 16 x 32 tokens, in float32 and bfloat16); a log of 1,000 steps
is replayed and timed; both per step. Then the same with a direction for every example, whose step has 16 terms (100 steps).
"""

from __future__ import annotations

import time
from functools import partial

import torch
from machine import write
from shapes import BATCH, loss_of, losses_of, make, minibatch
from timing import interleave

from forwardtune import MeZO
from forwardtune.noise import Update
from forwardtune.parameters import dtype_name

STEPS = 1000


@torch.no_grad()
def main() -> None:
    """Print and save the ratio."""
    rows: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make("smollm2-135m", dtype)
        batch = minibatch(model, length=32)
        for assignment, loss, terms, steps in (
            ("shared", loss_of, 1, STEPS),
            ("example", losses_of, BATCH, STEPS // 10),
        ):
            optimizer, closure = MeZO(model, lr=1e-9, assignment=assignment), loss(model, batch)
            optimizer.step(closure)
            training = interleave({"step": partial(optimizer.step, closure)}, rounds=9)["step"]
            updates = [Update(step, (1e-7,) * terms) for step in range(steps)]
            began = time.perf_counter()
            for tensor in optimizer.tuned:
                optimizer.noise.update(tensor.parameter, updates, tensor=tensor.id)
            replaying = (time.perf_counter() - began) / steps
            name = f"{assignment}, {dtype_name(dtype)}"
            print(
                f"{name}: training {training:.3f} s a step, replay {replaying:.4f} s a step: {replaying / training:.1%}"
            )
            rows[name] = {
                "training_seconds_per_step": training,
                "replay_seconds_per_step": replaying,
                "replay_over_training": replaying / training,
            }
            write("replay", rows)


if __name__ == "__main__":
    main()
