"""Which checkpoint to keep: candidates get the same rows under one protocol, are scored, and one is chosen.

With ``sweep_on_test: true`` these are the evaluation rows, whose scores are then too high, as every report says.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import gsm8k, safety
from lib.engine.generator import LazyGenerator
from lib.engine.sources import ModelSource, resolve_adapter, resolve_model
from lib.prepare import datasets
from lib.record.files import sha256_file, sha256_json, write_csv
from lib.record.lookup import load_or_reason
from lib.record.paths import RunPaths, named_files, project_path
from lib.record.protocol import judge_quantization
from lib.record.rows import RowLog, read_jsonl, write_jsonl
from lib.stats import Rate
from lib.train import selection_rows
from lib.train.selection_rows import (
    NOT_SELECTED,
    SelectionRows,
    SweepError,
    development_rows,
    evaluation_rows,
    needs_safety,
    selection_text,
)
from lib.train.settings import TrainResult, checkpoint_step

if TYPE_CHECKING:  # imports torch
    from lib.engine.load import Runtime
    from lib.engine.models import Models

Row = dict[str, Any]

# What is highest at the chosen checkpoint: the share of questions answered right (strict), of responses judged safe, or
# the sum of both shares, so that the number of rows has no weight.
METRICS = ("accuracy", "safety", "sum")
# What 02 reads only where candidates get prompts: otherwise a change of the judge does not run it again.
SAFETY_PARAMETERS = ("safeguard_model", "safeguard_revision", "ailuminate_source", "ailuminate_max_new_tokens")
SAFETY_PARAMETERS += ("judge_mode", "judge_context", "judge_max_new_tokens", "guidelines_file", "judge_prompt_file")
SAFETY_PARAMETERS += ("judge_quantization",)


@dataclass(frozen=True)
class Protocol:
    """What is the same for every candidate; ``judge`` is empty where safety is not measured."""

    model: Mapping[str, str]
    fewshot: list[Row]
    max_answer_tokens: int
    max_response_tokens: int
    judge: Mapping[str, str]
    guidelines: str
    judge_context: str
    judge_mode: str
    max_verdict_tokens: int
    system: str = gsm8k.SYSTEM_PROMPT
    template: str = ""  # of the judge's prompt; the built-in one if empty

    def sha256(self, rows: SelectionRows) -> str:
        """Hash of the protocol and of the rows under it; it stands beside every score."""
        known = asdict(self)
        # In its own place, and a template only where there is one: as in hashes made before both could be set.
        system, template = known.pop("system"), known.pop("template")
        known |= {"template": template} if template else {}
        return sha256_json([known, system, rows.questions, rows.prompts])


def candidates(checkpoints: Sequence[Path], most: int) -> list[Path]:
    """The last ``most`` checkpoints by the number in their names: checkpoint-1000 comes after checkpoint-200."""
    return sorted(checkpoints, key=checkpoint_step)[-most:]


def score_candidates(
    checkpoints: Sequence[Path],
    rows: SelectionRows,
    protocol: Protocol,
    folder: Path,
    tuned: Callable[[Path], LazyGenerator],
    judge: LazyGenerator | None,
    free_memory: Callable[[], None] = lambda: None,
) -> list["Score"]:
    """Score every candidate; all answer, then ``free_memory`` is called for the judge, so that it is loaded once."""
    generated = []
    for path in checkpoints:
        generator, adapter = tuned(path), sha256_file(path / "adapter_model.safetensors")
        generated.append((path, adapter, *_generate(path, adapter, generator, rows, protocol, folder)))
    if judge:
        free_memory()
    return [
        score(path, adapter, answers, _judge(path, responses, judge, protocol, folder) if responses else [])
        for path, adapter, answers, responses in generated
    ]


def _generate(
    checkpoint: Path, adapter: str, generator: LazyGenerator, rows: SelectionRows, protocol: Protocol, folder: Path
) -> tuple[list[Row], list[Row]]:
    """Answers and responses of one candidate, whose adapter has the hash ``adapter``."""
    by = [dict(protocol.model), adapter]
    answer_hash = sha256_json([by, protocol.system, protocol.fewshot, protocol.max_answer_tokens, rows.questions])
    log = RowLog(folder / f"answers_{checkpoint.name}.jsonl", answer_hash, label=checkpoint.name)
    how = {"max_new_tokens": protocol.max_answer_tokens, "system": protocol.system}
    answers = gsm8k.evaluate(rows.questions, protocol.fewshot, generator, **how, log=log)
    if not rows.prompts:
        return answers, []
    response_hash = sha256_json([by, protocol.max_response_tokens, rows.prompts])
    log = RowLog(folder / f"responses_{checkpoint.name}.jsonl", response_hash, label=checkpoint.name)
    return answers, safety.respond(rows.prompts, generator, max_new_tokens=protocol.max_response_tokens, log=log)


def _judge(checkpoint: Path, responses: list[Row], judge: LazyGenerator, protocol: Protocol, folder: Path) -> list[Row]:
    """Verdicts on a candidate's responses."""
    read = {"guidelines": protocol.guidelines, "context": protocol.judge_context, "mode": protocol.judge_mode}
    read["template"] = protocol.template
    by = [dict(protocol.judge), safety.judge_prompt_hash(**read), protocol.max_verdict_tokens]
    log_hash = sha256_json([by, [responses[0]["protocol_hash"]]])
    log = RowLog(folder / f"verdicts_{checkpoint.name}.jsonl", log_hash, label=checkpoint.name)
    return safety.judge(responses, judge, **read, max_new_tokens=protocol.max_verdict_tokens, log=log)


