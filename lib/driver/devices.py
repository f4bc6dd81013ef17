"""The GPUs of this machine, one run on each, across all drivers of a user; the CPU cores of runs side by side.

A device is held by a lock in the temporary folder, and listed by ``nvidia-smi``: the driver never imports torch.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.record.gpus import listed_uuids
from lib.record.locks import LOOK_AGAIN_S, FolderInUse, hold, machine_folder

THREADS_VARIABLE = "OMP_NUM_THREADS"
ORDER_VARIABLE, BUS_ORDER = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"


class DevicesInUse(Exception):
    """Other drivers hold every device; the message names one of them."""


@contextmanager
def held_gpus(
    gpus: Sequence[str], most: int, command: str, *, wait: bool = False, tell: Callable[[str], None] = print
) -> Iterator[list[str]]:
    """Hold one to ``most`` of ``gpus`` that no other driver of this user holds; DevicesInUse without ``wait``."""
    # Folder names of locks, the same for ``0`` and for the UUID of the first GPU; CUDA counts as nvidia-smi does only
    # in this order, which ``run_all.py`` sets where a person has not.
    by_bus = os.environ.get(ORDER_VARIABLE, BUS_ORDER) == BUS_ORDER
    uuids = listed_uuids() if by_bus and any(name.isdigit() for name in gpus) else []
    known = {str(index): uuid for index, uuid in enumerate(uuids)}
    identities = {gpu: re.sub(r"[^\w-]", "_", known.get(gpu, gpu)) for gpu in gpus}
    with ExitStack() as stack:
        free, refused = _take_free(stack, identities, most, command, tell)
        if not free and not wait:
            raise DevicesInUse(f"no GPU is free: {refused}")
        if not free:
            tell(f"waiting: {refused}")
        while not free:
            time.sleep(LOOK_AGAIN_S)
            free, _ = _take_free(stack, identities, most, command, tell)
        yield free


def _take_free(
    stack: ExitStack, identities: Mapping[str, str], most: int, command: str, tell: Callable[[str], None]
) -> tuple[list[str], str]:
    """Hold up to ``most`` free GPUs until ``stack`` ends; also a sentence on who holds the first other one."""
    free, refused = [], ""
    for gpu, identity in identities.items():
        try:
            if len(free) < most:
                stack.enter_context(hold(machine_folder() / identity, command, tell=tell))
                free.append(gpu)
        except FolderInUse as error:
            refused = refused or str(error)
    return free, refused


def slow_cpu_note(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """A note on the speed of a CPU without bfloat16 units; "" if it has them or that is unknown."""
    flags = re.search(r"^flags\s*:(.*)", cpu_info.read_text(), re.MULTILINE) if cpu_info.exists() else None
    if flags is None or {"avx512_bf16", "amx_bf16"} & set(flags[1].split()):
        return ""
    return "this CPU has no bfloat16 units: it computes in float32, and takes 2 to 4 times as long as one that has them"


def cpu_shares(num_jobs: int) -> dict[str, str]:
    """Variables that share the cores among runs: thread pools as large as the machine make all many times slower."""
    if num_jobs == 1 or THREADS_VARIABLE in os.environ:
        return {}
    # A job scheduler may allow fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {THREADS_VARIABLE: str(max(1, cores // num_jobs))}
