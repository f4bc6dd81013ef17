"""Tables, texts and plots of the notebooks: escaped, folded, with n and interval, the same each time."""

import re
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lib import wording
from lib.driver.notebook import declared_parameters
from lib.record.paths import STAGES
from lib.reports import plots, tables, training_tables
from lib.reports.html import (
    SummarySlot,
    examples,
    folded_examples,
    masked_row,
    purpose_note,
    sentences,
    table,
)
from lib.stats import Rate
from lib.wording import percent

NASTY = "<script>alert('x')</script> & \"quoted\""


def shown(output):
    """(HTML, plain text) as a notebook gets them."""
    bundle = output._repr_mimebundle_()
    return bundle["text/html"], bundle["text/plain"]


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_rate_comes_with_its_interval_and_n():
    assert tables.rate_cells(Rate.of_counts(0, 8)) == {
        "rate": "0.0 %",
        "95 % interval": "0.0 to 32.4 %",
        "rows": "0 of 8",
    }
    assert percent(None) == "not measured"


def test_what_is_no_benchmark_says_so():
    html, text = shown(purpose_note("sandbox_one", NASTY, benchmark=False))
    assert "NOT A BENCHMARK" in html and "NOT A BENCHMARK" in text and "<script" not in html
    assert "BENCHMARK" not in shown(purpose_note("simple", "one epoch", benchmark=True))[1]


def test_an_evaluation_that_generated_nothing_has_no_speed():
    assert "nothing was generated" in wording.speed_text(0, 0, 0.0)
    assert wording.speed_text(10, 500, 2.0) == "10 rows and 500 tokens in 2.0 s: 5.00 rows/s, 250 tokens/s."


def test_the_summary_is_shown_empty_and_filled_in_its_place(monkeypatch):
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda shown, **options: calls.append((shown.text, options)))
    summary = SummarySlot()
    summary.fill(sentences(["54.4 % right.", NASTY]))
    (empty, begun), (filled, updated) = calls
    assert "every cell has to run" in empty and filled == f"- 54.4 % right.\n- {NASTY}"
    assert begun["display_id"] == updated["display_id"] and (begun["update"], updated["update"]) == (False, True)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_escape_cells_headings_and_captions():
    html, _ = shown(table([{NASTY: NASTY, "number": 1}], NASTY))
    assert "<script" not in html and html.count("&lt;script&gt;") == 3


def test_long_tables_show_ten_rows_and_say_of_how_many():
    html, text = shown(table([{"row": f"r{number}"} for number in range(1234)], "Rows"))
    assert html.count("<tr>") == 11 and "r9" in html and "r10" not in html
    assert "Rows (first 10 of 1,234)" in html and "first 10 of 1,234" in text


def test_cells_are_readable():
    html, text = shown(table([{"a": 1234567, "b": 0.123456, "c": None, "d": True}, {"a": 1, "b": 2.0}]))
    assert all(word in html for word in ("1,234,567", "0.1235", "yes", "–"))
    assert "nan" not in text.lower() and "None" not in text


def test_numbers_are_set_right_and_words_left():
    html, _ = shown(table([{"name": "x", "number": 3}]))
    assert re.findall(r"(t[hd]\.col\d) \{\s*text-align: right", html) == ["th.col1", "td.col1"]


NUMERIC = ("3", "52.4", "1,319", "4.2 %", "-10.2 to 20.2", "0.7 to 20.2 %", "1 of 1,319", "+9 -4", "3.1e-05", "-0.4")


@pytest.mark.parametrize(
    ("cell", "right"),
    [*((cell, True) for cell in NUMERIC), *((cell, False) for cell in ("2.13.0", "1, 2, 3", "nf4", "not measured"))],
)
def test_rates_intervals_and_p_values_are_numbers_too(cell, right):
    for rows in ([{"value": cell}], [{"value": cell}, {"value": None}, {"value": "none"}]):
        assert ("text-align: right" in table(rows).html) == right
    assert "text-align: right" not in table([{"value": cell}, {"value": "words"}]).html


def test_a_list_in_a_cell_is_joined():
    _, text = shown(table([{"setting": "stop tokens", "value": ["<|im_end|>", "</s>"]}]))
    assert "<|im_end|>, </s>" in text and "[" not in text


