"""The cache of models that were converted from GGUF: the same bits with it, without it, damaged, full or shared."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.models import converted, load_model
from forwardtune.parameters import TunedParameters
from support.ranks import ranks

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    support.write_gguf(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FORWARDTUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The files that were parsed."""
    files: list[Any] = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: Any, *arguments: Any) -> None:
            files.append(path)
            super().__init__(path, *arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    return files


def entries(cache: Path) -> list[Path]:
    """Whole ones; there must be no other."""
    found = sorted(cache.iterdir())
    assert all(entry.name.startswith("gguf-") for entry in found)
    return found


def assert_has_weights_of(model: Any, seed: int) -> None:
    """Those of the file; GGUF permutes the rows of some others."""
    expected = support.tiny_model("llama_untied", seed=seed)
    assert support.same_bits(model.lm_head.weight, expected.lm_head.weight)
    assert support.same_bits(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def three_losses(model: Any) -> list[float]:
    optimizer = MeZO(model, lr=1e-3)
    return [optimizer.step(support.closure_for(model, support.token_batch())) for _ in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_from_the_cache_is_the_converted_one(dtype: str, file: Path, cache: Path, parsed: list[Any]) -> None:
    said: list[str] = []
    (first, tokenizer), (second, again) = (load_model(str(file), dtype=dtype, announce=said.append) for _ in range(2))
    assert len(parsed) == 1  # for configuration, tokenizer and weights together
    assert len(said) == 1
    assert str(cache) in said[0]
    support.assert_same_bits(second, support.snapshot(first))
    assert {p.data_ptr() % 64 for model in (first, second) for p in model.parameters()} == {0}
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in first.parameters()]
    assert second.dtype == first.dtype
    assert second.training == first.training
    assert second.name_or_path == first.name_or_path == str(file)
    assert second.config.to_dict() == first.config.to_dict()
    assert second.__dict__.keys() == first.__dict__.keys()
    assert second.generation_config.to_dict() == first.generation_config.to_dict()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.name_or_path == tokenizer.name_or_path
    assert again("the film was great")["input_ids"] == tokenizer("the film was great")["input_ids"]
    assert three_losses(second) == three_losses(first)


def test_saved_models_are_the_same_with_and_without_the_cache(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {}
    for kind in ("off", "converted", "loaded"):
        monkeypatch.setenv("FORWARDTUNE_CACHE", "off" if kind == "off" else str(cache))
        for part in load_model(str(file)):
            part.save_pretrained(tmp_path / kind)
        saved[kind] = {f.name: f.read_bytes() for f in (tmp_path / kind).iterdir()}
    assert saved["off"] == saved["converted"] == saved["loaded"]


def flip(path: Path) -> None:
    with path.open("r+b") as content:
        content.seek(-100, os.SEEK_END)
        (byte,) = content.read(1)
        content.seek(-100, os.SEEK_END)
        content.write(bytes([byte ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda entry: flip(entry / "model.safetensors"),
    "torn weights": lambda entry: os.truncate(entry / "model.safetensors", 1000),
    "a changed configuration": lambda entry: (entry / "config.json").write_text(
        (entry / "config.json").read_text().replace("256", "255")
    ),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "no tokenizer": lambda entry: (entry / "tokenizer.json").unlink(),
    "a file too many": lambda entry: (entry / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_converted_again(
    damage: Callable[[Path], object], file: Path, cache: Path, parsed: list[Any]
) -> None:
    model, _ = load_model(str(file))
    (entry,) = entries(cache)
    before = {f.name: f.read_bytes() for f in entry.iterdir()}
    damage(entry)
    assert {f.name: f.read_bytes() for f in entry.iterdir()} != before
    support.assert_same_bits(load_model(str(file))[0], support.snapshot(model))
    assert len(parsed) == 2
    assert entries(cache) == [entry]
    assert {f.name: f.read_bytes() for f in entry.iterdir()} == before
    load_model(str(file))
    assert len(parsed) == 2


def test_another_file_dtype_or_version_is_another_entry(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(str(file))
    assert len(entries(cache)) == 1
    load_model(str(file), dtype="float32")  # what auto means
    assert len(entries(cache)) == 1
    load_model(str(file), dtype="bfloat16")
    assert len(entries(cache)) == 2
    support.write_gguf(file, seed=1)
    other, _ = load_model(str(file))
    assert len(entries(cache)) == 3
    assert_has_weights_of(other, 1)
    version = converted.metadata.version
    monkeypatch.setattr(converted.metadata, "version", lambda name: version(name) + "x" * (name == "transformers"))
    load_model(str(file))
    assert len(entries(cache)) == 4


@pytest.mark.parametrize("where", ["off", "0", "", "a file"])
def test_without_a_cache_models_load_as_well(where: str, file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("FORWARDTUNE_CACHE", str(tmp_path / "occupied" / "cache") if where == "a file" else where)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        model, _ = load_model(str(file))
        assert_has_weights_of(model, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"occupied", "tiny.gguf"}


def test_without_the_package_that_reads_gguf_the_remedy_is_named(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "gguf":
            raise converted.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(converted.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda *_: False)
    with pytest.raises(InputError, match="gguf"):
        load_model(str(file))


def test_a_file_that_is_no_gguf_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(str(tmp_path / "text.gguf"))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FORWARDTUNE_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/forwardtune"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/forwardtune"),
        ({}, str(Path.home() / ".cache" / "forwardtune")),
    ],
)
def test_the_folder_follows_the_environment(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORWARDTUNE_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert converted.cache_folder() == Path(expected)


def test_the_cache_is_bounded_and_what_was_used_last_stays(
    file: Path, cache: Path, parsed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(str(file))
    (oldest,) = entries(cache)
    size = sum(f.stat().st_size for f in oldest.iterdir())
    monkeypatch.setattr(converted, "_MOST_BYTES", 3 * size)
    names = [file.with_name(f"{seed}.gguf") for seed in range(1, 4)]
    for number, name in enumerate(names, start=1):
        support.write_gguf(name, seed=number)
    load_model(str(names[0]))
    (second,) = set(entries(cache)) - {oldest}
    for age, entry in ((20, oldest), (10, second)):
        os.utime(entry / "manifest.json", (age, age))
    load_model(str(file))  # a use
    load_model(str(names[1]))
    load_model(str(names[2]))
    assert oldest in entries(cache)
    assert second not in entries(cache)
    assert sum(f.stat().st_size for entry in entries(cache) for f in entry.iterdir()) <= 3 * size
    monkeypatch.setattr(converted, "_MOST_BYTES", size // 4)
    before = len(parsed)
    load_model(str(file), dtype="bfloat16")
    load_model(str(file), dtype="bfloat16")
    assert len(parsed) == before + 2


def test_what_killed_processes_left_is_removed_when_it_is_old(file: Path, cache: Path) -> None:
    for name, age in (("partial-old", 2 * converted._STALE), ("partial-new", 0.0)):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors").touch()
        os.utime(cache / name, times=(now := (cache / name).stat().st_mtime - age, now))
    load_model(str(file))
    assert not (cache / "partial-old").exists()
    assert (cache / "partial-new").exists()


def test_processes_that_convert_and_clean_up_at_once_do_not_disturb_each_other(file: Path, cache: Path) -> None:
    support.write_gguf(other := file.with_name("other.gguf"), seed=1)

    def work(rank: int) -> list[str]:
        found = []
        for _ in range(3):
            model, _ = load_model(str(file))
            found.append(TunedParameters.from_groups([{"params": list(model.parameters())}], model).digest())
        return found

    printed = ranks(2, work, within=300)
    assert all(isinstance(digests, list) for digests in printed), printed
    assert len({digest for digests in printed for digest in digests}) == 1
    assert len(entries(cache)) == 1
    load_model(str(other))
    assert len(entries(cache)) == 2


def test_an_entry_that_vanishes_while_it_is_read_is_converted(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(str(file))
    is_whole = converted._is_whole

    def vanishing(entry: Path) -> bool:
        whole = is_whole(entry)
        (entry / "model.safetensors").unlink()
        return whole

    monkeypatch.setattr(converted, "_is_whole", vanishing)
    support.assert_same_bits(load_model(str(file))[0], support.snapshot(model))


def test_what_would_not_come_back_the_same_is_not_kept(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Any:
        return load_model(str(file))[0]

    described = converted._described
    monkeypatch.setattr(converted, "_described", lambda tokenizer: (described(tokenizer), object()))
    load()
    assert entries(cache) == []
    monkeypatch.setattr(converted, "_described", described)
    monkeypatch.setattr(converted, "_bytes", lambda tensor: torch.rand(3))
    load()
    assert entries(cache) == []
