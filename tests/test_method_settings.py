"""A method's settings: what is refused, what the log and its export say of them, and how Trainer goes on with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from forwardtune import MeZO, StepLog, replay
from forwardtune.method.estimators import SPSA, OneSided
from forwardtune.method.rules import Adam, Momentum, get_rule
from forwardtune.trajectory import LogError, export_trajectory, read_log
from forwardtune.trajectory.export import read_trajectory
from support import assert_same_bits, scripted, snapshot, trusted
from support.logs import log_lines
from support.methods import Quadratic, scripted_run, take_steps

# --- what must be refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeZO(Quadratic(), rule="adma"), "unknown rule 'adma'; did you mean adam"),
        (lambda: MeZO(Quadratic(), estimator="two_sided"), "unknown estimator 'two_sided'.*spsa, one_sided"),
        (lambda: MeZO(Quadratic(), normalize="sigmas"), "unknown normalize.*did you mean sigma"),
        (lambda: MeZO(Quadratic(), normalize="sigma", probes=1), "set probes to 2 or more"),
        (lambda: MeZO(Quadratic(), normalize="rank", estimator="one_sided"), "set probes to 2 or more"),
        *((lambda mu=mu: Momentum(mu), "momentum must be a number from 0 up to 1") for mu in (1.0, -0.1, "0.5")),
        (lambda: Adam(0.9, math.nan), "beta2 must be"),
        *((lambda e=e: Adam(epsilon=e), "epsilon must be a positive") for e in (0.0, 1e-37, math.inf, "1e-8")),
        (lambda: Adam(state="exactly"), "unknown state.*did you mean exact"),
        (lambda: Adam(window=0), "window must be an integer"),
        (lambda: Adam(window=2.5), "window must be an integer"),
        (lambda: Adam(window=5, state="exact"), "leave window out"),
        (lambda: get_rule("momentum", beta=0.5), "no setting 'beta'.*momentum"),
        (lambda: get_rule("sgd", momentum=0.5), "'sgd' has no setting 'momentum'.*decay_towards"),
        *(
            (lambda normalize=normalize: SPSA(1e-3, 2, normalize).coefficients([1.0, 2.0, 3.0]), "zip")  # lacks a side
            for normalize in ("none", "sigma", "rank")
        ),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_at_the_border_are_taken():
    assert Adam(0.0, 0.0, epsilon=2e-37, window=1).window == 1
    assert [cls(1e-3, 2, normalize).probes for cls in (SPSA, OneSided) for normalize in ("sigma", "rank")] == [2] * 4


WITH_MOMENTUM = {"rule": Momentum(0.5, window=3), "normalize": "sigma"}


@pytest.mark.parametrize(
    ("logged", "ours", "words"),
    [
        (WITH_MOMENTUM, {"rule": Adam(0.5, window=3)}, "rule is 'momentum' in the log, 'adam' here"),
        (WITH_MOMENTUM, {"rule": "sgd"}, "rule is 'momentum' in the log, 'sgd' here"),
        (WITH_MOMENTUM, {"rule": Momentum(0.6, window=3)}, "rule_settings is .*0.5.* in the log, .*0.6.* here"),
        (WITH_MOMENTUM, {"rule": Momentum(0.5, window=4)}, "rule_settings is"),
        (WITH_MOMENTUM, {"rule": Momentum(0.5, state="exact")}, "rule_settings is"),
        (WITH_MOMENTUM, {"normalize": "none"}, "normalize is 'sigma' in the log, 'none' here"),
        (WITH_MOMENTUM, {"normalize": "rank"}, "normalize is 'sigma' in the log, 'rank' here"),
        (WITH_MOMENTUM, {"estimator": "one_sided"}, "estimator is 'spsa' in the log, 'one_sided' here"),
        ({}, {"normalize": "rank"}, "normalize is 'none' in the log, 'rank' here"),
    ],
    ids=str,
)
def test_a_log_is_resumed_by_its_own_method_alone(logged, ours, words, tmp_path):
    settings = {"lr": 0.1, "probes": 2, "perturbation": "copy", **logged}
    path, model = tmp_path / "steps.jsonl", Quadratic()
    with StepLog(path, optimizer := MeZO(model, **settings)):
        take_steps(model, optimizer, 2)
    with pytest.raises(LogError, match=f"belongs to another run: {words}"):
        StepLog.resume(path, MeZO(Quadratic(), **{**settings, **ours}))


@pytest.mark.parametrize(
    ("first", "second"),
    [("sgd", Adam(window=3)), (Adam(window=3), "sgd"), (Adam(window=3), Adam(window=4)), ("momentum", "adam")],
    ids=str,
)
def test_a_state_of_another_rule_is_refused(first, second):
    saved = scripted_run(Quadratic(), first).state_dict()
    with pytest.raises(ValueError, match=r"the state was saved with .*: use the same rule"):
        scripted_run(Quadratic(), second, 0).load_state_dict(saved)


def test_bookkeeping_alone_does_not_bring_moments_back(tmp_path):
    path, model = tmp_path / "steps.jsonl", Quadratic()
    with StepLog(path, optimizer := MeZO(model, rule="momentum", perturbation="copy")):
        optimizer.step(model)
    with pytest.raises(ValueError, match="remembers earlier steps"):
        MeZO(model, rule="momentum", perturbation="copy").fast_forward(read_log(path).records)


def test_the_header_names_the_method(tmp_path):
    path, model = tmp_path / "steps.jsonl", Quadratic()
    StepLog(path, MeZO(model, rule="adam", estimator="one_sided", probes=3, normalize="sigma")).close()
    header = read_log(path).header
    keys = ["direction", "estimator", "eps", "probes", "normalize", "rule", "rule_settings", "groups"]
    assert [key for key in header if key in keys] == keys
    assert [header[key] for key in keys[1:6]] == ["one_sided", 1e-3, 3, "sigma", "adam"]
    assert header["rule_settings"] == {
        "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "root": "nearest", "state": "window", "window": 90,
    }  # fmt: skip


LEARNS, SKIPS = (1.0, 0.5, 2.0, 0.5, 0.25, 1.0), (math.nan,) * 6
EXPORTED = {  # rule, groups, weight decay, learning rates, losses, shapes of what is kept beside the sizes
    "sgd": ("sgd", 1, 0.0, [0.5] * 3, LEARNS, {}),
    "sgd, decayed": ("sgd", 2, 0.5, [0.5] * 3, LEARNS, {"decay": (2, 1)}),
    "sgd, nothing taken": ("sgd", 2, 0.5, [0.5] * 3, SKIPS, {}),
    "sign": ("sign", 1, 0.0, [0.5] * 3, LEARNS, {"lr": (1, 1)}),
    "sign, decayed": ("sign", 2, 0.5, [0.5] * 3, LEARNS, {"decay": (2, 1), "lr": (2, 1)}),
    "sign, nothing taken": ("sign", 2, 0.5, [0.5] * 3, SKIPS, {"lr": (2, 1)}),
    "sign, halved": ("sign", 1, 0.0, [0.1, 0.1, 0.05], LEARNS, {"lr": (1, 3)}),
    "sign, changing": ("sign", 1, 0.0, [0.1, 0.05, 0.03], LEARNS, {"lr": (1, 3)}),
}


@pytest.mark.parametrize(("rule", "groups", "decay", "rates", "losses", "shapes"), EXPORTED.values(), ids=EXPORTED)
def test_an_export_holds_once_what_is_the_same_throughout(rule, groups, decay, rates, losses, shapes, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, closure = Quadratic(), scripted(*losses)
    params = [{"params": list(part.parameters())} for part in (model.flat, model.turned)]
    params = params if groups == 2 else list(model.parameters())
    optimizer = trusted(MeZO(params, 0.5, module=model, rule=rule, perturbation="copy", weight_decay=decay))
    path, exported = tmp_path / "steps.jsonl", tmp_path / "deep" / "run.safetensors"
    with StepLog(path, optimizer):
        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step(closure)
    export_trajectory(read_log(path), exported)
    again = Quadratic()
    replay(read_trajectory(exported), again)
    replay(read_log(path), Quadratic())
    assert_same_bits(again, snapshot(model))
    with safe_open(exported, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["forwardtune"] == "trajectory"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {"sizes": (1, 3, 1), **shapes}
    if "lr" in shapes:
        assert tensors.pop("lr").dtype == torch.float32
        del metadata["check"]
        save_file(tensors, exported, metadata=metadata)
        with pytest.raises(LogError, match="lacks the learning rates"):
            read_trajectory(exported)


# --- in Trainer ------------------------------------------------------------------------------------------------------


TRAINED: dict[str, dict[str, Any]] = {
    "momentum": {"rule": "momentum", "momentum": 0.5, "rule_state": "exact", "estimator": "one_sided"},
    "adam": {"rule": "adam", "adam_beta1": 0.5, "rule_window": 3, "probes": 2, "normalize": "sigma"},
    "sign": {"rule": "sign", "estimator": "one_sided", "probes": 2, "normalize": "rank"},
}


@pytest.mark.parametrize(
    ("settings", "saving"),
    [(TRAINED["momentum"], False), (TRAINED["momentum"], True), (TRAINED["adam"], False), (TRAINED["sign"], True)],
    ids=["momentum-log-alone", "momentum-checkpoints", "adam-log-alone", "sign-checkpoints"],
)
def test_trainer_resumes_a_rule_with_the_same_bits(settings, saving, tmp_path: Path):
    import test_trainer

    if saving:
        settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    whole = test_trainer.trained(tmp_path / "whole", **settings)
    assert whole.mezo.rule.name == settings["rule"]
    test_trainer.killed(tmp_path / "killed", 4, **settings)
    resumed = test_trainer.resumed(tmp_path / "killed", **settings)
    assert_same_bits(resumed.model, snapshot(whole.model))
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "sgd", "rule_state": "exact"}, "'sgd' remembers nothing: leave rule_state"),
        ({"normalize": "sigma"}, "set probes to 2"),
    ],
    ids=str,
)
def test_trainer_refuses_what_the_optimizer_refuses(settings, words, tmp_path: Path):
    """When the settings are made: nothing was loaded yet."""
    import test_trainer

    with pytest.raises(ValueError, match=words):
        test_trainer.MeZOConfig(str(tmp_path), use_cpu=True, **settings)
