"""The variables that kernels inherit from the process that starts them."""

import os

from lib.driver import devices
from lib.record.locks import machine_folder
from lib.record.paths import DRIVER_VARIABLE, PROJECT_ROOT
from lib.record.redaction import home_folder
from lib.record.terminal import fail


def set_kernel_environment(offline: bool) -> None:
    """Set what the kernels inherit: no bars that flood a notebook, no telemetry, no network where it is forbidden."""
    ensure_home()
    # This project's modules also where the environment was made for another checkout: a forked kernel does not look
    # into its working directory.
    paths = [str(PROJECT_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ |= {
        DRIVER_VARIABLE: "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # The order of a set is the same in every kernel: a resumed run gives the numbers of an uninterrupted one.
        "PYTHONHASHSEED": "0",
    }
    # GPUs are numbered as nvidia-smi, which the locks go by, numbers them.
    os.environ.setdefault(devices.ORDER_VARIABLE, devices.BUS_ORDER)
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def ensure_home() -> None:
    """Give the libraries a folder where HOME is not set and the user has no account: many fail without one."""
    if not home_folder():
        folder = machine_folder()
        fail(f"HOME is not set and user {os.getuid()} has no account: libraries keep their files in {folder}")
        os.environ["HOME"] = str(folder)
