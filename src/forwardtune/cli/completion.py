"""What makes a shell complete commands and options."""

from __future__ import annotations

import argparse

import shtab

# Options and arguments whose values are places on the disk.
_PLACES = {"output_dir", "data_dir", "config", "model", "task", "data", "input", "output", "log", "run_folder"}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser with its commands; what takes a file or a folder is completed with those."""
    commands = [
        command for action in parser._actions if isinstance(action.choices, dict) for command in action.choices.values()
    ]
    for each in (parser, *commands):
        for action in each._actions:
            if action.dest in _PLACES:
                action.complete = shtab.FILE
    return str(shtab.complete(parser, shell))
