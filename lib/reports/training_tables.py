"""Tables and plots of 02_train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import wording
from lib.engine.load import Runtime, nf4_config
from lib.engine.sources import ModelSource
from lib.reports import html, plots
from lib.reports.html import Html
from lib.reports.stage import Stage
from lib.train.checkpoint_selection import Choice
from lib.train.rows import EncodedRows
from lib.train.selection_rows import ON_TEST
from lib.train.settings import TrainResult, TrainSettings
from lib.train.sft import lora_config
from lib.train.trainer import training_arguments
from lib.wording import percent

Row = Mapping[str, Any]
# Of each object that is passed, what changes the result.
SHOWN_ARGUMENTS = ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1")
SHOWN_ARGUMENTS += ("adam_beta2", "adam_epsilon", "max_grad_norm", "fp16", "seed", "save_steps")
SHOWN_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "target_modules")
SHOWN_LORA += ("bias", "task_type")
SHOWN_NF4 = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")


def rows_table(rows: EncodedRows, dev: EncodedRows, num_prepared: int, max_seq_length: int) -> Html:
    """Rows and tokens that are trained on."""
    share = rows.num_supervised_tokens / rows.num_tokens
    counts = [
        ("rows to train on", len(rows.examples), f"of {num_prepared:,} prepared"),
        ("rows left out", len(rows.too_long), f"over {max_seq_length} tokens"),
        ("tokens", rows.num_tokens, "read in one pass over the rows"),
        ("labelled tokens", rows.num_supervised_tokens, f"learnt: {percent(share)}"),
        ("development rows", len(dev.examples), "their loss is measured, not trained on"),
        ("of them left out", len(dev.too_long), f"over {max_seq_length} tokens: no loss"),
    ]
    return html.table([{"what": what, "number": n, "meaning": meaning} for what, n, meaning in counts], "Training rows")


def probe(dev: Sequence[Row], pool: Sequence[Row], train: Sequence[Row]) -> dict[str, Any]:
    """A question to answer before and after training, with its ``kind``: not trained on where there is such a row."""
    kinds = {"a development row": dev, "a row of the few-shot pool": pool, "a training row": train}
    return next({**rows[0], "kind": kind} for kind, rows in kinds.items() if rows)


def settings_table(parameters: Row, base: ModelSource, runtime: Runtime, num_rows: int, folder: Path) -> Html | None:
    """Quantisation, LoRA and optimiser as they are passed; None where nothing is trained."""
    if parameters["checkpoint"]:
        return None
    settings = TrainSettings.from_params(parameters, base.identity)
    num_steps = settings.num_epochs * -(-num_rows // settings.rows_per_step)
    passed = []
    if parameters["quantization"] == "nf4":
        passed.append(("BitsAndBytesConfig", nf4_config(runtime.dtype), SHOWN_NF4))
    passed.append(("LoraConfig", lora_config(settings), SHOWN_LORA))
    arguments = training_arguments(runtime.device, runtime.dtype, num_steps, settings, folder / "checkpoints")
    passed.append(("TrainingArguments", arguments, SHOWN_ARGUMENTS))
    given = [(kind, name, _value(getattr(one, name))) for kind, one, names in passed for name in names]
    rows = [dict(zip(("passed to", "argument", "value"), row, strict=True)) for row in given]
    caption = f"Settings as they are passed; {settings.rows_per_step} rows per step, {num_steps} steps"
    return html.table(rows, caption, max_rows=len(rows))


def _value(value: Any) -> str:
    if isinstance(value, set | list | tuple):
        return ", ".join(sorted(map(str, value)))
    return str(getattr(value, "value", value)).removeprefix("torch.")


def trained_text(result: TrainResult | None, checkpoint: str) -> str:
    """What was trained, in a sentence."""
    if result is None:
        return f"Not trained here: the adapter is {checkpoint}."
    tokens = f"{result.num_supervised_tokens:,} labelled tokens"
    return f"{result.num_steps} steps on {result.num_rows:,} rows, {tokens}."


def cost_table(result: TrainResult | None, device: str) -> Html | None:
    """What a training took."""
    if result is None:
        return None
    share = percent(result.num_trainable / result.num_parameters)
    begun = f"resumed from checkpoint-{result.resumed_from}" if result.resumed_from else "begun at the first"
    rows = [
        ("trained weights", f"{result.num_trainable:,}", f"{share} of {result.num_parameters:,} in the model"),
        ("optimiser steps", f"{result.num_steps:,}", f"{result.num_rows:,} rows, all passes; {begun}"),
        ("time", f"{result.wall_s:,.0f} s", "sum over all steps"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s", "tokens read, forward and backward"),
        ("peak memory", f"{result.peak_memory_gib:.2f} GiB", f"on {device}"),
    ]
    return html.table([dict(zip(("what", "value", "meaning"), row, strict=True)) for row in rows], "What training cost")


def cost_text(result: TrainResult) -> str:
    """What a training took, in one sentence."""
    share = percent(result.num_trainable / result.num_parameters)
    speed = f"{result.tokens_per_s:,.0f} tokens/s, {result.peak_memory_gib:.2f} GiB at the peak"
    return f"{share} of the weights were trained, in {result.wall_s:,.0f} s: {speed}."


def curve_text(result: TrainResult, num_dev: int) -> str:
    """From where to where the losses went, in sentences."""
    first, last, dev = result.log[0]["loss"], result.log[-1]["loss"], result.dev_losses
    text = f"The loss went from {first:.3f} in the first of {result.num_steps} steps to {last:.3f} in the last."
    return text + (f" On {num_dev} development rows it went from {dev[0]:.3f} to {dev[-1]:.3f}." if dev else "")


def curves(result: TrainResult | None, num_dev: int, stage: Stage) -> Html | None:
    """Loss, learning rate, gradient norm and speed over the steps."""
    if result is None:
        return None
    text = curve_text(result, num_dev)
    figure = plots.training_curves(result.log, title="Training loss")
    return html.stack([stage.plot(figure, "training_curves", text), html.note(text)])


def choice_table(choice: Choice) -> Html | None:
    """Scores of the compared checkpoints."""
    if not choice.scores:
        return None
    rows = []
    for row in choice.table:
        one = {"checkpoint": row["checkpoint"], "right": f"{row['num_correct']} of {row['n']}"}
        one |= {"safe": f"{row['num_safe']} of {row['num_prompts']}"} if row["num_prompts"] else {}
        rows.append(one | {"score": f"{row['score']:.3f}", "kept": "yes" if row["chosen"] else ""})
    first, why = choice.table[0], choice.why_no_safety
    caption = f"{first['n']} questions and {first['num_prompts']} prompts per checkpoint, {choice.selected_on}"
    notes = [html.note(f"Safety is not measured: {why}", strong=True)] if why else []
    return html.stack([html.table(rows, caption), *notes])


def choice_plot(choice: Choice, stage: Stage) -> Html | None:
    """Rates of the compared checkpoints with their intervals, and the choice."""
    if not choice.scores:
        return None
    rates = {f"{one.checkpoint}, {metric}": rate for one in choice.scores for metric, rate in one.rates.items()}
    title = f"Checkpoints on {choice.selected_on}"
    figure = plots.rate_plot(rates, title=title, xlabel="share of rows, 95 % interval")
    alt = "; ".join(f"{name}: {wording.count(rate.successes, rate.n)}" for name, rate in rates.items())
    note = html.note(choice.sentence, strong=choice.selected_on == ON_TEST)
    return html.stack([stage.plot(figure, "checkpoints", alt), note])


def summary(trained: str, choice: Choice, result: TrainResult | None, num_dev: int) -> list[str]:
    """The stage in sentences."""
    lines = [trained, choice.sentence]
    if choice.why_no_safety:
        lines.append(f"Safety was not measured on development prompts: {choice.why_no_safety}.")
    return [*lines, *([curve_text(result, num_dev), cost_text(result)] if result else [])]
