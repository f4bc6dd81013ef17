"""Macs and machines without bitsandbytes, imitated: no such machine has run these tests."""

import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_model

from lib.driver import devices, kernel_server, run
from lib.driver.cli import UsageError, build_parser
from lib.driver.plan import make_plans
from lib.engine import attention, batch, generate, kernels, load, memory, picking, trial
from lib.params import ParamsError, load_params, preset_path
from lib.prepare import self_distillation
from lib.record.paths import PROJECT_ROOT
from lib.record.plain_files import limited_memory
from lib.train import memory_plan, packing, sft

DENSE = {"quantization": "none", "judge_quantization": "none"}
MPS = load.Runtime("mps", torch.float32, "test")
CPU = load.Runtime("cpu", torch.float32, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- device: mps ----------------------------------------------------------------------------------------------------


def test_a_mac_s_gpu_is_used_where_it_is_requested_and_never_by_itself(mac):
    assert load.resolve_runtime("auto").device == load.resolve_runtime("cpu").device == "cpu"
    runtime = load.resolve_runtime("mps")
    assert (runtime.device, runtime.dtype) == ("mps", torch.float32)
    assert "GPU of a Mac (requested), float32 (as exact as on a CPU; compute_dtype: float16" in runtime.reason
    assert load.resolve_runtime("mps", "float16").dtype == torch.float16
    with pytest.raises(load.ModelError, match=r"'bfloat16' on mps.*use auto or float16"):
        load.resolve_runtime("mps", "bfloat16")


def test_mps_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(load.ModelError, match="no GPU of a Mac here; use device: auto or cpu"):
        load.resolve_runtime("mps")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": "nf4"}, "quantization is 'nf4' and judge_quantization 'none'"),
        ({"judge_quantization": "nf4"}, "set quantization: none and judge_quantization: none"),
        ({"quantization": "nf4", "judge_quantization": "same"}, "4-bit weights are not supported there"),
        ({"compute_dtype": "bfloat16"}, "use auto or float16"),
        ({"optimizer": "adamw_8bit"}, "optimizer is 'adamw_8bit', which bitsandbytes has for CUDA and CPUs: use adamw"),
    ],
)
def test_what_mps_does_not_have_is_refused_in_the_preset(changes, words):
    with pytest.raises(ParamsError) as caught:
        load_params(preset_path("simple"), {"device": "mps"} | DENSE | changes)
    assert "1 fault(s)" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "float16"}, {"judge_quantization": "same"}])
def test_a_preset_for_a_mac_is_taken(changes):
    assert load_params(preset_path("simple"), {"device": "mps"} | DENSE | changes).device == "mps"


def test_four_bit_weights_are_refused_on_mps_before_anything_is_loaded(folder):
    for load_nf4 in (load.load_base, load.load_dense, load.load_judge):
        with pytest.raises(load.ModelError, match="'nf4', which is not supported on mps; set quantization: none"):
            load_nf4(folder, MPS, "nf4")
    with pytest.raises(load.ModelError, match="'adamw_8bit', which is not supported on mps; take adamw"):
        sft._check_optimizer("mps", "adamw_8bit")


def test_a_judge_that_does_not_fit_a_mac_is_not_advised_to_take_four_bits(folder, monkeypatch):
    monkeypatch.setattr(load, "free_memory_bytes", lambda device: 10)
    for runtime, advised in ((MPS, False), (CPU, True)):
        with pytest.raises(load.ModelError, match="does not fit") as caught:
            load.plan_judge(folder, runtime, "none")
        assert ("judge_quantization=nf4" in str(caught.value)) is advised


def test_every_limit_by_device_has_every_device():
    tables = [attention.NUM_QUERIES, batch.PREFILL_TOKENS, generate.MIN_PREFIX_TOKENS, generate.SCORED_ROWS]
    tables += [packing.LOSS_CHUNK_ELEMENTS, memory_plan.MOST_MICRO_BATCH_TOKENS, self_distillation.ROWS_PER_CALL]
    assert all(set(table) == set(load.DEVICES) for table in tables)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_on_mps_is_written_out(dtype):
    # The fused kernels are for CPUs and CUDA; asking for a compute capability would fail.
    states = SimpleNamespace(device=torch.device("mps"), dtype=dtype, shape=(2, 64))
    assert kernels.kernel_of(states) == "products"
    assert kernels.torch_attention(torch.device("mps")) == "sdpa" and not kernels.own_generators(torch.device("mps"))


class OnMps(torch.Tensor):
    """A tensor that says that it is on a Mac's GPU; what is computed with it stays so until ``cpu``."""

    device = torch.device("mps")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_tokens_are_drawn_without_a_float64_on_mps():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    shares = [0.1, 0.5, 0.999]
    drawn = picking.draw_tokens(logits.as_subclass(OnMps), shares, 0.7)
    assert drawn == picking.draw_tokens(logits, shares, 0.7)


def test_memory_on_mps(mac, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**30)
    memory.release_memory()
    assert emptied and load.peak_memory_gib("mps") == 3.0
    assert memory.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17.99 GB)"))


