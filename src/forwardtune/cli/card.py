"""The model card of a run's folder: what was tuned, what the run found, what it measured, and how it is done again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .. import __version__
from ..averages import NONE
from ..config.repeat import repeat_command
from ..files import write_text
from ..hf.model_card import method_facts, rebuilding
from ..models import EMBEDDED_MODEL, model_kind
from ..run_folder import LOG, METRICS, PREDICTIONS, forgetting
from ..tasks import Task
from ..trajectory import Log
from .results import peak_memory
from .session import Session

CARD = "README.md"
# What the package of the embedded model holds, on the hub.
_EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PAPER = "https://arxiv.org/abs/2305.17333"


def write_card(folder: Path, session: Session, metrics: dict[str, Any], log: Log | None) -> None:
    """Write the folder's ``README.md``. No example of the data is in it, and no path of this machine."""
    adapted = (folder / "adapter_config.json").is_file()
    name, base, method = folder.resolve().name, _base(metrics["model"]), metrics["method"]
    how = (
        "backpropagation with Adam"
        if method == "adam"
        else f"forward passes only, no backpropagation, after MeZO ({_PAPER})"
    )
    parts = [
        f"---\n{_data(session, metrics, name, adapted).to_yaml()}\n---\n",
        f"# {name}\n\n`{base}` tuned on the task `{metrics['task']}` with {how}, by forwardtune {__version__}.",
        _results(metrics),
        _tuning(metrics, log),
        _task(session.task, metrics),
        _use(base, adapted, metrics["model"], model_kind(session.model) == "causal"),
        _repeating(metrics),
    ]
    average = metrics.get("average", NONE)
    if log is not None:
        parts.append(rebuilding(log, metrics.get("best_step", log.steps), average))
        option = "" if average == NONE else f" --average {average}"
        parts.append(
            f"On the command line: `forwardtune replay {LOG} --model {base}{option} --output-dir again`, beside this folder's files."
        )
    write_text(folder / CARD, "\n\n".join(part.strip("\n") for part in parts if part) + "\n")


def _data(session: Session, metrics: dict[str, Any], name: str, adapted: bool) -> ModelCardData:
    """What the hub reads."""
    on_hub = _on_hub(metrics["model"])
    value = metrics["test"].get(metrics["metric"])
    result = EvalResult(
        task_type="text-generation" if session.task.free_text else "text-classification",
        dataset_type=(session.task.hub or {}).get("path", metrics["task"]),
        dataset_name=metrics["task"],
        metric_type=metrics["metric"],
        metric_value=value,
    )
    measured = isinstance(value, (int, float)) and math.isfinite(value)
    return ModelCardData(
        base_model=on_hub,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation" if model_kind(session.model) == "causal" else "fill-mask",
        tags=["mezo", "forwardtune", "zeroth-order-optimization"] if metrics["method"] != "adam" else ["forwardtune"],
        datasets=[session.task.hub["path"]] if session.task.hub else None,
        metrics=[metrics["metric"]],
        model_name=name,
        eval_results=[result] if measured else None,
    )


def _on_hub(model: str) -> str | None:
    """The base model's name on the hub, if it has one."""
    if model == EMBEDDED_MODEL:
        return _EMBEDDED_ON_HUB
    return model if not Path(model).expanduser().exists() and model.count("/") <= 1 else None


def _base(model: str) -> str:
    """The base model as a reader knows it: a folder of this machine by its name alone."""
    return model if model == EMBEDDED_MODEL or _on_hub(model) else Path(model).name


def _results(metrics: dict[str, Any]) -> str:
    columns = {name: metrics[key] for name, key in (("before", "before"), ("after", "test")) if key in metrics}
    count = metrics["test"]["examples"]
    lines = [f"## Results\n\n| {count} test examples | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in metrics["test"]:
        if name != "examples":
            lines.append(
                f"| {name.replace('_', ' ')} | " + " | ".join(_number(c.get(name)) for c in columns.values()) + " |"
            )
    if told := forgetting(metrics):
        lines.append(f"\n{told}.")
    if test := metrics.get("sign_test"):
        lines.append(
            f"\n{test['better']} examples came out better, {test['worse']} worse: p = {test['p_value']:.2g} by the sign test."
        )
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and math.isfinite(value) else ""


def _tuning(metrics: dict[str, Any], log: Log | None) -> str:
    settings = metrics["settings"]
    facts: dict[str, Any] = (
        method_facts(log) if log is not None else {"learning_rate": settings.get("lr"), "seed": settings["seed"]}
    )
    facts |= {"tuned weights": settings.get("tune"), "batch size": settings["batch_size"]}
    facts |= {} if log is not None else {"steps": metrics["steps"]}
    facts |= {"weights are those of step": metrics["best_step"]} if "best_step" in metrics else {}
    facts |= {"weights are the average": metrics["average"]} if "average" in metrics else {}
    facts |= {"ways back": metrics["rollbacks"]} if metrics.get("rollbacks") else {}
    facts["seconds"] = f"{metrics['seconds']:.0f}, {metrics['seconds_per_step']:.2f} a step"
    facts["peak memory"] = peak_memory(metrics)
    return "## How it was tuned\n\n" + "\n".join(
        f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()
    )


def _task(task: Task, metrics: dict[str, Any]) -> str:
    lines = [
        "## Data\n",
        f"- task: `{metrics['task']}`" + (f", data set [{task.hub['path']}](https://huggingface.co/datasets/{task.hub['path']})" if task.hub else ""),
        "- examples: " + ", ".join(f"{count} {split}" for split, count in metrics["splits"].items())
        + f", drawn by the rule {metrics['split_rule']} and seed {metrics['settings']['seed']}",
        f"- prompt: `{task.prompt!r}`",
    ]  # fmt: skip
    if task.answers is not None:
        lines.append("- answers: " + ", ".join(f"{text!r} for {label!r}" for label, text in task.answers.items()))
    return "\n".join(lines)


def _use(base: str, adapted: bool, model: str, causal: bool) -> str:
    """How the folder is opened."""
    kind = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    opens_alone = model != EMBEDDED_MODEL and not model.endswith(".gguf")
    if not adapted:
        code = f'from transformers import AutoTokenizer, {kind}\n\nmodel = {kind}.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")'
        note = ""
    elif opens_alone and causal:
        code = 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(".")'
        note = f"It is an adapter, and its base model `{base}` is loaded with it."
    else:
        code = 'from forwardtune.models import load_model\n\nmodel, tokenizer = load_model(".")'
        note = (
            f"It is an adapter of `{base}`, which peft cannot open by that name. `forwardtune merge --model . --output-dir merged` "
            f"writes both as one folder for `{kind}`."
        )
    usage = [
        "forwardtune predict --model . --input new.csv --output answers.csv",
        "forwardtune chat --model . --compare",
    ]
    return (
        "## Use\n\n"
        + (f"{note}\n\n" if note else "")
        + f"```python\n{code}\n```\n\n```\n"
        + "\n".join(usage if causal else usage[:1])
        + "\n```"
    )


def _repeating(metrics: dict[str, Any]) -> str:
    here = {key: Path(str(v)).name if Path(str(v)).is_absolute() else v for key, v in metrics["settings"].items()}
    return f"## Again\n\n```\n{repeat_command(here)}\n```\n\n`{METRICS}` has all settings and measurements; `{PREDICTIONS}`, where it is kept, the answers."
