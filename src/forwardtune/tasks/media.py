"""Images and sound in data, which are refused: models are tuned on text here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import InputError

Row = dict[str, Any]

# Kinds of the parts of a message that are no text.
_MEDIA = {"image", "image_url", "input_image", "video", "audio", "input_audio"}


def require_text(rows: Iterable[Row], where: Callable[[int], str]) -> None:
    """Raise InputError if a row holds an image or a sound, as data sets of the hub, or messages, do: models are tuned on text here."""
    for number, row in enumerate(rows):
        for column, value in row.items():
            if _holds_media(value):
                raise InputError(
                    f"{where(number)}: column {column!r} holds an image or other media, and only text is tuned on and "
                    "measured here, vision-language models included: use data without that column"
                )


def _holds_media(value: Any) -> bool:
    """Whether it is, or contains, what ``datasets`` gives for an image or a sound, or a part of a message that is one."""
    if isinstance(value, Mapping):
        media = (
            value.get("type") in _MEDIA
            or {"bytes", "path"} == value.keys()
            or {"array", "sampling_rate"} <= value.keys()
        )
        return media or any(map(_holds_media, value.values()))
    if isinstance(value, list):
        return any(map(_holds_media, value))
    return isinstance(value, bytes) or type(value).__module__.partition(".")[0] == "PIL"