def test_a_run_on_mps_takes_no_nvidia_gpu(monkeypatch):
    monkeypatch.setattr(run, "visible_gpus", lambda: pytest.fail("looked for GPUs"))
    settings = ["device=mps", "quantization=none", "judge_quantization=none"]
    args = build_parser().parse_args(["--presets", "simple", "--set", *settings])
    with run.places(args, make_plans(args)) as found:
        assert found == [{}]


# --- machines without bitsandbytes ----------------------------------------------------------------------------------

ALL_MODULES = """
import sys, torch
sys.modules["bitsandbytes"] = None
from pathlib import Path
import importlib
for path in sorted(Path("lib").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from lib.engine import load
load.load_dense(sys.argv[1], load.Runtime("cpu", torch.float32, "test"), "none")
"""


def test_every_module_loads_and_plain_weights_too_without_bitsandbytes(folder):
    done = subprocess.run([sys.executable, "-c", ALL_MODULES, folder], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (None, "cannot be imported here"),
        (SimpleNamespace(__version__="0.42.0"), "bitsandbytes 0.42.0 has no backend for cpu"),
        (SimpleNamespace(__version__="9.9", supported_torch_devices={"cuda"}), "9.9 has no backend for cpu"),
    ],
)
def test_without_its_library_nf4_is_refused_with_the_word_to_set(folder, monkeypatch, library, words):
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    for load_nf4 in (load.load_base, load.load_dense):
        with pytest.raises(load.ModelError, match=f"quantization is 'nf4' but .*{words}.*set quantization: none and"):
            load_nf4(folder, CPU, "nf4")
    with pytest.raises(load.ModelError, match=f"judge_quantization is 'nf4' but .*{words}"):
        load.plan_judge(folder, CPU, "nf4")
    with pytest.raises(load.ModelError, match=f"'adamw_8bit' but .*{words}.*take adamw"):
        sft._check_optimizer("cpu", "adamw_8bit")
    load.load_dense(folder, CPU, "none")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (
            ["judge_quantization=none"],
            "quantization is 'nf4', but bitsandbytes is not installed; --set quantization=none",
        ),
        (["judge_quantization=nf4"], "--set quantization=none judge_quantization=none"),
        (["quantization=none", "optimizer=adamw_8bit"], "--set optimizer=adamw"),
        (["quantization=none", "judge_quantization=same"], ""),
        (["quantization=none"], ""),
    ],
)
def test_the_driver_refuses_what_needs_a_package_that_is_missing(monkeypatch, settings, remedy):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    args = ["--presets", "simple", "--set", *settings]
    if remedy:
        with pytest.raises(UsageError, match=re.escape(remedy) + "$"):
            make_plans(build_parser().parse_args(args))
    else:
        make_plans(build_parser().parse_args(args))
    # A comparison loads no weights.
    make_plans(build_parser().parse_args([*args, "--stages", "05"]))


def test_the_server_of_kernels_preloads_what_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(kernel_server, "PRELOADED", ("bitsandbytes", "json"))
    monkeypatch.setattr(kernel_server.gc, "freeze", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" not in kernel_server.preload()


# --- what only Linux has --------------------------------------------------------------------------------------------


@pytest.fixture
def no_statm(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "STATM", tmp_path / "absent")


def test_without_proc_a_trial_still_runs_and_still_ends(no_statm, tmp_path):
    ran = tmp_path / "ran"
    trial.within(5, ran.touch)
    assert ran.exists()
    with pytest.raises(trial.TrialError, match="takes over 1 s"):
        trial.within(1, re.fullmatch, "(([a-z0-9_.])+)+!", "a" * 60)


def test_a_limit_that_the_system_does_not_set_leaves_the_trial_as_it_is(monkeypatch, tmp_path):
    def refuse(kind, limits):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    ran = tmp_path / "ran"
    trial.within(5, ran.touch)
    assert ran.exists()


def test_a_trial_under_a_lower_limit_of_the_shell_runs(tmp_path):
    code = "import resource, sys; from pathlib import Path; from lib.engine import trial\n"
    code += "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
    code += "trial.within(100, lambda: Path(sys.argv[1]).write_text(str(resource.getrlimit(resource.RLIMIT_CPU))))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "ran"], cwd=PROJECT_ROOT, check=True)
    assert (tmp_path / "ran").read_text() == "(60, 60)"


def test_a_peak_is_in_bytes_on_a_mac(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=2**30)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert load.peak_memory_gib("cpu") == 1024.0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert load.peak_memory_gib("cpu") == 1.0


def test_the_driver_calls_nothing_of_linux_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("pidfd_open", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(kernel_server.ctypes, "CDLL", lambda *_, **__: pytest.fail("prctl"))
    assert kernel_server.die_with(os.getpid()) is None
    monkeypatch.setattr(kernel_server, "_server", None)
    kernel_server.start()
    assert kernel_server._server is None and kernel_server.fork_kernel([], "", {}, "") == 0
    monkeypatch.delenv(devices.THREADS_VARIABLE, raising=False)
    assert devices.cpu_shares(2) == {devices.THREADS_VARIABLE: str(max(1, os.cpu_count() // 2))}
    assert devices.slow_cpu_note(tmp_path / "cpuinfo") == ""


def test_files_are_read_where_psutil_does_not_say_how_much_is_held(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=1))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(10**6):
        assert len(bytes(10**7)) == 10**7
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
