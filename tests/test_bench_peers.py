"""The benchmark against other engines: its table, and the line that says why one could not be run."""

import json
import sys
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))

import bench_peers as bench  # noqa: E402

ANSWER = "import sys\ndef answer(rows, limit):\n    return [f'{row} of {limit}' for row in rows]\n"
OTHER = "def answer(rows, limit):\n    return [f' {row} of {limit}' if row < 2 else 'else' for row in rows]\n"
JOB = {"rows": list(range(4)), "warm_up": [7], "max_new_tokens": 5, "num_threads": 1}


@pytest.fixture
def run(monkeypatch, capsys):
    """The benchmark on made-up peers; what it prints with --json."""

    def with_peers(*peers, argv=()):
        monkeypatch.setattr(bench, "PEERS", (bench.Peer("this engine", ANSWER, ["numpy"]), *peers))
        monkeypatch.setattr(bench, "make_job", lambda arguments: JOB)
        monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--dtype", "float32", "--json", *argv])
        bench.main()
        return json.loads(capsys.readouterr().out)

    return with_peers


def test_each_way_answers_the_same_rows_and_is_compared_with_ours(run):
    slow = bench.Peer("slow", OTHER, ["numpy"], is_slow=True)
    made = run(
        bench.Peer("other", OTHER, ["numpy", "scipy"], arithmetic="4 bits", note="4 bits"),
        slow,
        argv=["--slow-rows", "2"],
    )
    rows = {row["way"]: row for row in made["rows"]}
    assert {name: row["num_rows"] for name, row in rows.items()} == {"this engine": 4, "other": 4, "slow": 2}
    # Blanks at the ends are not compared: harnesses differ in them.
    assert {name: row["same_share"] for name, row in rows.items()} == {"this engine": 1, "other": 0.5, "slow": 1}
    assert rows["this engine"]["ratio"] == 1 and all(row["s_per_question"] > 0 for row in rows.values())
    assert rows["other"]["dtype"] == "4 bits" and "scipy 1." in rows["other"]["versions"]
    assert made["not_run"] == [] and made["machine"]["CPU"] and made["machine"]["capability"]


def test_a_ratio_stands_beside_what_is_aimed_at(run):
    way = "generate(), one by one"
    ((what, ratio, aim),) = run(bench.Peer(way, "time.sleep(0)\n" + ANSWER, ["numpy"]))["ratios"]
    assert (what, aim) == (f"engine against {way}, float32", 12) and ratio > 0


BROKEN = {
    "no environment": (bench.Peer("it", ANSWER, ["it"], ["it==1"]), [], "name a folder with --environments"),
    "error": (bench.Peer("it", "raise RuntimeError('no AVX')", ["numpy"]), [], "exit status 1: RuntimeError: no AVX"),
    "no such module": (bench.Peer("it", "import no_such_engine", ["numpy"]), [], "ModuleNotFoundError: No module"),
    "too slow": (bench.Peer("it", "time.sleep(60)", ["numpy"]), ["--timeout", "20"], "it took over 20 s (--timeout)"),
    "killed": (bench.Peer("it", "import os\nos.kill(os.getpid(), 9)", ["numpy"]), [], "exit status -9: no message"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_peer_that_cannot_be_run_is_a_line_and_the_others_go_on(run, case):
    peer, argv, why = BROKEN[case]
    made = run(peer, bench.Peer("last", ANSWER, ["numpy"]), argv=argv)
    assert [row["way"] for row in made["rows"]] == ["this engine", "last"]
    assert made["not_run"][0].startswith("it, float32, was not run: ") and why in made["not_run"][0]


def test_an_environment_is_made_once_and_made_again_for_other_packages(monkeypatch, tmp_path):
    commands, places = [], []
    monkeypatch.setattr(bench, "run", lambda command, folder, timeout: commands.append(command[1:]) or "")
    monkeypatch.setattr(
        bench.venv, "create", lambda folder, with_pip: (places.append(folder), folder.mkdir(exist_ok=True))
    )
    arguments = bench.argparse.Namespace(environments=tmp_path, timeout=5)
    for version in ("1", "1", "2"):
        peer = bench.Peer("it", ANSWER, ["lm-eval"], [f"it=={version}"])
        assert bench.python_of(peer, arguments) == tmp_path / "lm_eval" / "bin" / "python"
    assert places == [tmp_path / "lm_eval"] * 2
    assert [command[-1] for command in commands] == ["it==1", "it==2"]
    bench.python_of(bench.Peer("it", ANSWER, ["lm-eval"], ["it==3"], without=["extra"]), arguments)
    assert [command[2:] for command in commands[-2:]] == [
        ["install", "--quiet", "it==3"],
        ["uninstall", "--quiet", "--yes", "extra"],
    ]


def test_an_installation_that_fails_is_tried_again(monkeypatch, tmp_path):
    created = []
    monkeypatch.setattr(bench.venv, "create", lambda folder, with_pip: created.append(folder.mkdir(exist_ok=True)))
    arguments = bench.argparse.Namespace(environments=tmp_path, timeout=60)
    for _ in range(2):
        # The interpreter is not there.
        with pytest.raises(OSError, match="bin/python"):
            bench.python_of(bench.Peer("it", ANSWER, ["it"], ["it==1"]), arguments)
    assert len(created) == 2 and not (tmp_path / "it" / "installed.json").exists()
