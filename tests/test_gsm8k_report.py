"""lib.reports.gsm8k_report: what 03 shows of the answers."""

import re

import made_runs

from lib import gsm8k
from lib.reports import gsm8k_report

ANSWERS = made_runs.gsm8k_rows()


def headings(shown):
    return [line for line in shown.text.splitlines() if line.startswith("Row ")]


def test_an_answer_without_a_number_is_called_that():
    assert headings(gsm8k_report.answers_to_read(ANSWERS)) == [
        "Row 0: correct, read as 4",
        "Row 1: correct, read as 5",
        "Row 2: no answer, no number read",
    ]


def test_the_first_rows_stand_as_they_are():
    shown = gsm8k_report.first_answers(ANSWERS)
    assert headings(shown) == ["Row 0", "Row 1"] and ANSWERS[1]["model_output"] in shown.text


def test_accuracy_names_baseline_and_published_figure():
    scores = gsm8k.summarize(ANSWERS)
    strict, flexible = gsm8k_report.accuracy_sentences(scores, 0.5, "tiny")
    assert "66.7 %" in strict and "reaches the baseline of 50.0 %" in strict and "100.0 %" in flexible
    published = gsm8k_report.accuracy_sentences(scores, 0.9, "Qwen/Qwen2.5-1.5B-Instruct")
    assert "misses" in published[0] and "73.2 %" in published[2]


def test_without_an_untuned_model_there_is_no_test():
    alone = gsm8k_report.changes(ANSWERS, [], 0.5)
    assert "not compared with untuned" in gsm8k_report.change_sentence(alone[0])
    assert "rows that moved" not in gsm8k_report.changes_view("one", ANSWERS, [], alone).text
    wrong = [row | {"model_output": "#### 0"} for row in ANSWERS]
    untuned = [row | gsm8k.score_row(row) for row in wrong]
    found = gsm8k_report.changes(ANSWERS, untuned, 0.5)
    shown = gsm8k_report.changes_view("one", ANSWERS, untuned, found).text
    assert "rows that moved" in shown and "Questions whose outcome changed" in shown
    # The numbers of one run, and no claim: 05 adjusts for the others.
    assert "Holm" not in shown and re.search(r" moved +p\n", shown)
    assert "Accuracy of 3 questions: 66.7 %, untuned 0.0 %, change +66.7 points (95 % interval " in shown
    assert "This run alone, before adjustment; 05 adjusts." in shown and "over untuned" not in shown
    assert [one.comparison.only_run for one in found] == [2, 3]
    assert "Strict - flexible changed by -33.3 points with tuning" in shown


def test_scales_are_a_table_or_nothing():
    assert gsm8k_report.scales_table({}) is None
    shown = gsm8k_report.scales_table({"0.5": ANSWERS}).text
    assert "66.7 %" in shown and "is picked on these rows" in shown


def test_outcomes_are_counted_in_words_and_drawn():
    scores = gsm8k.summarize(ANSWERS)
    assert gsm8k_report.outcomes_text(scores) == (
        "Outcomes: correct 2, wrong 0, no answer 1, truncated 0, run-on 0; 5 tokens per answer on average."
    )
    (axes,) = gsm8k_report.outcomes_plot(scores).axes
    assert axes.get_yticklabels()[0].get_text().startswith("correct")