@dataclass(frozen=True)
class Score:
    """What a candidate reached; ``num_prompts`` is 0 where safety was not measured."""

    checkpoint: str
    step: int
    adapter_sha256: str
    num_questions: int
    num_correct: int
    num_prompts: int = 0
    num_safe: int = 0
    num_unparsed: int = 0

    @property
    def rates(self) -> dict[str, Rate]:
        """By metric, of those that were measured."""
        right = {"right": Rate.of_counts(self.num_correct, self.num_questions)}
        return right | ({"safe": Rate.of_counts(self.num_safe, self.num_prompts)} if self.num_prompts else {})

    def value(self, metric: str) -> Fraction:
        """What is compared; exact, so that equal scores are a tie. SweepError where the metric cannot be computed."""
        if metric not in METRICS:
            raise SweepError(f"sweep_metric is {metric!r}; allowed: {', '.join(METRICS)}")
        if needs_safety(metric) and not self.num_prompts:
            raise SweepError(f"sweep_metric is {metric!r} but {self.checkpoint} got no prompt: set dev_safety_rows")
        accuracy = Fraction(self.num_correct, self.num_questions)
        if metric == "accuracy":
            return accuracy
        return Fraction(self.num_safe, self.num_prompts) + (accuracy if metric == "sum" else 0)


def score(checkpoint: Path, adapter_sha256: str, answers: Sequence[Row], verdicts: Sequence[Row]) -> Score:
    """Counts of a candidate, from its rows."""
    answered = gsm8k.summarize(answers)
    judged = safety.summarize(verdicts) if verdicts else {"n": 0, "num_safe": 0, "num_unparsed": 0}
    counts = (answered["n"], answered["num_correct"], judged["n"], judged["num_safe"], judged["num_unparsed"])
    return Score(checkpoint.name, checkpoint_step(checkpoint), adapter_sha256, *counts)


def best(scores: Sequence[Score], metric: str) -> Score:
    """The score with the highest value; of equal ones the latest step, which has seen the most rows."""
    if len({(one.num_questions, one.num_prompts) for one in scores}) != 1:
        raise SweepError(f"{len(scores)} checkpoints to choose from, not all with the same rows: run 02_train again")
    return max(scores, key=lambda one: (one.value(metric), one.step))


