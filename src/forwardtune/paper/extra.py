"""The packages of ``pip install 'forwardtune[paper]'``: asked for before anything runs, as nothing else needs them."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import InputError

#: What fits linear probes, and what draws; by the names that they are imported by.
PROBING = {"sklearn": "scikit-learn"}
PLOTS = {"matplotlib": "matplotlib", "pandas": "pandas"}


def require(what: str, packages: dict[str, str], otherwise: str = "", extra: str = "paper") -> None:
    """Raise InputError, with the remedy, unless the packages are there. None of them is imported."""
    missing = [name for module, name in packages.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"{what} need {' and '.join(missing)}: pip install 'forwardtune[{extra}]'{otherwise}")
