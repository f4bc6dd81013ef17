"""The GPUs that ``nvidia-smi`` lists: the driver never imports torch, and torch may be unable to use them."""

import os
import re
import subprocess
import sys
from itertools import takewhile

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[\w/-]+)\)")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``, MIG devices for a split one; [] on a CPU."""
    named = os.environ.get(VISIBLE_VARIABLE)
    if named is None:
        return listed_uuids()
    # CUDA uses the devices before the first invalid one; "-1" is common for no device.
    return list(takewhile(lambda name: name and name != "-1", (name.strip() for name in named.split(","))))


def gpu_in_use() -> str:
    """The kind of GPU that torch computes on in this process; "" where it was not imported or uses none."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_initialized() else ""


def listed_uuids() -> list[str]:
    """Those of all GPUs, in the order of their numbers."""
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
