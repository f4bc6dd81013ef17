"""The GPUs of this machine, one run on each, across all drivers of a user; the CPU cores of runs side by side.

A device is held by a lock in the temporary folder, and listed by ``nvidia-smi``: the driver never imports torch.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

from lib.record.locks import LOOK_AGAIN_S, FolderInUse, hold, machine_folder

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREADS_VARIABLE = "OMP_NUM_THREADS"
UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[\w/-]+)\)")


class DevicesInUse(Exception):
    """Other drivers hold every device; the message names one of them."""


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``, MIG devices for a split one; [] on a CPU."""
    named = os.environ.get(VISIBLE_VARIABLE)
    if named is None:
        return _listed_uuids()
    # CUDA uses the devices before the first invalid one; "-1" is common for no device.
    return list(takewhile(lambda name: name and name != "-1", (name.strip() for name in named.split(","))))


def _listed_uuids() -> list[str]:
    # A line for each GPU, then indented lines for its MIG devices.
    gpus = [UUID.findall(text) for text in re.split("^GPU ", nvidia_smi("-L"), flags=re.MULTILINE)]
    return [uuid for uuids in gpus for uuid in (uuids[1:] or uuids)]


def nvidia_smi(*arguments: str, timeout_s: float = 20) -> str:
    """What ``nvidia-smi`` prints; "" where the tool is missing, fails or does not answer."""
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@contextmanager
def held_gpus(
    gpus: Sequence[str], most: int, command: str, *, wait: bool = False, tell: Callable[[str], None] = print
) -> Iterator[list[str]]:
    """Hold one to ``most`` of ``gpus`` that no other driver of this user holds; DevicesInUse without ``wait``."""
    # Folder names of locks, the same for ``0`` and for the UUID of the first GPU.
    uuids = _listed_uuids() if any(name.isdigit() for name in gpus) else []
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
