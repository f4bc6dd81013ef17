"""The rows of a run: its data found, evaluation and training rows drawn, the training rows checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lib import gsm8k
from lib.prepare import audit, datasets, fewshot
from lib.prepare.audit import Fault, File
from lib.prepare.datasets import Source
from lib.prepare.self_distillation import OWN_ANSWERS, Distillation
from lib.record.lookup import load_or_reason

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """What the rows of a run are drawn from."""

    gsm8k_train: File
    gsm8k_test: list[Row]
    train: File  # the training rows: GSM8K train or another file
    prompts: list[Row]
    no_prompts: str  # why there are no AILuminate prompts; empty where there are
    sources: dict[str, Source]  # provenance by what each is used for
    examples: File | None = None  # in place of a pool that is drawn

    @property
    def language(self) -> str:
        """Of the AILuminate prompts; empty without any."""
        return self.sources["AILuminate"].language if "AILuminate" in self.sources else ""


def load_data(parameters: Mapping[str, Any]) -> RunData:
    """GSM8K, the training file where the run has one, and the AILuminate prompts where they can be found."""
    here = (parameters["assets_dir"], parameters["offline"])
    rows, source = datasets.load_gsm8k("train", parameters["gsm8k_source"], *here)
    test, test_source = datasets.load_gsm8k("test", parameters["gsm8k_source"], *here)
    sources = {"GSM8K train": source, "GSM8K test": test_source}
    gsm8k_train = train = File(rows, source.path, datasets.line_numbers(source))
    if parameters["train_source"] == "file":
        rows, source = datasets.load_train_file(parameters["train_file"], parameters["train_file_url"], *here)
        train = File(rows, source.path, datasets.line_numbers(source))
        sources["training file"] = source
    wanted = (parameters["ailuminate_source"], parameters["ailuminate_prompt_set"])
    loaded, no_prompts = load_or_reason(datasets.load_ailuminate, *wanted, *here)
    if loaded:
        sources["AILuminate"] = loaded[1]
    return _with_examples(
        RunData(gsm8k_train, test, train, loaded[0] if loaded else [], no_prompts, sources), parameters
    )


def _with_examples(data: RunData, parameters: Mapping[str, Any]) -> RunData:
    """The same with the examples of ``fewshot_file``, which may have to be made, or of ``fewshot_rows``."""
    shown, file, positions = parameters["fewshot_k"], parameters["fewshot_file"], parameters["fewshot_rows"]
    if positions:
        return replace(data, examples=fewshot.named_rows(positions, shown, data.gsm8k_train, data.gsm8k_test))
    if not file:
        return data
    examples, source = fewshot.load_file(file, shown, data.gsm8k_test, lambda: _hold_out(data, parameters)[1].fewshot)
    return replace(data, examples=examples, sources={**data.sources, "few-shot examples": source})


@dataclass(frozen=True)
class RunRows:
    """The rows of a run."""

    pool: list[Row]  # of the worked examples
    fewshot: list[Row]  # those that are shown
    dev: list[Row]
    train: list[Row]
    gsm8k_eval: list[Row]
    prompts: list[Row]
    faults: list[Fault]  # of the training rows and, where these are from another file, of GSM8K train
    num_unknown: int  # training rows whose question GSM8K does not have
    num_removed: int  # training rows that left because pool or development rows have their question

    @property
    def decided(self) -> list[Fault]:
        """Faults that ``train_file_faults`` decides on."""
        return [fault for fault in self.faults if fault.kind in audit.DECIDED]


def draw_rows(data: RunData, parameters: Mapping[str, Any]) -> RunRows:
    """Draw the rows of a run by ``data_seed`` and check its training rows; TrainFileError under ``refuse``."""
    # Which rows are held out depends on GSM8K train alone; they are needed to check the training rows.
    drawable, held_out = _hold_out(data, parameters)
    checked = check_file(data.train, data, parameters, fewshot=held_out.fewshot, dev=held_out.dev)
    split = _split(drawable.rows, checked.rows, data, parameters)
    indices = gsm8k.eval_indices(len(data.gsm8k_test), parameters["gsm8k_eval_fraction"], parameters["data_seed"])
    indices = indices[: parameters["max_gsm8k_rows"] or None]
    return RunRows(
        pool=split.fewshot,
        fewshot=gsm8k.fewshot_examples(split.fewshot, parameters["fewshot_k"]),
        dev=split.dev,
        train=split.train,
        gsm8k_eval=[{"test_index": index, **data.gsm8k_test[index]} for index in indices],
        prompts=data.prompts[: parameters["max_ailuminate_rows"] or None],
        # Where the training rows are GSM8K's, they have just been checked twice.
        faults=[*(drawable.faults if data.train is not data.gsm8k_train else []), *checked.faults],
        num_unknown=checked.num_unknown,
        num_removed=split.num_removed,
    )


def _hold_out(data: RunData, parameters: Mapping[str, Any]) -> tuple[audit.Checked, gsm8k.Split]:
    """GSM8K train, checked, and the rows that are held out of it."""
    # Before the pool is drawn: a GSM8K file of one's own may hold test questions too.
    drawable = check_file(data.gsm8k_train, data, parameters)
    return drawable, _split(drawable.rows, data.train.rows, data, parameters)


def _split(drawable: list[Row], train: list[Row], data: RunData, parameters: Mapping[str, Any]) -> gsm8k.Split:
    draw = {"pool_size": parameters["fewshot_pool_size"], "dev_rows": parameters["dev_rows"]}
    draw |= {"max_train_rows": parameters["max_train_rows"], "seed": parameters["data_seed"]}
    return gsm8k.split_train(drawable, train, **draw, examples=data.examples.rows if data.examples else None)


def check_file(file: File, data: RunData, parameters: Mapping[str, Any], **held_out: list[Row]) -> audit.Checked:
    """``audit.check_rows`` of a file against both splits of GSM8K, by ``train_file_faults``."""
    splits = {"gsm8k_train": data.gsm8k_train.rows, "gsm8k_test": data.gsm8k_test}
    action = parameters["train_file_faults"]
    return audit.check_rows(file.rows, **splits, **held_out, action=action, name=file.name, lines=file.lines)


def training_rows(
    rows: RunRows, own: Distillation | None, data: RunData, parameters: Mapping[str, Any]
) -> tuple[list[Row], File, audit.Action]:
    """The rows to train on, the file that they are counted in, and what to do with those that cannot be learnt."""
    if own is None:
        return rows.train, data.train, parameters["train_file_faults"]
    # Sampling took hours: one bad answer must not stop the run.
    checked = check_file(File(own.distilled.rows, OWN_ANSWERS), data, parameters)
    return checked.rows, File(checked.rows, OWN_ANSWERS), "drop"
