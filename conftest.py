"""For every test: results go to a folder of this session, never to a person's own; no time limit on made-up examples.

The notebooks' kernels get the environment of a stranger's laptop: no assets folder, no token, no network. Tests of real
data see the variables that they ask for.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import lib.driver.kernel_server  # before torch, which many tests import first: it sets how OpenMP's threads wait

RESULTS_VARIABLE = "RUN_RESULTS_DIR"
LEDGER_VARIABLE = "RUN_PAGES_LEDGER"
FORK_VARIABLE = lib.driver.kernel_server.SERVER_VARIABLE
# What a kernel must not inherit: the notebooks' own defaults are what is tested.
DROPPED_IN_KERNELS = ("ASSETS_DIR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "PRESET")
# Of a worker of these tests; a notebook has the whole machine on a laptop.
DROPPED_IN_KERNELS += ("OMP_NUM_THREADS",)
SET_IN_KERNELS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Nobody looks at a notebook that is tested: no bar is shown in it.
SET_IN_KERNELS |= {"RUN_BY_DRIVER": "1"}

# On a busy machine any example can take seconds, and so can drawing it: neither says anything about what is tested.
# The examples are the same each time: what fails for one person fails for the next. New ones are drawn by
# `--hypothesis-profile explore`.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
settings.register_profile("unhurried", settings.get_profile("explore"), derandomize=True)
settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    """One results folder a session: notebook 02 finds what notebook 01 wrote, and nothing older."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores, and tiny models have nothing for a second thread.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = tempfile.TemporaryDirectory(prefix="results-of-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ[RESULTS_VARIABLE] = folder.name
    ledger = tempfile.TemporaryDirectory(prefix="ledger-of-tests-")
    config.add_cleanup(ledger.cleanup)
    os.environ[LEDGER_VARIABLE] = str(Path(ledger.name, "pages.txt"))
    # Their small notebooks import nothing slow; tests of forked kernels ask for them.
    os.environ[FORK_VARIABLE] = "0"


def pytest_collection_finish() -> None:
    """What torch and the tests' modules hold stays: statsmodels collects garbage in every call of ``multipletests``."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes of their own."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole files, and one of them all notebooks: each reads what the one before it wrote."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "notebooks" if nodeid.startswith("notebooks/") else nodeid.split("::")[0]

    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """nbval starts a notebook's kernel while its first cell is set up, and the kernel inherits what stands then."""
    if Path(item.path).suffix != ".ipynb":
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for name in DROPPED_IN_KERNELS:
            patch.delenv(name, raising=False)
        for name, value in SET_IN_KERNELS.items():
            patch.setenv(name, value)
        return (yield)
