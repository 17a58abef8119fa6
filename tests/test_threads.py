"""The sweeps' own threads: together with torch's no more than torch was told, and the same bits whatever else runs."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import support
from forwardtune.noise import cpu
from support.process import python

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")

COUNT = 8 * 512


def ours() -> list[threading.Thread]:
    """The threads of the pool."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("forwardtune")]


def spread(kernel: Any) -> list[Any]:
    """A sweep of so many elements that every thread gets a range."""
    return cpu._spread(kernel, COUNT, 1, 1)


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (1, 3, 1, 2)], ids=str)
def test_the_pool_follows_torchs_number_of_threads(counts):
    for count in counts:
        with support.threads(count):
            together = threading.Barrier(count)
            # Nobody passes the barrier unless all ranges are at work at the same time.
            ranges = spread(lambda lo, hi, wait=together.wait: (wait(timeout=30), lo, hi)[1:])
        assert [lo for lo, _ in ranges] == [0, *(hi for _, hi in ranges[:-1])]
        assert ranges[-1][1] == COUNT
        if count > 1:
            until = time.monotonic() + 30
            while len(ours()) > count - 1 and time.monotonic() < until:
                time.sleep(0.01)  # a pool that was replaced ends by itself
            assert len(ours()) == count - 1


def test_no_more_ranges_are_at_work_at_once_than_torch_has_threads():
    lock, running, most = threading.Lock(), 0, 0

    def kernel(lo: int, hi: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1

    with support.threads(3):
        for _ in range(30):
            spread(kernel)
    assert most == 3


def test_no_thread_is_at_work_after_a_sweep_that_failed():
    done = []

    def kernel(lo: int, hi: int) -> None:
        if lo == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        done.append(lo)

    with support.threads(3), pytest.raises(KeyboardInterrupt):
        spread(kernel)
    assert len(done) == 2


# Works through steps with 1, 2, 3 threads and again 1, and tells of each: the digests of the weights and of all perturbed
# weights seen, the threads of this process after 3 steps and after 10, and the most of ours at any moment. The losses are given, as torch
# may round a matrix product otherwise with more threads.
STEPS = """
import hashlib, itertools, json, os, subprocess, sys, threading
import torch
from torch import nn
from forwardtune import MeZO
from forwardtune.noise import cpu

cpu._MIN_PER_THREAD_IN_FORWARD = cpu._MIN_PER_THREAD = 1 << 12
seen = hashlib.sha256()

class Layer(nn.Linear):
    def forward(self, x):
        seen.update(self.weight.detach().numpy().tobytes())
        return super().forward(x)

def threads():
    return len(os.listdir("/proc/self/task"))

def ours():
    return sum(thread.name.startswith("forwardtune") for thread in threading.enumerate())

def run(count):
    global seen
    if count is not None:
        torch.set_num_threads(count)
    seen, most, at_rest = hashlib.sha256(), 0, []
    torch.manual_seed(0)
    net, x = nn.Sequential(*(Layer(256, 256) for _ in range(4))), torch.ones(64, 256)
    losses = itertools.cycle([1.0, 0.5])
    optimizer = MeZO(net, lr=1e-3, perturbation="scratch")

    def loss():
        nonlocal most
        net(x)
        most = max(most, ours())
        return next(losses)

    for step in range(10):
        optimizer.step(loss)
        if step in (2, 9):
            at_rest.append(threads())
    return {
        "threads": torch.get_num_threads(), "seen": seen.hexdigest(), "weights": optimizer.tuned.digest(),
        "at_rest": at_rest, "most": most,
    }

# Begun when all is imported, which nothing need disturb; none of them ever sleeps.
busy = "import os; parent = os.getppid()\\nwhile os.getppid() == parent: pass"
others = [subprocess.Popen([sys.executable, "-S", "-c", busy]) for _ in range(int(sys.argv[2]))]
try:
    found = [run(count) for count in json.loads(sys.argv[1])]
    assert all(other.poll() is None for other in others), "they should have run all the time"
finally:
    for other in others:
        other.kill()
        other.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """With 1, 2, 3, 1 and 2 threads in turn, beside a busy process for every core."""
    return json.loads(python(STEPS, "[1, 2, 3, 1, 2]", os.cpu_count() or 1, without=("OMP_NUM_THREADS",)))


def test_the_bits_are_the_same_with_any_number_of_threads_beside_busy_processes(runs):
    assert len({(found["seen"], found["weights"]) for found in runs}) == 1


def test_threads_do_not_become_more_from_step_to_step(runs):
    for found in runs:
        early, late = found["at_rest"]
        assert late <= early, found  # a pool that was replaced may take a moment to end


def test_there_are_at_most_as_many_threads_of_ours_as_torch_has_beside_the_main_one(runs):
    assert [found["threads"] for found in runs] == [1, 2, 3, 1, 2]
    alone = runs[0]["at_rest"][-1]
    assert runs[0]["most"] == 0
    assert runs[1]["most"] == 1
    assert 1 <= runs[2]["most"] <= 2
    # torch keeps the threads that it once made, asleep.
    for found, torchs, ours in zip(runs, (0, 1, 2, 2, 2), (0, 1, 2, 2, 1), strict=True):
        assert found["at_rest"][-1] <= alone + torchs + ours, found


def test_one_thread_by_the_environment_means_no_thread_of_ours(runs):
    (found,) = json.loads(python(STEPS, "[null]", 0, OMP_NUM_THREADS="1"))
    assert found["threads"] == 1
    assert found["most"] == 0
    assert (found["seen"], found["weights"]) == (runs[0]["seen"], runs[0]["weights"])


# The parent has a pool, and its lock is held by a thread that the child will not have.
FORK = """
import json, os, sys, threading
import torch
from forwardtune.noise import Noise, Update, cpu

cpu._MIN_PER_THREAD = 1 << 12
torch.set_num_threads(1)
before = torch.linspace(-1, 1, 1 << 15)
torch.set_num_threads(3)

def swept():
    weight = before.clone()
    Noise(0).update(weight, [Update(0, (1e-3,))], tensor=0)
    return weight.numpy().tobytes()

def ours():
    return sum(thread.name.startswith("forwardtune") for thread in threading.enumerate())

expected, held, ended = swept(), threading.Event(), threading.Event()

def hold():
    with cpu._pool_lock:
        held.set()
        ended.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if not child:
    at_first = ours()
    same = swept() == expected
    os._exit(0 if same and at_first == 0 < ours() else 1)
_, status = os.waitpid(child, 0)
ended.set()
holder.join()
print(json.dumps([os.waitstatus_to_exitcode(status), swept() == expected]))
"""


def test_a_forked_child_makes_threads_of_its_own():
    assert json.loads(python(FORK, without=("OMP_NUM_THREADS",))) == [0, True]
