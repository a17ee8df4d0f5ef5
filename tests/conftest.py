"""Test settings: one thread per process, Hypothesis profiles, and the order of files.

``default`` runs on every change. ``thorough`` (``make test-all``) draws many more examples per property.
"""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.helpers import shared

settings.register_profile("default", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=400)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute on one thread: the tensors of tests are tiny, and distributing them costs far more than it saves.

    The process that distributes tests under pytest-xdist imports this module, but no torch.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set the directory that all processes share: the parent of each process's directory under pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    shared.directory = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder


LONG_FILES = (
    "serving/engine/test_workers",
    "end_to_end/test_training_job",
    "experiments/backtest/test_backtest",
    "docs/test_commands",
    "serving/test_page",
    "training/test_forkmerge",
    "experiments/test_runner",
    "end_to_end/test_warm_start",
    "training/test_sharded",
    "benchmarks/test_train_throughput",
    "benchmarks/test_scaling",
    "benchmarks/test_prepare",
    "data/sources/test_proposal",
    "data/sources/test_times",
    "data/sources/test_conservation",
    "data/prepare/test_pipeline",
    "simulation/test_simulator",
    "models/test_feedback_model",
    "ensemble/test_trainer",
    "ranking/test_ranker",
    "reporting/pages/experiment/test_page",
    "reporting/pages/dataset/test_page",
)
"""Files of ten and more seconds, those that wait most first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that the processes end at about the same time."""
    files = [item.nodeid.partition(".py::")[0].removeprefix("tests/") for item in items]
    order = {file: len(LONG_FILES) + 1 for file in files}
    for file, item in zip(files, items, strict=True):
        if any(item.get_closest_marker(name) for name in ("processes", "browser", "training")):
            order[file] = len(LONG_FILES)
    order |= {file: index for index, file in enumerate(LONG_FILES)}
    items[:] = [item for _, item in sorted(zip(files, items, strict=True), key=lambda pair: order[pair[0]])]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Exclude modules and collected tests from garbage collection, which would traverse them all the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
