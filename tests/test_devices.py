"""Which GPUs a run gets, with a fake nvidia-smi."""

import os
import subprocess
import sys

import pytest

from lib.driver import devices, environment, run
from lib.driver.cli import UsageError, build_parser
from lib.driver.plan import make_plans
from lib.record import gpus, locks
from lib.record.paths import PROJECT_ROOT

TWO_GPUS = "GPU 0: Some T4 (UUID: GPU-aaaa-1)\nGPU 1: Some T4 (UUID: GPU-bbbb-2)\n"
CUT_GPU = (
    "GPU 0: Big (UUID: GPU-aaaa-1)\n"
    "  MIG 3g.40gb Device 0: (UUID: MIG-11)\n"
    "  MIG 3g.40gb Device 1: (UUID: MIG-22)\n"
    "GPU 1: Big (UUID: GPU-bbbb-2)\n"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes this a machine whose nvidia-smi lists what it is given, with its own locks."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(gpus.VISIBLE_VARIABLE, raising=False)
    (tmp_path / "bin").mkdir()

    def listing(text, status=0):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {status}\n")
        tool.chmod(0o755)

    return listing


def held(most, **more):
    return devices.held_gpus(gpus.visible_gpus(), most, "python run_all.py --presets simple", **more)


@pytest.mark.parametrize(
    ("listing", "named", "expected"),
    [
        (TWO_GPUS, None, ["GPU-aaaa-1", "GPU-bbbb-2"]),
        (CUT_GPU, None, ["MIG-11", "MIG-22", "GPU-bbbb-2"]),
        (TWO_GPUS, "1", ["1"]),
        (TWO_GPUS, " 1, 0", ["1", "0"]),
        (TWO_GPUS, "0,-1,1", ["0"]),
        (TWO_GPUS, "", []),
        (TWO_GPUS, "-1", []),
        ("No devices were found\n", None, []),
    ],
)
def test_gpus_are_those_that_cuda_would_see(machine, monkeypatch, listing, named, expected):
    machine(listing)
    if named is not None:
        monkeypatch.setenv(gpus.VISIBLE_VARIABLE, named)
    assert gpus.visible_gpus() == expected


def test_a_tool_that_fails_or_is_not_there_means_no_gpu(machine, monkeypatch, tmp_path):
    machine(TWO_GPUS, status=9)
    assert gpus.visible_gpus() == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpus.visible_gpus() == []


def test_a_device_is_held_by_one_driver_alone(machine):
    machine(TWO_GPUS)
    with held(1) as first, held(5) as second:
        assert (first, second) == (["GPU-aaaa-1"], ["GPU-bbbb-2"])
        with pytest.raises(devices.DevicesInUse, match=r"no GPU is free: GPU-aaaa-1/ is in use by process"), held(1):
            pass
    with held(2) as both:
        assert both == ["GPU-aaaa-1", "GPU-bbbb-2"]


def test_a_number_and_its_uuid_are_one_device(machine, monkeypatch):
    machine(TWO_GPUS)
    with held(1) as first:
        monkeypatch.setenv(gpus.VISIBLE_VARIABLE, "0,1")
        with held(2) as second:
            assert (first, second) == (["GPU-aaaa-1"], ["1"])


@pytest.mark.parametrize(
    ("order", "identity"), [(None, "GPU-aaaa-1"), ("PCI_BUS_ID", "GPU-aaaa-1"), ("FASTEST_FIRST", "0")]
)
def test_a_number_is_that_of_nvidia_smi_only_in_the_order_of_the_bus(machine, monkeypatch, tmp_path, order, identity):
    machine(TWO_GPUS)
    monkeypatch.setenv(gpus.VISIBLE_VARIABLE, "0")
    monkeypatch.delenv(devices.ORDER_VARIABLE, raising=False)
    if order:
        monkeypatch.setenv(devices.ORDER_VARIABLE, order)
    with held(1):
        assert identity in [path.name for path in locks.machine_folder().iterdir() if path.is_dir()]


@pytest.mark.parametrize(("order", "kept"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_kernels_number_gpus_as_nvidia_smi_does_unless_a_person_says_otherwise(monkeypatch, order, kept):
    monkeypatch.delenv(devices.ORDER_VARIABLE, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ) | ({devices.ORDER_VARIABLE: order} if order else {}))
    environment.set_kernel_environment(offline=False)
    assert os.environ[devices.ORDER_VARIABLE] == kept


def test_a_killed_holder_frees_its_device_and_waiting_works(machine, monkeypatch, tmp_path):
    machine(TWO_GPUS)
    code = (
        "import sys; from lib.driver import devices\n"
        "with devices.held_gpus(['GPU-aaaa-1'], 1, 'other'): print('held', flush=True); sys.stdin.readline()"
    )

    def hold_elsewhere():
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command, pipes = [sys.executable, "-c", code], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, text=True, **pipes)
        assert process.stdout.readline() == "held\n"
        return process

    monkeypatch.setenv(gpus.VISIBLE_VARIABLE, "GPU-aaaa-1")
    killed = hold_elsewhere()
    killed.kill()
    killed.wait()
    with held(1) as free:
        assert free == ["GPU-aaaa-1"]
    other, printed = hold_elsewhere(), []

    def tell(text):
        printed.append(text)
        other.stdin.write("\n")
        other.stdin.flush()

    with held(1, wait=True, tell=tell) as free:
        assert free == ["GPU-aaaa-1"] and other.wait(timeout=60) == 0
    assert len(printed) == 1 and printed[0].startswith("waiting: GPU-aaaa-1/ is in use by process")


def test_whichever_gpu_is_free_first_is_taken(monkeypatch, tmp_path):
    code = (
        "import sys; from lib.driver import devices\n"
        "with devices.held_gpus([sys.argv[1]], 1, 'other'): print('held', flush=True); sys.stdin.readline()"
    )
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    environment, pipes = {**os.environ, "TMPDIR": str(tmp_path)}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holders = {}
    for gpu in ("GPU-aaaa-1", "GPU-bbbb-2"):
        command = [sys.executable, "-c", code, gpu]
        holders[gpu] = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, text=True, **pipes)
        assert holders[gpu].stdout.readline() == "held\n"
    printed = []

    def tell(line):
        printed.append(line)
        holders["GPU-bbbb-2"].stdin.write("\n")
        holders["GPU-bbbb-2"].stdin.flush()

    with devices.held_gpus([*holders], 1, "next", wait=True, tell=tell) as free:
        assert free == ["GPU-bbbb-2"]
    assert len(printed) == 1 and printed[0].startswith("waiting: GPU-aaaa-1/ is in use by process")
    for holder in holders.values():
        holder.communicate("\n", timeout=60)


