"""Which GPUs there are and which of them a run gets: one run holds one device, whoever of a user's drivers started it.

A device is held by a lock in the machine's temporary folder that goes with its holder. The GPU driver's own tool is
asked, never torch: the driver of the notebooks must not import it.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

from lib.record.locks import LOOK_AGAIN_S, FolderInUse, hold, machine_folder

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREADS_VARIABLE = "OMP_NUM_THREADS"
TOOL_TIMEOUT_S = 20
UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[\w/-]+)\)")


class DevicesInUse(Exception):
    """Other drivers hold every device; the text names one of them."""


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them; none on a CPU machine.

    What the variable names where it is set, else the UUID of each GPU that the tool ``nvidia-smi`` lists; of a GPU that
    is cut into MIG devices, those.
    """
    named = os.environ.get(VISIBLE_VARIABLE)
    if named is None:
        return _listed_uuids()
    # CUDA sees the devices before the first that is not one, and "-1" is how people say none.
    return list(takewhile(lambda name: name and name != "-1", (name.strip() for name in named.split(","))))


def _listed_uuids() -> list[str]:
    listing = _ask_tool()
    gpus: list[list[str]] = []
    for uuid in UUID.findall(listing):
        if uuid.startswith("GPU"):
            gpus.append([])
        (gpus or [[]])[-1].append(uuid)
    return [uuid for parts in gpus for uuid in (parts[1:] or parts)]


def _ask_tool() -> str:
    """What ``nvidia-smi -L`` lists; "" where there is no such tool or it does not work."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    try:
        return subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@contextmanager
def held_gpus(
    gpus: Sequence[str], most: int, command: str, *, wait: bool = False, tell: Callable[[str], None] = print
) -> Iterator[list[str]]:
    """Hold up to ``most`` of ``gpus`` that no other driver of this user holds, at least one.

    Args:
        command: what was typed; shown to whoever comes second.
        wait: where all are held, wait for whichever is free first.

    Raises:
        DevicesInUse: all are held, and ``wait`` is false.
    """
    identities = dict(zip(gpus, _identities(gpus), strict=True))
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
    """Hold up to ``most`` that nobody holds, until ``stack`` ends; also a sentence about who holds the first other."""
    free, refused = [], ""
    for gpu, identity in identities.items():
        if len(free) == most:
            break
        try:
            stack.enter_context(hold(machine_folder() / identity, command, tell=tell))
            free.append(gpu)
        except FolderInUse as error:
            refused = refused or str(error)
    return free, refused


def _identities(gpus: Sequence[str]) -> list[str]:
    """Folder names that are the same for ``0`` and for the UUID of the first GPU."""
    uuids = _listed_uuids() if any(name.isdigit() for name in gpus) else []
    known = {str(index): uuid for index, uuid in enumerate(uuids)}
    return [re.sub(r"[^\w-]", "_", known.get(name, name)) for name in gpus]


def slow_cpu_note(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """What to expect of a CPU without bfloat16 units; "" where it has them, or the system does not say."""
    flags = re.search(r"^flags\s*:(.*)", cpu_info.read_text(), re.MULTILINE) if cpu_info.exists() else None
    if flags is None or {"avx512_bf16", "amx_bf16"} & set(flags[1].split()):
        return ""
    return "this CPU has no bfloat16 units: it computes in float32, and takes 2 to 4 times as long as one that has them"


def cpu_shares(num_jobs: int) -> dict[str, str]:
    """What the environment of each of ``num_jobs`` runs on this CPU needs, so that they do not fight for its cores.

    A thread pool as large as the machine in each of several processes makes all of them many times slower.
    """
    if num_jobs == 1 or THREADS_VARIABLE in os.environ:
        return {}
    # Of these a job scheduler may leave fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {THREADS_VARIABLE: str(max(1, cores // num_jobs))}
