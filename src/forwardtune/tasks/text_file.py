"""Text files as people have them: compressed or not, in UTF-8 or marked UTF-16; what is neither is named."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
#: How the name of a compressed file ends.
COMPRESSED = tuple(_OPENERS)
# What a spreadsheet writes that does not write UTF-8: its likeliest encoding.
_LIKELY = "cp1252"


def suffix_of(path: Path) -> str:
    """What kind of file its name says, in lower case, whether it is compressed or not: ``.csv`` of ``a.CSV.gz``."""
    name = path.name.lower()
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def open_text(path: Path) -> TextIO:
    """A text file, opened to read it, with its line ends as they are. UTF-16 is known by the mark that it begins with."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    with opener(path, "rb") as file:
        begin = file.read(2)
    encoding = "utf-16" if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    text: TextIO = opener(path, "rt", encoding=encoding, newline="")
    return text


def not_utf8(path: Path) -> InputError:
    """What to say of a file that is not UTF-8: the line, how it would read otherwise, and how to convert it."""
    with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                encoding = "utf-16-le" if b"\0" in line else _LIKELY
                read = line.decode(encoding, errors="replace").strip()
                return InputError(
                    f"{path} is not UTF-8 text (line {number}, byte 0x{line[error.start]:02x}; in {encoding} the line reads "
                    f"{read!r:.60}): convert it, for example with iconv -f {encoding} -t utf-8"
                )
    return InputError(f"{path} is damaged UTF-16 text: write it again, as UTF-8")
