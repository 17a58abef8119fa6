"""The step log's lines: JSON objects, each sealed with a checksum that chains it to the lines before it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import LogError
from ..files import plain
from ..method.estimators import Estimator, get_estimator
from ..method.record import StepRecord, coefficients_of, mean_loss
from ..noise import NOISE_VERSION, SPECIFIED, Direction, Emphasis, LowRank, Noise, get_direction
from ..optimizer import MeZO
from ..parameters import TunedParameters
from ..processes import versions

#: Which rows of a tensor, by id, no step has read so far: bool, shape (rows,).
Unread: TypeAlias = "Mapping[int, Tensor]"
FORMAT_VERSION = 4
#: Of a run whose steps wait to be folded into the weights.
FOLDING_VERSION = 5
#: Formats that can be read: in version 2 every step moved every tensor, in version 3 all of its rows.
READABLE = (2, 3, 4, 5)
_SEAL_DIGITS = 16
_SEAL_LENGTH = len(',"check":""}') + _SEAL_DIGITS


def seal(previous: str, content: dict[str, Any]) -> tuple[str, str]:
    """The line for ``content`` (without its newline) and its checksum, given the checksum of the line before.

    The checksum is the first 16 hex digits of SHA-256 over the previous checksum and the line's text without its
    ``check`` field. It finds accidents and edits; it is no signature.
    """
    body = json.dumps(content, separators=(",", ":"), allow_nan=False)
    check = _check(previous, body)
    return f'{body[:-1]},"check":"{check}"}}', check


def unseal(previous: str, line: str) -> tuple[dict[str, Any], str]:
    """The content of a sealed line and its checksum.

    Raises:
        LogError: the line is not the one that was written after the line with checksum ``previous``.
    """
    body, tail = line[:-_SEAL_LENGTH] + "}", line[-_SEAL_LENGTH:]
    check = _check(previous, body)
    if tail != f',"check":"{check}"}}':
        raise LogError("its checksum does not fit: it was altered, or lines before it are missing")
    content = json.loads(body)
    if not isinstance(content, dict):
        raise LogError("it is not an object")
    return content, check


def _check(previous: str, body: str) -> str:
    return hashlib.sha256((previous + body).encode()).hexdigest()[:_SEAL_DIGITS]


#: Fields of the header that describe a run, or its file, and decide nothing.
DESCRIPTIVE = ("format", "base", "frozen", "versions", "workers", "run")
#: What settings came to, by the weights or losses at the beginning: a run that goes on takes it from the log.
FOUND = "emphasis"
#: What a field means that the header leaves out.
ABSENT: dict[str, Any] = {
    "normalize": "none", "rule_settings": {}, "assignment": "shared", "group_size": 1, "rank": 0, "refresh": 1, "fold": "step", "clip_coefficient": None, "parts": 1,
    "probes_rise": 0, "active_layers": None, "sparsity": 0.0, "modify": "none", "modify_by": "parameters",
}  # fmt: skip


def header_content(optimizer: MeZO, run: dict[str, Any] | None = None) -> dict[str, Any]:
    """The header of a run that starts from the optimizer's present weights (which it digests)."""
    workers, frozen = workers_content(optimizer), optimizer.tuned.frozen_digest()
    return {
        **identity(optimizer),
        "base": optimizer.tuned.digest(),
        **({"frozen": frozen} if frozen else {}),
        "versions": versions(),
        **({"workers": workers} if workers else {}),
        "run": run or {},
    }


def workers_content(optimizer: MeZO) -> dict[str, Any]:
    """What decides the bits of an evaluation where several processes share them; nothing of one process."""
    workers = optimizer.workers
    return {} if workers.count == 1 else {"ranks": workers.count, **optimizer.computing()}