def table_rows(scores: Sequence[Score], metric: str, selected_on: str, protocol_sha256: str) -> list[Row]:
    """Rows of ``checkpoint_scores_<name>.csv``, by step: shares with Wilson's 95 % interval, None if unmeasured."""
    chosen = best(scores, metric)
    rows = []
    for one in sorted(scores, key=lambda one: one.step):
        right, safe = one.rates["right"], one.rates.get("safe")
        columns = {"checkpoint": one.checkpoint, "step": one.step, "n": one.num_questions}
        columns |= {"num_correct": one.num_correct} | _rate_columns(right, "accuracy", "")
        columns |= {"num_prompts": one.num_prompts, "num_safe": one.num_safe, "num_unparsed": one.num_unparsed}
        columns |= _rate_columns(safe, "safety_rate", "safety_")
        columns |= {"metric": metric, "score": float(one.value(metric)), "chosen": one is chosen}
        rows.append({**columns, "selected_on": selected_on, "protocol_sha256": protocol_sha256})
        rows[-1]["adapter_sha256"] = one.adapter_sha256
    return rows


def _rate_columns(rate: Rate | None, name: str, prefix: str) -> Row:
    cells = (rate.share, rate.low, rate.high) if rate else (None, None, None)
    return dict(zip((name, f"{prefix}low", f"{prefix}high"), cells, strict=True))


@dataclass(frozen=True)
class Choice:
    """The adapter that a run keeps, and why."""

    name: str  # in words
    source: Path | None  # folder to take it from; None: it is already where the later stages look for it
    selected_on: str
    sentence: str  # how it was chosen
    scores: list[Score] = field(default_factory=list)  # of the candidates; empty where nothing was compared
    table: list[Row] = field(default_factory=list)  # rows of checkpoint_scores_<name>.csv
    files: list[Path] = field(default_factory=list)  # what was read
    judge_s: float = 0.0  # seconds that the judge worked
    judge_load_s: float = 0.0
    why_no_safety: str = ""  # why safety was to be measured and was not
    reads_safety: bool = False  # whether SAFETY_PARAMETERS were read

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        facts = {"selected_on": self.selected_on, "sweep_metric": self.table[0]["metric"] if self.table else None}
        unused = [] if self.reads_safety else list(SAFETY_PARAMETERS)
        return facts | {"no_dev_safety": self.why_no_safety, "unused_parameters": unused, "checkpoints": self.table}


def choose(
    parameters: Mapping[str, Any],
    paths: RunPaths,
    base: ModelSource,
    models: "Models",
    runtime: "Runtime",
    result: TrainResult | None,
) -> Choice:
    """Choose among the last checkpoints, where ``checkpoint_sweep`` is set and the run trains its own adapter."""
    if parameters["checkpoint"]:
        place = (parameters["checkpoint"], parameters["base_model"], parameters["assets_dir"], parameters["offline"])
        adapter = resolve_adapter(*place)
        name = f"the adapter {parameters['checkpoint']}"
        return Choice(name, adapter.folder, NOT_SELECTED, selection_text(name, NOT_SELECTED), files=[adapter.folder])
    if not parameters["checkpoint_sweep"]:
        name = "the adapter as training ended"
        return Choice(name, None, NOT_SELECTED, selection_text(name, NOT_SELECTED))
    return _sweep(parameters, paths, base, models, runtime, result.checkpoints if result else [])


def _sweep(
    parameters: Mapping[str, Any],
    paths: RunPaths,
    base: ModelSource,
    models: "Models",
    runtime: "Runtime",
    checkpoints: Sequence[Path],
) -> Choice:
    # Imports torch, which the reports that only read a finished choice do without.
    from lib.engine.generate import judge_generator

    metric, most = parameters["sweep_metric"], parameters["max_sweep_checkpoints"]
    folder = paths.stage_dir("02_train") / "sweep"
    judge_source, prompts, files, why_no_safety = _safety_inputs(parameters, paths, folder)
    rows = evaluation_rows(paths, metric) if parameters["sweep_on_test"] else development_rows(paths, prompts)
    model = {"base": f"{base.identity} {parameters['quantization']}", "dtype": str(runtime.dtype)}
    model["template"] = sha256_json(models.tokenizer.chat_template)
    protocol = _protocol(parameters, paths, model, judge_source if rows.prompts else None)
    held = (runtime, _judge_quantization(parameters), parameters["eval_batch_size"])
    judge = judge_generator(judge_source.folder, *held) if rows.prompts else None
    scores = score_candidates(candidates(checkpoints, most), rows, protocol, folder, models.tuned, judge, models.close)
    if judge:
        judge.close()
    chosen = best(scores, metric).checkpoint
    read = named_files(parameters["guidelines_file"], parameters["judge_prompt_file"]) if rows.prompts else []
    table = table_rows(scores, metric, rows.selected_on, protocol.sha256(rows))
    write_csv(paths.checkpoint_scores, table)
    return Choice(
        name=chosen,
        source=paths.checkpoints_dir / chosen,
        selected_on=rows.selected_on,
        sentence=selection_text(chosen, rows.selected_on, metric, len(scores), most),
        scores=scores,
        table=table,
        files=[*files, *rows.files, *read],
        judge_s=judge.wall_s if judge else 0.0,
        judge_load_s=judge.load_s if judge else 0.0,
        why_no_safety=why_no_safety,
        reads_safety=_wants_safety(parameters),
    )


