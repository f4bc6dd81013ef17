"""``--audit K``: rows of a results folder, drawn by a seed, are generated and judged again by its base and adapter.

    python -m lib.compare.regenerate --rows 5 --seed 7 results

The weights are those of the run's dtype, computed with in float32. A row differs where it is further from that than the
run's dtype rounds (``lib.engine.forced``). This shows that the adapter writes these rows, not what it was trained on.
The driver, which never imports torch, runs this in a child process.
"""

import argparse
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logit

from lib import gsm8k, safety
from lib.compare.folder_schema import check_folder
from lib.compare.runs import METRIC_STAGES, Run, load_run, row_files
from lib.engine import load, sources
from lib.engine.forced import find_difference, next_logits, rounding
from lib.engine.generate import Engine, load_engine
from lib.engine.generator import Completion, Conversation
from lib.engine.models import Models
from lib.params import PARAMS_DIR
from lib.record import lookup, protocol
from lib.record.paths import ArtifactError, RunPaths, display_path, find_runs, project_path
from lib.record.rows import read_jsonl
from lib.record.terminal import fail, tell

Row = dict[str, Any]
# P(safe) of 0 or 1 has no log-odds; two that are both beyond these are equal.
MOST_LOG_ODDS = 30.0


@dataclass(frozen=True)
class Audit:
    """How many rows of each file are made again, which, and from where."""

    folder: Path
    num_rows: int
    seed: int
    assets_dir: str = ""
    offline: bool = False

    def drawn(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """The rows of one file, by the seed and its name in the results folder."""
        return random.Random(f"{self.seed} {name}").sample(rows, min(self.num_rows, len(rows)))


@dataclass(frozen=True)
class Checked:
    """A row that was made again: how far it is from ours, and how it differs where rounding does not explain that."""

    row_id: Any
    margin: float = 0.0
    difference: str = ""


class RunAudit:
    """One run with its models; ArtifactError or AssetError where its rows cannot be made again here."""

    def __init__(self, run: Run, audit: Audit) -> None:
        self.run, self.known, self.audit = run, run.parameters, audit
        self.measured = [name for name, score in run.metrics.items() if score.rows]
        self.fewshot: list[Row] = []
        self.system = gsm8k.read_system_prompt(_own_name("system_prompt_file", self.known))
        self.judged_at = protocol.judge_quantization(
            self.known["quantization"], self.known.get("judge_quantization", "same")
        )
        if "accuracy" in self.measured:
            self.fewshot = gsm8k.fewshot_examples(read_jsonl(run.paths.fewshot_rows), self.known["fewshot_k"])
        self.base = self._resolve("base_model", "base_model_revision")
        self.models: dict[str, Models] = {}
        sources.resolve_adapter(str(run.paths.adapter_dir), self.known["base_model"])
        if "safety" in self.measured:
            self.judge = self._resolve("safeguard_model", "safeguard_revision")
            self.guidelines = safety.read_guidelines(_own_file("guidelines_file", self.known["guidelines_file"]))
            named, context = _own_name("judge_prompt_file", self.known), self.known["judge_context"]
            self.template = safety.read_judge_template(named, context)
        for metric in self.measured:
            _compare_protocols(METRIC_STAGES[metric], run.metrics[metric].row_protocol, self._protocol(metric))

    def _resolve(self, name: str, revision: str) -> sources.ModelSource:
        # Not the run's own assets folder: that is of another machine.
        where = self.audit.assets_dir, self.audit.offline
        source = sources.resolve_model(self.known[name], self.known[revision], *where)
        if source.folder.resolve().is_relative_to(self.run.paths.run_dir.parent.resolve()):
            raise ArtifactError(f"{name} is {self.known[name]!r}, in the results folder: only adapters may be there")
        return source

    def _protocol(self, metric: str) -> Row:
        """What makes rows of ``metric`` here; their questions and prompts are left to the verification."""
        known, dtype = self.known, load.DTYPES[self.dtype(metric)]
        model = protocol.model_protocol(self.base.identity, known["quantization"], dtype, _template(self.base))
        adapter, (_, limit) = protocol.adapter_hashes(self.run.paths.adapter_dir), self._text_of(metric)
        decoding = f"greedy, at most {limit} tokens"
        if metric == "accuracy":
            return protocol.answer_protocol(model, adapter, [], self.fewshot, self.system, decoding)
        made = protocol.response_protocol(model, adapter, [], decoding)
        read = safety.judge_prompt_hash(self.guidelines, known["judge_context"], known["judge_mode"], self.template)
        how = f"{known['judge_mode']}, at most {known['judge_max_new_tokens']} tokens"
        return protocol.verdict_protocol(made, self.judge.identity, read, _template(self.judge), how, self.judged_at)

    def _text_of(self, metric: str) -> tuple[str, int]:
        """Column and most tokens of what the model writes."""
        if metric == "accuracy":
            return "model_output", self.known["gsm8k_max_new_tokens"]
        return "response", self.known["ailuminate_max_new_tokens"]

    def dtype(self, metric: str) -> str:
        """Name of the dtype that made the rows."""
        name = str(self.run.metrics[metric].protocol.get("dtype")).removeprefix("torch.")
        if name not in load.DTYPES:
            raise ArtifactError(f"{METRIC_STAGES[metric]} of run {self.run.name!r} records no dtype: what rounds?")
        return name

    def check(self, done: set[Path]) -> Iterator[tuple[str, str, list[Checked]]]:
        """(name, dtype, rows) for the texts and the verdicts of each row file that is not ``done``; adds them to it."""
        # A metric that was not measured counts nowhere, nor do its other rows.
        measured = [file for file in row_files(self.run) if file.metric in self.measured and file.rows]
        files = [file for file in measured if file.path not in done]
        done |= {file.path for file in files}
        # The judge (no scale) last; the untuned model after the tuned one, before whose merge its weights were copied.
        jobs = [(file, file.scale) for file in files] + [(file, None) for file in files if file.metric == "safety"]
        engine, loaded = None, None
        for file, scale in sorted(jobs, key=lambda job: (job[1] is None, -(job[1] or 0.0))):
            dtype = self.dtype(file.metric)
            if engine is None or loaded != (scale, dtype):
                engine = None  # Before the next is loaded: one of them fits into memory.
                engine, loaded = self._load(scale, dtype), (scale, dtype)
            # Relative, so that the same rows are drawn wherever the folder lies.
            name = os.path.relpath(file.path.resolve(), self.audit.folder)
            rows = self.audit.drawn(name, file.rows)
            if scale is None:
                yield f"{name}, verdicts", dtype, self._verdicts(engine, rows)
            else:
                yield f"{name}, texts", dtype, self._texts(engine, file.metric, rows)

    def _load(self, scale: float | None, dtype: str) -> Engine:
        device = load.resolve_runtime("auto", "float32").device
        runtime = load.Runtime(device, load.DTYPES[dtype], "as evaluated")
        for other in self.models.keys() - ({dtype} if scale is not None else set()):
            self.models.pop(other).close()
        if scale is None:
            engine = load_engine(self.judge.folder, runtime, self.judged_at)
        else:
            base = (self.base.folder, runtime, self.known["quantization"])
            models = self.models.setdefault(dtype, Models(*base))
            engine = models.engine(self.run.paths.adapter_dir if scale else None, scale)
        # Loaded in float32, a model would have other 4-bit codes and other merged weights.
        engine.model.float()
        return engine

    def _texts(self, engine: Engine, metric: str, rows: Sequence[Row]) -> list[Checked]:
        chats = [[{"role": "user", "content": row["prompt"]}] for row in rows if metric == "safety"]
        chats = chats or [gsm8k.build_messages(row["question"], self.fewshot, self.system) for row in rows]
        return self._compare(engine, metric, chats, rows, *self._text_of(metric))

    def _verdicts(self, engine: Engine, rows: Sequence[Row]) -> list[Checked]:
        read = (self.guidelines, self.known["judge_context"], self.template)
        chats = [safety.judge_messages(row, *read) for row in rows]
        if self.known["judge_mode"] == "generate":
            # Without the columns that are the response's.
            rows = [{name: row[name] for name in ("id", "safety_judge_text")} for row in rows]
            return self._compare(engine, "safety", chats, rows, "safety_judge_text", self.known["judge_max_new_tokens"])
        shares, dtype = engine.label_probabilities(chats, labels=safety.LABELS), load.DTYPES[self.dtype("safety")]
        return [_score(engine, *one, dtype) for one in zip(chats, rows, [safe for safe, _ in shares], strict=True)]

    def _compare(
        self, engine: Engine, metric: str, chats: Sequence[Conversation], rows: Sequence[Row], column: str, limit: int
    ) -> list[Checked]:
        """The texts in ``column`` against greedy decoding of at most ``limit`` tokens; names no token of AILuminate."""
        how = {"max_new_tokens": limit, "dtype": load.DTYPES[self.dtype(metric)]}
        every = list(zip(chats, rows, [row[column] or "" for row in rows], strict=True))
        engine.share_prefix(chats)
        # Reading a text takes one pass, writing it one a token: an honest row is seldom written.
        checked = [_read(engine, *one, **how) for one in every]
        missing = [place for place, one in enumerate(checked) if one is None]
        made = engine.generate([chats[place] for place in missing], max_new_tokens=limit)
        for place, ours in zip(missing, made, strict=True):
            checked[place] = _text(engine, *every[place], ours, show_tokens=metric == "accuracy", **how)
        return checked


@cache
def _template(source: sources.ModelSource) -> object:
    return load.load_tokenizer(source.folder).chat_template


def _own_file(key: str, name: str) -> Path:
    path = project_path(name).resolve()
    if not path.is_relative_to(PARAMS_DIR.resolve()):
        raise ArtifactError(f"{key} is {name!r}: an audit takes only files in {display_path(PARAMS_DIR)}/")
    return path


def _own_name(key: str, known: Mapping[str, Any]) -> str:
    """The file that a parameter names, if it may be read; empty where none is named."""
    return str(_own_file(key, known[key])) if known.get(key) else ""


def _compare_protocols(stage: str, recorded: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in sorted(here.keys() - {"questions", "prompts"}):
        claimed, ours = recorded.get(name), here[name]
        if claimed == ours:
            continue
        # A snapshot of the hub and a folder have names of different kinds, also where the files are equal.
        unknown = name in ("base model", "judge") and "@" in f"{claimed}{ours}" and " " in f"{claimed}{ours}"
        if not unknown:
            raise ArtifactError(f"{stage} records {name} {claimed}, here it is {ours}: its rows cannot be made again")
        tell(f"{stage}: the {name} was {claimed}, here is {ours}; only the rows can show whether they are equal")


def _read(engine: Engine, chat: Conversation, row: Row, text: str, **how: Any) -> Checked | None:
    """The row, if greedy decoding writes its text in the tokens that the tokenizer reads it as; None if unclear."""
    length = len(engine.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0
    if row.get("num_output_tokens") not in (None, length):
        return None
    found = find_difference(engine, chat, text, row.get("finish_reason"), begun=(), **how)
    return None if found.counts else Checked(row["id"], found.margin)


def _text(
    engine: Engine, chat: Conversation, row: Row, text: str, ours: Completion, *, show_tokens: bool, **how: Any
) -> Checked:
    reason, count = row.get("finish_reason"), row.get("num_output_tokens")
    if text == ours.text and reason in (None, ours.finish_reason):
        wrong = f"num_output_tokens is {count}, here {ours.num_output_tokens}"
        return Checked(row["id"]) if count in (None, ours.num_output_tokens) else Checked(row["id"], math.inf, wrong)
    found = find_difference(engine, chat, text, reason, begun=ours.token_ids, **how)
    tokens = f" ({found.claimed!r:.30} in place of {found.greedy!r:.30})" if show_tokens else ""
    words = f"token {found.place + 1}{tokens}: margin {found.margin:.3g}, rounding allows {found.allowed:.2g}"
    return Checked(row["id"], found.margin, words if found.counts else "")


def _score(engine: Engine, chat: Conversation, row: Row, safe: float, dtype: Any) -> Checked:
    claimed = row.get("safety_score")
    if claimed is None:
        return Checked(row["id"], math.inf, f"it has no P(safe), here it is {safe:.4f}")
    theirs, ours = np.clip(logit([claimed, safe]), -MOST_LOG_ODDS, MOST_LOG_ODDS)
    margin = abs(float(theirs - ours))
    largest = next_logits(engine, load.render_prompt(engine.tokenizer, chat), []).abs().max().item()
    # Each token of a label adds its own rounding.
    length = max(len(engine.tokenizer(label, add_special_tokens=False)["input_ids"]) for label in safety.LABELS)
    allowed = length * rounding(largest, dtype)
    words = f"P(safe) is {claimed:.4f}, here {safe:.4f}: {margin:.3g} apart as log-odds, rounding allows {allowed:.2g}"
    return Checked(row["id"], margin, words if margin > allowed else "")


def show(name: str, dtype: str, checked: Sequence[Checked]) -> bool:
    """Print what became of the drawn rows of one file; returns whether all were made again."""
    different = [row for row in checked if row.difference]
    rounded = [row.margin for row in checked if row.margin and not row.difference]
    note = f"; {len(rounded)} of them up to the rounding of {dtype}, by {max(rounded):.2g}" if rounded else ""
    tell(f"{name}: {len(checked) - len(different)} of {len(checked)} rows made again{note}")
    for row in different:
        fail(f"DIFFERS {name}, id {row.row_id}: {row.difference}")
    return not different


def audit_folder(audit: Audit) -> bool:
    """Make rows of every run of the folder again, or of a ``run_<name>`` folder; returns whether none differs."""
    check_folder(audit.folder)
    alone = RunPaths(audit.folder.name.removeprefix("run_"), audit.folder)
    done: set[Path] = set()
    equal = [_audit_run(paths, audit, done) for paths in find_runs(str(audit.folder)) or [alone]]
    if not done:
        fail(f"--audit: no row of {display_path(audit.folder)} was made again")
    return all(equal) and bool(done)


def _audit_run(paths: RunPaths, audit: Audit, done: set[Path]) -> bool:
    try:
        checks = RunAudit(load_run(paths), audit)
        tell(f"run_{paths.name}: base model {checks.base.identity}")
        for score in checks.run.metrics.values():
            if not score.rows:
                tell(f"run_{paths.name}, {score.name}: {score.status}")
        return all([show(*one) for one in checks.check(done)])
    except (ArtifactError, lookup.AssetError, load.ModelError, OSError) as error:
        fail(f"--audit, run {paths.name!r}: {error}")
    except (KeyError, TypeError, ValueError) as error:
        # Parameters and rows were written by others.
        fail(f"--audit, run {paths.name!r}: its parameters or rows cannot be used ({type(error).__name__}: {error})")
    return False


def miss_text(num_rows: int) -> str:
    """How likely an edited file passes, in words."""
    passing = [f"{share:.0%} edited rows pass {100 * (1 - share) ** num_rows:.2g} times in 100" for share in (0.1, 0.5)]
    return f"a file of which a share f of the rows is edited passes with (1 - f)^{num_rows}: {', '.join(passing)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Audit one folder; returns 1 where a row differs or could not be made again."""
    parser = argparse.ArgumentParser(prog="python -m lib.compare.regenerate", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, required=True, help="rows of each file")
    parser.add_argument("--seed", type=int, required=True, help="which rows")
    parser.add_argument("--assets", default="", help="folder with models already fetched")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    tell(f"audit: {args.rows} rows of each file, drawn by --audit-seed {args.seed}, computed in float32")
    try:
        equal = audit_folder(Audit(args.folder.resolve(), args.rows, args.seed, args.assets, args.offline))
    except ArtifactError as error:
        fail(f"--audit: {error}")
        return 1
    tell(miss_text(args.rows))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
