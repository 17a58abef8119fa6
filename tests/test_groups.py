"""Examples that share a direction, and minibatches whose examples are spread by their labels."""

from __future__ import annotations

import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import support
from forwardtune import MeZO, MeZOConfig, MeZOTrainer, StepLog, StratifiedSampler, replay
from forwardtune.config import recorded
from forwardtune.errors import InputError
from forwardtune.method.estimators import Query, groups_of
from forwardtune.points.owners import examples_at
from forwardtune.points.perturbation import grouped
from forwardtune.strata import groups_by, labels_of
from forwardtune.trajectory import export_trajectory, read_log
from forwardtune.workers import Parts
from forwardtune.workers.parts import deal
from forwardtune.workers.ranks import _DIGEST, assembled
from support.command import Setting, cli, done, write_task
from support.side_path import LENGTH, losses_of, side_path


def test_groups_are_of_about_the_size_and_lose_no_example() -> None:
    assert [groups_of(n, 2) for n in (1, 2, 3, 4, 5, 8)] == [1, 1, 2, 2, 3, 4]
    assert [groups_of(n, 5) for n in (1, 7, 8, 16, 20)] == [1, 1, 2, 3, 4]
    for count in range(1, 40):
        for size in range(1, 9):
            groups = groups_of(count, size)
            sizes = Counter(b * groups // count for b in range(count))
            assert sorted(sizes) == list(range(groups))
            assert max(sizes.values()) - min(sizes.values()) <= 1


@pytest.mark.parametrize(("count", "size"), [(4, 2), (5, 2), (16, 5), (3, 8)])
def test_the_mean_over_groups_is_the_mean_over_examples(count: int, size: int) -> None:
    losses = torch.rand(count, dtype=torch.float64)
    assert float(grouped(losses, size).mean()) == pytest.approx(float(losses.mean()), rel=1e-12)
    losses[0] = torch.nan  # of its group alone
    assert torch.isnan(grouped(losses, size)).sum() == 1


@pytest.mark.parametrize("perturbation", ["side_path", "both_signs"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_a_group_is_an_example_of_several_rows(family: str, perturbation: str) -> None:
    """The same bits as with groups that are declared as examples by hand."""
    ids, moved = support.token_batch(6, LENGTH), []
    for by_hand in (False, True):
        model = support.tiny_model(family, torch.bfloat16)
        own = {} if by_hand else {"group_size": 2}
        optimizer, _ = side_path(model, perturbation=perturbation, **own)

        def closure(model: Any = model, by_hand: bool = by_hand) -> Tensor:
            if not by_hand:
                return losses_of(model, ids)
            with examples_at((torch.arange(6) // 2)[:, None].expand(6, LENGTH)):
                return losses_of(model, ids).view(3, 2).sum(1) * 0.5

        for _ in range(3):
            optimizer.step(closure)
        assert optimizer.last.examples == 3
        moved.append((support.snapshot(model), optimizer.last.losses))
    assert moved[0][1] == moved[1][1]
    support.assert_same_bits(model, moved[0][0])


@pytest.mark.parametrize(("count", "size"), [(6, 2), (5, 2), (5, 5)])
def test_the_step_is_that_of_a_plain_reference(count: int, size: int) -> None:
    """``theta - lr / G sum_g (l_g(theta + eps z_g) - l_g(theta - eps z_g)) / (2 eps) z_g`` with perturbed weights, in float64."""
    model, ids, eps = support.tiny_model("llama", torch.float64), support.token_batch(count, LENGTH), 1e-3
    before = support.snapshot(model)
    optimizer, _ = side_path(model, group_size=size, lr=2.0**-6, eps=eps)
    optimizer.step(lambda: losses_of(model, ids))
    after = support.snapshot(model)
    groups = groups_of(count, size)
    of = torch.arange(count) * groups // count
    z = {
        (tensor.name, g): optimizer.noise.z(tensor.parameter, tensor=tensor.id, step=0, probe=g)
        for tensor in optimizer.tuned
        for g in range(groups)
    }
    coefficients = []
    for g in range(groups):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for tensor in optimizer.tuned:
                    tensor.parameter.copy_(before[tensor.name] + sign * eps * z[tensor.name, g])
                sides.append(float(losses_of(model, ids)[of == g].sum() * groups / count))
        coefficients.append((sides[0] - sides[1]) / (2 * eps))
    assert optimizer.last.coefficients == pytest.approx(coefficients, rel=1e-3)  # float32 losses in the log
    for tensor in optimizer.tuned:
        if tensor.id not in optimizer.last.unread:
            update = sum(c * z[tensor.name, g] for g, c in enumerate(optimizer.last.coefficients)) / groups
            expected = before[tensor.name] - 2.0**-6 * update
            torch.testing.assert_close(after[tensor.name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "refresh": 3, "probes": 2}, {"refresh": 3, "fold": "refresh"}])
def test_runs_are_logged_resumed_replayed_and_exported(tmp_path: Path, settings: dict[str, Any]) -> None:
    def begin() -> tuple[Any, MeZO]:
        model = support.tiny_model("llama", torch.bfloat16)
        return model, side_path(model, group_size=2, perturbation="both_signs", **settings)[0]

    def step(model: Any, optimizer: MeZO, number: int) -> None:
        ids = support.token_batch(3 if number == 2 else 6, LENGTH, seed=number)
        optimizer.step(lambda: losses_of(model, ids))

    path = tmp_path / "steps.jsonl"
    model, optimizer = begin()
    log = StepLog(path, optimizer)
    for number in range(3):
        step(model, optimizer, number)
    log.close()
    model, optimizer = begin()
    with StepLog.resume(path, optimizer):
        for number in range(3, 5):
            step(model, optimizer, number)
    read = read_log(path)
    assert read.header["group_size"] == 2
    assert [record.examples for record in read.records] == [3, 3, 2, 3, 3]
    again = support.tiny_model("llama", torch.bfloat16)
    replay(path, again)
    support.assert_same_bits(again, support.snapshot(model))
    if "fold" not in settings:
        export_trajectory(read, tmp_path / "t.safetensors")
        again = support.tiny_model("llama", torch.bfloat16)
        replay(tmp_path / "t.safetensors", again)
        support.assert_same_bits(again, support.snapshot(model))
    with pytest.raises(ValueError, match="group_size"):
        StepLog.resume(path, side_path(support.tiny_model("llama", torch.bfloat16), **settings)[0])


def test_microbatches_and_parts_go_on_with_directions_that_nobody_had() -> None:
    ids, found = support.token_batch(8, LENGTH), []
    for parts in (False, True):
        model = support.tiny_model("llama")
        optimizer, _ = side_path(model, group_size=2, parts=2 if parts else 1)
        closures = [lambda piece=piece, model=model: losses_of(model, piece) for piece in ids.split([5, 3])]
        if parts:
            optimizer.step(Parts(closures, examples=[5, 3]))
        else:
            for closure in closures:
                optimizer.estimate(closure)
            optimizer.step()
        assert optimizer.last.examples == 3 + 2
        found.append(optimizer.last.losses)
    assert found[0] == found[1]


def test_ranks_send_a_loss_for_each_group() -> None:
    parts = Parts([lambda: None] * 2, examples=[5, 4])
    queries = [Query(0, 1.0, 1, 2), Query(0, -1.0, 1, 2)]
    dealt = deal(2, 2, 2)
    numbers = {
        (q, p): tuple(10.0 * q + p + g for g in range(groups_of(n, 2))) for q in (0, 1) for p, n in ((0, 5), (1, 4))
    }
    sent = []
    for units in dealt:
        flat = [loss for unit in units for loss in numbers[unit.query, unit.part]]
        sent.append(bytes(2 * _DIGEST) + struct.pack(f"<{len(flat)}d", *flat))
    assert assembled(sent, dealt, queries, parts) == [[numbers[q, p] for q in (0, 1)] for p in (0, 1)]


def test_group_sizes_that_mean_nothing_are_refused() -> None:
    model = support.tiny_model("llama")
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="group_size must be an integer of at least 1"):
            MeZO(model, assignment="example", group_size=wrong)
    with pytest.raises(InputError, match="set assignment='example', or leave it out"):
        MeZO(model, group_size=2)


def test_losses_of_groups_in_place_of_examples_are_refused() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(6, LENGTH)
    optimizer, _ = side_path(model, group_size=2)
    with pytest.raises(TypeError, match="losses of 3 examples"):
        optimizer.step(lambda: losses_of(model, ids).view(3, 2).mean(1))


@pytest.mark.parametrize("counts", [(50, 50), (62, 38), (20, 30, 50), (97, 3)])
def test_strata_are_spread(counts: tuple[int, ...]) -> None:
    strata = [label for label, count in enumerate(counts) for _ in range(count)]
    sampler = StratifiedSampler(strata, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(100))
    for begin in range(100 - 15):
        seen = Counter(strata[i] for i in order[begin : begin + 16])
        for label, count in enumerate(counts):
            assert abs(seen[label] - 16 * count / 100) < len(counts)
    if counts == (50, 50):
        assert all({strata[a], strata[b]} == {0, 1} for a, b in zip(order[::2], order[1::2], strict=True))


def test_an_order_belongs_to_its_seed_and_pass() -> None:
    strata = torch.arange(40) % 3
    state = torch.get_rng_state()
    sampler = StratifiedSampler(strata, seed=1)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert list(StratifiedSampler(strata, seed=2)) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert len(sampler) == 40


def test_labels_are_found_or_said_to_lack() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a", "label": i % 2} for i in range(4)]
    assert labels_of(datasets.Dataset.from_list(rows)) == [0, 1, 0, 1]
    assert labels_of([{"labels": torch.tensor(3)}]) == labels_of([{"label": np.int64(3)}]) == [3]
    for lacking in (datasets.Dataset.from_dict({"text": ["a"]}), [{"labels": torch.tensor([1, 2])}], [{}], []):
        with pytest.raises(InputError, match="single label each"):
            labels_of(lacking)


@pytest.mark.parametrize(
    ("labels", "batch", "size"), [(2, 16, 2), (5, 16, 5), (77, 16, 8), (6, 8, 4), (2, 1, 1), (1, 16, 1)]
)
def test_a_group_has_one_of_each_label_if_two_groups_have_room(labels: int, batch: int, size: int) -> None:
    assert groups_by(labels, batch) == size


def _trainer(folder: Path, **settings: Any) -> MeZOTrainer:
    ids = support.token_batch(20, LENGTH)
    rows = [{"input_ids": row, "label": i % 4 // 3} for i, row in enumerate(ids)]
    arguments = {
        "learning_rate": 1e-3,
        "eps": 1e-3,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    config = MeZOConfig(
        str(folder), **{**arguments, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **settings}
    )

    def objective(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        seen.append(sorted(inputs["labels"].tolist()) if "labels" in inputs else [])
        return losses_of(model, inputs["input_ids"])

    seen: list[list[int]] = []
    trainer = MeZOTrainer(support.tiny_model("llama"), config, train_dataset=rows, objective=objective)
    trainer.seen = seen
    return trainer


def test_trainer_spreads_labels_and_groups_one_of_each(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "a", assignment="example", stratify="label")
    trainer.train()
    assert trainer.mezo.estimator.group_size == 2
    assert all(labels == [0, 0, 0, 1] for labels in trainer.seen)  # a quarter of the rows has the other label
    plain = _trainer(tmp_path / "b", assignment="example")
    plain.train()
    assert plain.mezo.estimator.group_size == 1
    assert any(labels != [0, 0, 0, 1] for labels in plain.seen)


def test_a_stratified_run_of_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", assignment="example", stratify="label")
    whole.train()
    _trainer(tmp_path / "cut", assignment="example", stratify="label", max_steps=6).train()
    resumed = _trainer(tmp_path / "cut", assignment="example", stratify="label")
    resumed.train(resume_from_checkpoint=True)
    support.assert_same_bits(resumed.model, support.snapshot(whole.model))
    assert resumed.seen[-1] == whole.seen[-1]


def test_trainer_says_which_data_cannot_be_spread(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, stratify="label")
    trainer.train_dataset = [
        {name: value for name, value in row.items() if name != "label"} for row in trainer.train_dataset
    ]
    with pytest.raises(InputError, match="single label each"):
        trainer.train()
    trainer.args.stratify = "auto"
    trainer.train()
    with pytest.raises(InputError, match=r"unknown stratify 'labell'; did you mean label\?"):
        _trainer(tmp_path, stratify="labell")


def test_the_command_line_groups_where_a_task_has_labels(tmp_path: Path) -> None:
    setting = Setting(support.save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    free = setting.task.with_name("free.yaml")
    free.write_text(re.sub(r"answers:.*\n", "target: label\nmax_new_tokens: 3\n", setting.task.read_text()))
    for task, group_size in ((setting.task, 2), (free, 1)):
        folder = tmp_path / f"run-{task.stem}"
        ran = done(*Setting(setting.model, task).train(folder, method="forward", steps=2))
        said = "spread over the minibatches by their labels, 2 of them share a direction" in ran.err
        assert said == (group_size == 2)
        header = read_log(folder / "steps.jsonl").header
        assert header.get("group_size", 1) == group_size
        assert (header["run"]["group_size"], header["run"]["stratify"]) == (group_size, "auto")
        # What was asked for may be said again, as a sweep does that goes on.
        done(*Setting(setting.model, task).resume(folder, steps=3, method="forward", stratify="auto"))
        with pytest.raises(AssertionError, match="has --stratify auto, not label"):
            done(*Setting(setting.model, task).resume(folder, steps=4, stratify="label"))
    ran = cli(*Setting(setting.model, free).train(tmp_path / "none", stratify="label"))
    assert ran.code == 2
    assert "--stratify label spreads examples by their labels, and task free has no fixed ones" in ran.err
    done(*setting.train(tmp_path / "adam", method="adam", steps=2, stratify="label"))


def test_a_run_from_before_goes_on_as_it_was() -> None:
    assert recorded({"method": "forward"}).stratify == "none"
    assert recorded({"method": "forward", "stratify": "label"}).stratify == "label"
