"""``forwardtune merge | push``: a tuned model as one ordinary folder, and on the hub."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

from ..errors import InputError
from ..models import merge_adapter, save_model
from ..run_folder import COMPLETIONS, LOG, METRICS, OUTCOMES, PREDICTIONS, TASK, RunFolder
from . import say
from .card import CARD
from .options import ask
from .results import new_folder

# What goes to the hub: the model, its tokenizer, and what explains it. Nothing of it holds an example of the data.
_PUSHED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
    CARD, LOG, METRICS, TASK,
)  # fmt: skip
_ANSWERS = (PREDICTIONS, OUTCOMES)


def run_merge(parsed: argparse.Namespace) -> None:
    """Put an adapter into its base model, and save that as a folder."""
    options = ask(parsed, "merge").describe()
    source, folder = Path(options.model).expanduser(), new_folder(parsed.output_dir)
    say(f"merging {source}")
    merged, tokenizer = merge_adapter(source, options.dtype, quantize=options.quantize)
    save_model(merged, tokenizer, folder)
    say(f"adapter and base are one model in {folder}, {str(merged.dtype).removeprefix('torch.')}")
    say("for llama.cpp and its like, its convert_hf_to_gguf.py reads this folder")


def run_push(parsed: argparse.Namespace) -> None:
    """Upload a run's model and what explains it."""
    run = RunFolder(Path(parsed.run_folder))
    if not run.has_model:
        raise InputError(f"{run.path} holds no tuned model yet: finish the run first")
    files = pushed_files(run.path, answers=parsed.with_predictions, samples=parsed.with_samples)
    size = sum((run.path / name).stat().st_size for name in files)
    say(f"{len(files)} files, {size / 2**20:,.1f} MiB, {'would go' if parsed.dry_run else 'go'} to {parsed.repo}:")
    for name in files:
        say(f"  {name}")
    if parsed.dry_run:
        return
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(library_name="forwardtune")
    try:
        repo = api.create_repo(parsed.repo, private=parsed.private, exist_ok=True).repo_id
        # One commit: the repository has all of the run, or nothing of it.
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=run.path / name) for name in files]
        commit = api.create_commit(repo, added, commit_message="Model tuned with forwardtune")
    except HFValidationError as error:
        raise InputError(f"--repo {parsed.repo} is no name of the hub ({error}): give USER/NAME") from None
    except Exception as error:  # the hub's client has many errors of its own
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{parsed.repo} could not be written ({reason}): log in with `hf auth login`, or set HF_TOKEN, and check the network"
        ) from None
    say(f"uploaded: {commit.commit_url}")


def pushed_files(folder: Path, *, answers: bool = False, samples: bool = False) -> list[str]:
    """What of a run goes to the hub: no predictions, unless ``answers``, and no sample of text or report, unless ``samples``."""
    wanted = (*_PUSHED, *(_ANSWERS if answers else ()), *((COMPLETIONS,) if samples else ()))
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]
    report = sorted((folder / "report").glob("*")) if samples and answers else []
    return chosen + [str(path.relative_to(folder)) for path in report]
