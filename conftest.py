"""For every test: results go to a folder of this session, never to a person's own; no time limit on made-up examples.

The notebooks' kernels get the environment of a stranger's laptop: no assets folder, no token, no network. Tests of real
data see the variables that they ask for.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

RESULTS_VARIABLE = "RUN_RESULTS_DIR"
# What a kernel must not inherit: the notebooks' own defaults are what is tested.
DROPPED_IN_KERNELS = ("ASSETS_DIR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "PRESET")
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
    folder = tempfile.TemporaryDirectory(prefix="results-of-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ[RESULTS_VARIABLE] = folder.name


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