def _judge_quantization(parameters: Mapping[str, Any]) -> str:
    return judge_quantization(parameters["quantization"], parameters["judge_quantization"])


def _protocol(
    parameters: Mapping[str, Any], paths: RunPaths, model: Mapping[str, str], judge: ModelSource | None
) -> Protocol:
    pool = read_jsonl(paths.fewshot_rows) if parameters["fewshot_k"] else []
    # As in the protocol of a verdict: left out where it is the model's.
    quantization = _judge_quantization(parameters)
    own = {} if quantization == parameters["quantization"] else {"quantization": quantization}
    return Protocol(
        model=model,
        fewshot=gsm8k.fewshot_examples(pool, parameters["fewshot_k"]),
        max_answer_tokens=parameters["gsm8k_max_new_tokens"],
        max_response_tokens=parameters["ailuminate_max_new_tokens"],
        judge={"identity": judge.identity, **own} if judge else {},
        guidelines=safety.read_guidelines(project_path(parameters["guidelines_file"])) if judge else "",
        judge_context=parameters["judge_context"],
        judge_mode=parameters["judge_mode"],
        max_verdict_tokens=parameters["judge_max_new_tokens"],
        system=gsm8k.read_system_prompt(parameters["system_prompt_file"]),
        template=safety.read_judge_template(parameters["judge_prompt_file"], parameters["judge_context"])
        if judge
        else "",
    )


def _wants_safety(parameters: Mapping[str, Any]) -> bool:
    return parameters["dev_safety_rows"] > 0 or needs_safety(parameters["sweep_metric"])


def _safety_inputs(
    parameters: Mapping[str, Any], paths: RunPaths, folder: Path
) -> tuple[ModelSource | None, list[Row], list[Path], str]:
    """The judge, the development prompts, the files read for them, and why safety cannot be measured here."""
    here = (parameters["assets_dir"], parameters["offline"])
    judge, no_judge, loaded, no_prompts = None, "", None, ""
    if _wants_safety(parameters):
        named = (parameters["safeguard_model"], parameters["safeguard_revision"])
        judge, no_judge = load_or_reason(resolve_model, *named, *here)
    num_prompts = parameters["dev_safety_rows"]
    if num_prompts:
        # The class CSV holds evaluation prompts alone, the public file more.
        source = parameters["ailuminate_source"]
        pool = "mlcommons" if source == "class" else source
        loaded, no_prompts = load_or_reason(datasets.load_ailuminate, pool, "all", *here)
    why_not = no_prompts or (no_judge and f"judge: {no_judge}")
    selection_rows.require_safety(parameters["sweep_metric"], why_not)
    if why_not or not loaded:
        return judge, [], [], why_not
    evaluated = selection_rows.evaluated_prompts(paths)
    prompts = selection_rows.draw_prompts(loaded[0], evaluated, num_prompts, parameters["data_seed"])
    write_jsonl(folder / "prompts.jsonl", prompts)
    return judge, prompts, [loaded[1].file, paths.ailuminate_rows], why_not


def keep_adapter(source: Path | None, adapter_dir: Path) -> None:
    """Copy an adapter to where the later stages look for it; without a source it is there already."""
    adapter_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("adapter_*")) if source else []:
        shutil.copy2(file, adapter_dir / file.name)
