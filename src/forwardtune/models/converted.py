"""Models converted from GGUF, kept in the user's cache, since converting takes many times as long as loading.

An entry is an ordinary Hugging Face folder. Its name is a digest of the GGUF file, the dtype and the versions of what converts,
and its ``manifest.json`` holds the digests of its files, which are compared at every use. So a hit gives what converting would
give, to the bit, and whatever is damaged is converted again. Entries appear whole, by renaming, so that several processes
can share the folder.

The folder is ``$FORWARDTUNE_CACHE``, or else ``forwardtune`` in ``$HF_HOME``, ``$XDG_CACHE_HOME`` or ``~/.cache``, the first that
is set. ``FORWARDTUNE_CACHE=off`` keeps nothing. It holds at most 4 GiB; what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import digest_of, read_json, write_json

_VERSION = 1
_CONVERTERS = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
_MANIFEST = "manifest.json"
_PARTIAL = "partial-"
_MOST_BYTES = 4 << 30
_STALE = 24 * 3600.0  # seconds after which a partial entry belongs to a process that was killed

Pair = tuple[Any, Any]


def through_cache(
    file: Path,
    dtype: str,
    convert: Callable[[], Pair],
    load: Callable[[Path], Pair],
    announce: Callable[[str], object],
) -> Pair:
    """The model and tokenizer of a GGUF file: loaded from the cache, or else converted and, if they fit, kept there.

    ``convert`` does it without the cache, ``load`` reads an entry, and ``announce`` is told when something is converted.
    """
    entry = None
    with suppress(OSError, metadata.PackageNotFoundError):  # then converting says what is wrong
        root = cache_folder()
        if root is not None and 2 * file.stat().st_size <= _MOST_BYTES:  # converted weights take twice as much, or more
            entry = root / f"gguf-{_key(file, dtype)}"
    if entry is None:
        announce(f"  converting {file.name}")
        return convert()
    if _is_whole(entry):
        with suppress(Exception):  # another process may just have removed it
            pair = load(entry)
            os.utime(entry / _MANIFEST)
            return pair
    announce(f"  converting {file.name}; the result is kept in {entry.parent} (FORWARDTUNE_CACHE=off keeps nothing)")
    model, tokenizer = convert()
    with suppress(OSError):  # a full disk, or a folder that cannot be written: there is no cache then
        _keep(model, tokenizer, entry)
    return model, tokenizer


def cache_folder() -> Path | None:
    """Where converted models are kept; None if they are not."""
    own = os.environ.get("FORWARDTUNE_CACHE")
    if own is not None:
        return None if own.lower() in ("", "0", "off", "no", "false") else Path(own).expanduser()
    parent = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "forwardtune"


def _key(file: Path, dtype: str) -> str:
    versions = {name: metadata.version(name) for name in _CONVERTERS}
    facts = {"version": _VERSION, "file": digest_of(file), "dtype": dtype, "by": versions}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _is_whole(entry: Path) -> bool:
    """Whether the entry is there with the bits that it was written with; what is damaged is removed."""
    with suppress(OSError):
        digests = read_json(entry / _MANIFEST)
        if digests and digests == _digests(entry):
            return True
    if entry.is_dir():
        _remove(entry)
    return False


def _digests(entry: Path) -> dict[str, str]:
    return {file.name: digest_of(file) for file in sorted(entry.iterdir()) if file.name != _MANIFEST}


def _keep(model: Any, tokenizer: Any, entry: Path) -> None:
    """Write an entry, unless it would not give the same model again, or does not fit."""
    size = sum(tensor.nbytes for tensor in model.parameters())
    root = entry.parent
    root.mkdir(parents=True, exist_ok=True)
    _make_room(root, size)
    if size > _MOST_BYTES or shutil.disk_usage(root).free < 2 * size:
        return
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if _gives_the_same(partial, model, tokenizer):
            write_json(partial / _MANIFEST, _digests(partial))
            os.rename(partial, entry)  # fails if another process was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _gives_the_same(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Whether weights, configuration and tokenizer come back from the folder as they are."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    left = dict(model.state_dict())
    addresses = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is no mapping
                tensor, stored = left.pop(name), content.get_tensor(name)
                if tensor.dtype != stored.dtype or not torch.equal(_bytes(tensor), _bytes(stored)):
                    return False
                addresses.add(tensor.data_ptr())
    return (
        all(tensor.data_ptr() in addresses for tensor in left.values())  # the rest are tied to what was stored
        and _plain(AutoConfig.from_pretrained(folder)) == _plain(model.config)
        and GenerationConfig.from_pretrained(folder).to_dict() == model.generation_config.to_dict()
        and _described(AutoTokenizer.from_pretrained(folder)) == _described(tokenizer)
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _plain(config: Any) -> dict[str, str]:
    own = ("_name_or_path", "transformers_version")
    return {key: str(value) for key, value in config.to_dict().items() if key not in own}


def _described(tokenizer: Any) -> list[Any]:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    names = (
        "chat_template", "model_max_length", "padding_side", "truncation_side", "model_input_names",
        "clean_up_tokenization_spaces",
    )  # fmt: skip
    values = [getattr(tokenizer, name) for name in names]
    return [type(tokenizer), tokenizer.backend_tokenizer.to_str(), special, *values]


def _make_room(root: Path, size: int) -> None:
    """Remove entries that were not used for longest until one of this size fits, and what killed processes left."""
    entries = []
    for folder in root.iterdir():
        with suppress(OSError):
            if folder.name.startswith(_PARTIAL):
                if time.time() - folder.stat().st_mtime > _STALE:
                    _remove(folder)
            elif folder.name.startswith("gguf-"):
                bytes_kept = sum(file.stat().st_size for file in folder.iterdir())
                entries.append(((folder / _MANIFEST).stat().st_mtime, bytes_kept, folder))
    total = sum(bytes_kept for _, bytes_kept, _ in entries)
    for _, bytes_kept, folder in sorted(entries):
        if total + size <= _MOST_BYTES:
            return
        _remove(folder)
        total -= bytes_kept


def _remove(entry: Path) -> None:
    """Remove an entry, which vanishes at once under its own name."""
    with suppress(OSError):
        away = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=entry.parent))
        os.rename(entry, away)  # a folder may take the place of an empty one
        entry = away
    shutil.rmtree(entry, ignore_errors=True)
