"""The two lists of pins are one, conda's environment.yml and pip's requirements.txt, and make setup's Python."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from lib.record.paths import PROJECT_ROOT

REQUIREMENTS = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8")
ENVIRONMENT = (PROJECT_ROOT / "environment.yml").read_text(encoding="utf-8")


def test_both_files_pin_the_same_versions_in_the_same_order():
    pins = [line for line in REQUIREMENTS.splitlines() if line and not line.startswith("#")]
    (pip,) = (entry["pip"] for entry in yaml.safe_load(ENVIRONMENT)["dependencies"] if isinstance(entry, dict))
    assert pip == pins
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", pin) for pin in pins)


def test_each_pin_has_its_reason():
    lines = [line for line in ENVIRONMENT.splitlines() if "==" in line and not line.startswith("#")]
    assert lines and all(re.search(r"==\S+\s+# \w", line) for line in lines)


# An interpreter of a chosen version, as far as the Makefile looks at one: it says its version, makes an environment of
# its kind, and installs unless there is a file `no-network`.
INTERPRETER = """#!/bin/sh
echo "{version} $*" >> calls
case "$*" in
  -c*) echo {version} ;;
  *--clear*) cp "$0" made && rm -rf .venv/* && mkdir -p .venv/bin && mv made .venv/bin/python ;;
  *pip*) test ! -e no-network ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the Makefile, and in `pythons` interpreters of several versions."""
    shutil.copy(PROJECT_ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "pyproject.toml").write_text('requires-python = ">=3.11"\n')
    for name, version in {
        "python3": "3.11.2",
        "python3.10": "3.10.12",
        "python3.9": "3.9.18",
        "new py": "3.12.1",
    }.items():
        path = tmp_path / "pythons" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(INTERPRETER.format(version=version))
        path.chmod(0o755)
    (tmp_path / "pythons" / "broken").symlink_to("nowhere")
    return tmp_path


def setup(project, *arguments):
    """`make setup` there; returns what was run of the interpreters beside questions for their version, and the rest."""
    (project / "calls").write_text("")
    environment = {"PATH": f"{project / 'pythons'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "setup", *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    calls = [line for line in (project / "calls").read_text().splitlines() if " -c" not in line]
    return done, calls


def version_there(project):
    found = re.search(r'echo "(\S+)', (project / ".venv/bin/python").read_text())
    return found[1]


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


@needs_make
@pytest.mark.parametrize(
    ("python", "found"),
    [
        ("python3.10", "3.10.12"),
        ("python3.9", "3.9.18"),
        ("python3.99", "not found"),
        ("broken", "not found"),
        ("/", "not"),
    ],
)
def test_an_interpreter_that_is_too_old_or_missing_is_refused_in_a_line_before_anything_is_made(project, python, found):
    done, calls = setup(project, f"PYTHON={python}")
    (line,) = done.stderr.splitlines()
    assert f"Python 3.11 or later is needed, and {python} is {found}" in line and "PYTHON=python3.11" in line
    assert (done.returncode, calls, (project / ".venv").exists()) == (2, [], False)


@needs_make
def test_the_environment_is_made_once_and_again_for_another_version(project):
    assert setup(project)[1][0] == "3.11.2 -m venv --clear .venv"
    assert setup(project)[1] == []
    assert setup(project, "PYTHON=new py")[1][0] == "3.12.1 -m venv --clear .venv"
    # Without PYTHON the environment that is ready is meant, whatever python3 is.
    assert setup(project)[1] == [] and version_there(project) == "3.12.1"
    assert setup(project, "PYTHON=python3.10")[0].returncode == 2 and version_there(project) == "3.12.1"
    assert setup(project, "PYTHON=python3")[1][0] == "3.11.2 -m venv --clear .venv"


@needs_make
def test_changed_pins_are_installed_into_the_environment_that_is_there(project):
    setup(project)
    changed = (project / ".venv/ready").stat().st_mtime + 1
    os.utime(project / "requirements.txt", (changed, changed))
    assert setup(project)[1][:2] == ["3.11.2 -m venv .venv", "3.11.2 -m pip install --quiet -r requirements.txt"]


@needs_make
def test_a_submission_is_one_command_on_a_clean_clone(project):
    done, calls = setup(project, "submission")
    assert (done.returncode, calls[0], calls[-1]) == (
        0,
        "3.11.2 -m venv --clear .venv",
        "3.11.2 run_all.py --submission",
    )


@needs_make
def test_a_half_made_environment_is_made_again(project):
    (project / "no-network").touch()
    assert setup(project)[0].returncode == 2 and not (project / ".venv/ready").exists()
    (project / "no-network").unlink()
    assert setup(project)[1][0] == "3.11.2 -m venv --clear .venv"
    assert sorted(path.name for path in (project / ".venv").iterdir()) == ["bin", "ready"]


@needs_make
@pytest.mark.parametrize("left", ["of an old version", "without its interpreter", "empty"])
def test_what_an_earlier_attempt_left_is_made_again(project, left):
    (project / ".venv/bin").mkdir(parents=True)
    if left == "of an old version":
        shutil.copy(project / "pythons/python3.10", project / ".venv/bin/python")
    if left == "without its interpreter":
        (project / ".venv/bin/python").symlink_to("/nowhere/python3.11")
        (project / ".venv/ready").touch()
    assert setup(project)[1][0] == "3.11.2 -m venv --clear .venv"
    assert version_there(project) == "3.11.2"


def test_the_makefile_reads_the_version_that_the_project_needs():
    assert re.search(r'^requires-python = ">=[\d.]+"', (PROJECT_ROOT / "pyproject.toml").read_text(), re.MULTILINE)