def test_cores_are_shared_unless_somebody_said_how(monkeypatch):
    monkeypatch.delenv(devices.THREADS_VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert devices.cpu_shares(1) == {}
    assert devices.cpu_shares(3) == {"OMP_NUM_THREADS": "2"} and devices.cpu_shares(9) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv(devices.THREADS_VARIABLE, "5")
    assert devices.cpu_shares(3) == {}


# --- the driver's places ------------------------------------------------------------------------------------------


def places(*argv):
    args = build_parser().parse_args(["--presets", "simple", "medium", "strong", *argv])
    with run.places(args, make_plans(args)) as found:
        return found


def test_presets_at_once_get_a_gpu_each_and_no_more_are_started(machine, capsys):
    machine(TWO_GPUS)
    assert places("--jobs", "2") == [{"CUDA_VISIBLE_DEVICES": uuid} for uuid in ("GPU-aaaa-1", "GPU-bbbb-2")]
    assert capsys.readouterr().err == ""
    assert len(places("--jobs", "3")) == 2
    assert "--jobs 3: 2 at once, a GPU for each; 2 can be seen" in capsys.readouterr().err


def test_one_preset_after_the_other_holds_one_gpu(machine):
    machine(TWO_GPUS)
    with held(1):
        assert places() == [{"CUDA_VISIBLE_DEVICES": "GPU-bbbb-2"}]
        with held(1), pytest.raises(UsageError, match="--set device=cpu needs none"):
            places()
        assert places("--stages", "05") == [{}], "a comparison computes nothing"


def test_the_only_gpu_is_held_and_left_to_its_default(machine):
    machine(TWO_GPUS.splitlines()[0] + "\n")
    assert places("--jobs", "3") == [{}]
    with held(1), pytest.raises(UsageError, match="no GPU is free"):
        places()


def test_on_a_cpu_the_cores_are_shared(machine, monkeypatch):
    machine(TWO_GPUS)
    monkeypatch.delenv(devices.THREADS_VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert places("--jobs", "2", "--set", "device=cpu") == [{"OMP_NUM_THREADS": "4"}] * 2
    places_of_nine = places("--jobs", "9", "--set", "device=cpu")
    assert len(places_of_nine) == 7, "three trainings, and the untuned rows of two protocols in each of 03 and 04"


@pytest.mark.parametrize(
    ("cpu_info", "slow"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n", False),
        ("flags\t\t: amx_bf16\n", False),
        # An ARM processor lists "Features", and macOS has no such file: nothing is known, nothing is claimed.
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_a_cpu_without_bfloat16_units_is_named_in_a_line(tmp_path, cpu_info, slow):
    file = tmp_path / "cpuinfo"
    if cpu_info is not None:
        file.write_text(cpu_info)
    note = devices.slow_cpu_note(file)
    assert ("no bfloat16 units" in note) == slow and "\n" not in note
