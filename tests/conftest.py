"""One thread a worker (the suite runs on all cores), and no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too: bits may depend on it

import gc
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import support

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """On a machine that tests a GPU and has no Numba, the CPU's part is slow, and that is all."""
    if find_spec("numba") is None:
        config.addinivalue_line("filterwarnings", "ignore:forwardtune computes its noise with plain torch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where this many cases of a test are enough (``make mutants``), others than the first, the last and some between are left out."""
    most = int(os.environ.get("FORWARDTUNE_MOST_CASES", "0"))
    if most > 1:
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
        kept = {i for group in cases.values() for i in (group[n * (len(group) - 1) // (most - 1)] for n in range(most))}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.fixture
def random_state_untouched():
    """Fails the test if it moved torch's global random state."""
    before = torch.random.get_rng_state().clone()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """What was imported once need not be looked through at every collection, of which a Trainer, and a model that is loaded, bring some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved tiny Llama with a tokenizer of its own, as a user would have it in a local folder."""
    return support.save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real benchmark data, where the environment names it."""
    return _folder("FORWARDTUNE_TEST_DATA", "benchmark data")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Small trained models, where the environment names them."""
    return _folder("FORWARDTUNE_TEST_MODELS", "trained models")


def _folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"no {what} here: {variable} is not set")
    return Path(folder)