def require_frozen(path: object, header: dict[str, Any], tuned: TunedParameters) -> None:
    """Raise LogError if the run of a log tuned over a quantised model, or beside a frozen A of LoRA, and this one has other bits."""
    frozen = header.get("frozen")
    if frozen is None or tuned.frozen_digest() == frozen:
        return
    if tuned.module is None or not getattr(tuned.module, "is_quantized", False):
        raise LogError(
            f"the run of {path} tuned B of LoRA beside a frozen A, or over a quantised model, and this model has another A, or is not quantised: "
            "start from the adapter that the run started from, over the run's own base model"
        )
    raise LogError(
        f"the run of {path} tuned over a quantised model, and this model is not stored in the same bits: load the run's own base model "
        f"({header['run'].get('model', 'not recorded')}), quantised as it was then ({header['run'].get('quantize') or 'as stored'}), "
        "with the same versions of the packages"
    )


def identity(optimizer: MeZO) -> dict[str, Any]:
    """The part of the header that decides the meaning of the step lines; a resumed run must have the same."""
    rule = optimizer.rule.settings()
    return {
        "format": FORMAT_VERSION if optimizer.pending is None else FOLDING_VERSION,
        "noise": NOISE_VERSION,
        "seed": optimizer.noise.seed,
        **direction_content(optimizer.noise.direction),
        **structure_content(optimizer.noise.structure),
        **({} if optimizer.pending is None else {"fold": "refresh"}),
        **weighting_content(optimizer),
        **optimizer.estimator.settings(),
        **({"probes_rise": optimizer.probes_rise} if optimizer.probes_rise else {}),
        # Coefficients are logged as clipped, but for those that are derived from the losses of examples.
        **({"clip_coefficient": optimizer.clip_coefficient} if _clips_derived(optimizer) else {}),
        "rule": optimizer.rule.name,
        **({"rule_settings": rule} if rule else {}),
        # What the losses are sums of.
        **({"parts": optimizer.parts} if optimizer.parts > 1 else {}),
        "groups": [{"weight_decay": float(group["weight_decay"])} for group in optimizer.param_groups],
        "tensors": optimizer.tuned.describe(),
    }


def direction_content(direction: Direction) -> dict[str, str]:
    """What the header says of a direction. The tables of our own belong to the version of the noise."""
    own = {} if direction.name in SPECIFIED else {"direction_table": direction.digest()}
    return {"direction": direction.name, **own}


def _clips_derived(optimizer: MeZO) -> bool:
    return optimizer.estimator.per_example and (optimizer.clip_coefficient or math.inf) < math.inf


def structure_content(structure: LowRank | None) -> dict[str, int]:
    """What the header says of the structure of directions; nothing of full ones."""
    if structure is None:
        return {}
    return {"rank": structure.rank} | ({"refresh": structure.refresh} if structure.refresh != 1 else {})


def weighting_content(optimizer: MeZO) -> dict[str, Any]:
    """What the header says of where directions fall: settings, and what they came to; nothing if they fall everywhere alike."""
    emphasis = optimizer.noise.emphasis
    return optimizer.weighting.settings() | ({"emphasis": emphasis.content()} if emphasis is not None else {})


def emphasis_of(header: dict[str, Any]) -> Emphasis | None:
    """Where the directions of a run fall."""
    return Emphasis.of_content(header["emphasis"]) if "emphasis" in header else None


def noise_of(header: dict[str, Any]) -> Noise:
    """The noise of a run."""
    structure = LowRank(header["rank"], header.get("refresh", 1)) if header.get("rank") else None
    return Noise(header["seed"], get_direction(header["direction"]), structure, emphasis_of(header))


def estimator_of(header: dict[str, Any]) -> Estimator | None:
    """The estimator of a run whose coefficients are derived from the losses of its examples; None if they are in the log."""
    if header.get("assignment", ABSENT["assignment"]) == "shared":
        return None
    settings: dict[str, Any] = {
        key: header.get(key, ABSENT.get(key)) for key in ("eps", "probes", "normalize", "assignment")
    }
    return get_estimator(header["estimator"], **settings)