def test_the_same_table_is_the_same_html():
    rows = [{"a": 1}]
    assert table(rows).html == table(rows).html != table([{"a": 2}]).html


def test_parameters_and_versions_are_folded_and_the_device_is_seen():
    folded = tables.setup_tables("05_compare", declared_parameters("05_compare"), "CPU <by request>")
    assert all(part.html.startswith("<details><summary>") for part in folded)
    assert (
        "Device: CPU &lt;by request&gt;." in folded[1].html.partition("</summary>")[0]
        and "transformers" in folded[1].html
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_is_shown_with_its_value_and_meaning(stage):
    parameters = declared_parameters(stage)
    html, _ = shown(tables.parameters_table(stage, parameters))
    assert html.startswith("<details>") and f"{len(parameters)} parameters" in html
    assert all(tables.parameter_meanings(stage)[name] for name in parameters)


def test_provenance_shows_short_hashes():
    row = {"origin": "hub", "path": "data/raw/x", "num_rows": 3, "sha256": "a" * 64, "licence": "MIT", "home": "h"}
    html, _ = shown(tables.sources_table({"GSM8K": row}))
    assert "a" * 12 in html and "a" * 13 not in html


def test_files_are_named_relative_to_the_run(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("one", "two"):
        (tmp_path / "adapter" / name).write_bytes(b"0" * 1024)
    _, text = shown(tables.files_table([tmp_path / "adapter"], tmp_path))
    assert text.splitlines()[-1].split() == ["adapter", "2", "2.0"] and str(tmp_path) not in text


# --- texts of models ------------------------------------------------------------------------------------------------


def test_model_text_is_escaped_and_kept_as_it_stands():
    html, text = shown(examples([{"id": 7, "answer": f"{NASTY}\n  line"}], {"answer": "Answer"}, "row {id}"))
    assert "<script" not in html and "\n  line" in html and NASTY in text and "row 7" in html


def test_folded_texts_are_seen_only_after_a_click():
    row = {"id": 3, "prompt": f"secret {NASTY}", "response": "reply"}
    html, text = shown(folded_examples([row], {"prompt": "Prompt", "response": "Response"}, "id {id}"))
    assert html.startswith("<details><summary>id 3</summary>") and html.endswith("</details>")
    assert "open" not in html.split(">")[0] and "<script" not in html
    assert text == "id 3"


def test_a_heading_is_cut_where_a_model_wrote_a_number_of_many_digits():
    html, _ = shown(examples([{"id": 1, "number": "8" * 500}], {"id": "Id"}, "read as {number}"))
    assert "8" * 80 in html and "8" * 100 not in html and "…" in html


def test_no_rows_are_said():
    assert shown(examples([], {}, "", "No answer is right."))[1] == "No answer is right."
    assert "no such row" in shown(folded_examples([], {}, ""))[1]


def test_masked_tokens_are_told_from_learnt_ones():
    words = {1: "Question <b>", 2: " Answer", 3: " end"}
    output = masked_row([1, 2, 3], [-100, 2, 3], lambda ids: "".join(words[token] for token in ids))
    html, text = shown(output)
    assert text == "Question <b>[learnt:  Answer end]"
    assert html.count('title="masked"') == html.count('title="learnt"') == 1 and "<b>" not in html


# --- plots ------------------------------------------------------------------------------------------------------------


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_plots_are_saved_twice_and_are_the_same_bytes_each_time(tmp_path):
    def draw(stem):
        figure = plots.histogram([1, 2, 2, 3], 5, "limit", title="Lengths", xlabel="tokens")
        return plots.show_plot(figure, tmp_path / "plots" / stem, f"alt {NASTY}")

    html, text = shown(draw("one"))
    draw("two")
    for suffix in (".png", ".svg"):
        one, two = ((tmp_path / "plots" / stem).with_suffix(suffix).read_bytes() for stem in ("one", "two"))
        assert one == two and len(one) > 1000
    assert "<script" not in html and "alt=" in html and text == f"alt {NASTY}"


@pytest.mark.parametrize(
    ("figure", "n"),
    [
        (plots.histogram([5, 6, 7], 9, "limit", title="t", xlabel="tokens"), "n = 3"),
        (plots.histogram([0.1, 0.9], 0.5, "at 0.5", title="t", xlabel="P", shares=True), "n = 2"),
        (plots.training_curves([{"step": 1, "loss": 2.0, "learning_rate": 1e-4}], title="t"), "n = 1 steps"),
    ],
)
def test_titles_say_n_and_axes_what_they_are(figure, n):
    assert n in titles(figure)[0]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize(("totals", "n"), [([8, 8], "n = 8"), ([15, 1319], "n = 15 to 1,319")])
def test_the_title_of_rates_says_of_how_many_rows(totals, n):
    figure = plots.rate_plot(
        {str(at): Rate.of_counts(1, total) for at, total in enumerate(totals)}, title="Rates", xlabel="share"
    )
    assert titles(figure) == [f"Rates ({n})"]


@pytest.mark.parametrize("successes", range(9))
def test_no_rate_is_struck_through_by_the_axis(successes):
    figure = plots.rate_plot({"a": Rate.of_counts(successes, 8)}, title="Rates", xlabel="share")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    box, inside = axes.texts[0].get_window_extent(), axes.get_window_extent()
    assert inside.x0 < box.x0 and box.x1 <= figure.bbox.x1


def test_training_curves_draw_what_was_measured():
    log = [{"step": step, "loss": 3.0 / step, "learning_rate": 0.0, "grad_norm": None} for step in (1, 2, 3)]
    log[0]["dev_loss"], log[2]["dev_loss"], log[1]["tokens_per_s"] = 4.0, 2.0, 50.0
    figure = plots.training_curves(log, title="Loss")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss (n = 3 steps)", "Learning rate", "Speed"]
    training, dev = figure.axes[0].lines
    assert (list(training.get_ydata()), list(dev.get_xdata()), list(dev.get_ydata())) == ([3, 1.5, 1], [1, 3], [4, 2])
    assert figure.axes[0].get_ylim()[1] > 4.0, "the higher of the two is inside"


def test_both_losses_are_named_where_their_lines_end_and_inside_the_plot():
    log = [{"step": step, "loss": 1.0, "dev_loss": 1.01} for step in (1, 2, 3)]
    figure = plots.training_curves(log, title="Loss")
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert axes.get_legend() is None
    low, high = (text.get_window_extent() for text in axes.texts)
    assert [text.get_text() for text in axes.texts] == ["training", "development"] and low.y1 <= high.y0
    assert max(low.x1, high.x1) <= axes.get_window_extent().x1


def test_learning_rates_are_written_in_one_form():
    values = (0, 2e-5, 8e-5, 1e-4, 1.5e-4)
    assert [plots.power_of_ten(value) for value in values] == ["0", "2e-5", "8e-5", "1e-4", "1.5e-4"]
    figure = plots.training_curves([{"step": 1, "loss": 2.0, "learning_rate": 1e-4}], title="t")
    FigureCanvasAgg(figure).draw()
    ticks = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert "1e-4" in ticks and "8e-5" in ticks


def test_a_training_says_whether_it_was_resumed():
    result = SimpleNamespace(num_trainable=1, num_parameters=10, num_steps=4, num_rows=8, wall_s=2.0)
    result.tokens_per_s, result.peak_memory_gib, result.resumed_from = 10.0, 1.0, 0
    assert "all passes; begun at the first" in training_tables.cost_table(result, "cpu").text
    result.resumed_from = 2
    assert "all passes; resumed from checkpoint-2" in training_tables.cost_table(result, "cpu").text


def test_rates_are_drawn_with_their_wilson_intervals_from_the_top():
    rates = {"a": Rate.of_counts(1, 2), "b": Rate.of_counts(0, 8)}
    figure = plots.rate_plot(rates, title="Rates", xlabel="share", marks={"baseline": 0.26})
    (axes,) = figure.axes
    drawn = [collection.get_segments()[0] for collection in axes.collections]
    expected = [[(rate.low, place), (rate.high, place)] for place, rate in zip((2, 1), rates.values(), strict=True)]
    assert [[tuple(point) for point in segment] for segment in drawn] == expected
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a  (n = 2)", "b  (n = 8)"]