def step_content(record: StepRecord, unread: Unread = MappingProxyType({})) -> dict[str, Any]:
    """One step's line. Learning rates that are equal in all groups are written once. ``unread`` are the rows after the line before.

    Losses of examples stand as float32, in base 64, and give the coefficients.
    """
    if record.examples:
        packed = struct.pack(f"<{len(record.losses)}f", *record.losses)
        numbers: dict[str, Any] = {"examples": record.examples, "losses": base64.b64encode(packed).decode()}
        if record.skipped:
            numbers["skipped"] = True
    else:
        numbers = {
            "coefficients": [plain(c) for c in record.coefficients],
            "losses": [plain(loss) for loss in record.losses],
            "loss": plain(record.loss),
        }
    return {
        "step": record.step,
        "lr": record.lr[0] if len(set(record.lr)) == 1 else list(record.lr),
        **numbers,
        "unchanged": record.unchanged,
        "seconds": round(record.seconds, 6),
        **({"unused": ranges(record.unused)} if record.unused else {}),
        **({"left_out": ranges(record.left_out)} if record.left_out else {}),
        **({"rows": rows} if (rows := rows_read(unread, record.unread)) else {}),
    }


def step_record(
    content: dict[str, Any], header: dict[str, Any], estimator: Estimator | None, unread: Unread
) -> StepRecord:
    """The inverse of :func:`step_content`, with what :func:`estimator_of` gives for the header."""
    groups = header["groups"]
    lr = content["lr"]
    examples = 0
    if estimator is None:
        losses = tuple(map(float, content["losses"]))
        coefficients, loss = tuple(map(float, content["coefficients"])), float(content["loss"])
    else:
        examples = content["examples"]
        if type(examples) is not int or examples < 1:
            raise ValueError(f"{examples!r} examples")
        count = len(estimator.queries()) * examples
        losses = struct.unpack(f"<{count}f", base64.b64decode(content["losses"], validate=True))
        by_query = [losses[i : i + examples] for i in range(0, count, examples)]
        found = coefficients_of(estimator, by_query, header.get("clip_coefficient"))
        coefficients = () if content.get("skipped") else found
        loss = mean_loss(losses, skipped=not coefficients)
    return StepRecord(
        step=content["step"],
        lr=tuple(lr) if isinstance(lr, list) else (lr,) * len(groups),
        weight_decay=tuple(group["weight_decay"] for group in groups),
        coefficients=coefficients,
        losses=losses,
        loss=loss,
        unchanged=content["unchanged"],
        seconds=content["seconds"],
        unused=numbers(content.get("unused", ""), len(header["tensors"])),
        examples=examples,
        left_out=numbers(content.get("left_out", ""), len(header["tensors"])),
        unread=without_rows(unread, content.get("rows", {}), header),
    )


def rows_read(before: Unread, after: Unread) -> dict[str, str]:
    """By id, the rows that were read for the first time, of the tensors that were read in part alone."""
    found = {}
    for number in sorted(before.keys() | after.keys()):
        was, now = before.get(number), after.get(number)
        if now is was:
            continue
        read = was if now is None else ~now if was is None else was & ~now
        assert read is not None
        if bool(read.any()):
            found[str(number)] = ranges(read.nonzero().view(-1).tolist())
    return found


def without_rows(unread: Unread, rows: Mapping[str, str], header: Mapping[str, Any]) -> Unread:
    """The inverse of :func:`rows_read`: what is unread after these rows were read."""
    if not rows:
        return unread
    after = dict(unread)
    for key, text in rows.items():
        number = int(key)
        height = header["tensors"][number]["shape"][0]
        was = after.pop(number, None)
        left = torch.ones(height, dtype=torch.bool) if was is None else was.clone()
        left[list(numbers(text, height))] = False
        if bool(left.any()):
            after[number] = left
    return after


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: ``(0, 1, 2, 7)`` -> ``"0-2,7"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in parts)


def numbers(text: str, count: int) -> tuple[int, ...]:
    """The inverse of :func:`ranges`. Raises ValueError unless the numbers ascend and are smaller than ``count``."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        lo, _, hi = part.partition("-")
        found += range(int(lo), int(hi or lo) + 1)
    if ranges(found) != text or sorted(set(found)) != found or (found and found[-1] >= count):
        raise ValueError(f"{text!r} are no ids of {count} tensors")
    return tuple(found)
