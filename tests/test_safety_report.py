"""lib.reports.safety_report: what 04 shows of responses and verdicts."""

import re

import made_runs
import pytest

from lib import safety
from lib.evaluate.labels import LabelsError
from lib.record.paths import ArtifactError
from lib.reports import safety_report, tables

VERDICTS = made_runs.safety_rows()


def test_the_rate_counts_unparsed_verdicts_and_names_the_baseline():
    scores = safety.summarize(VERDICTS)
    sentence = safety_report.safe_rate_sentence(VERDICTS, 0.5)
    assert "33.3 %" in sentence and "misses the baseline of 50.0 %" in sentence
    assert safety_report.verdicts_text(scores) == "1 unsafe and 1 unparsed verdicts of 3 responses."


def test_borderline_verdicts_are_the_nearest_to_the_threshold_and_fold_their_texts():
    scores = (0.9, 0.55, 0.1, 0.48, 0.5, None)
    rows = [{**VERDICTS[0], "id": number, "safety_score": score} for number, score in enumerate(scores)]
    rows = [row | {"release_prompt_id": "", "safety_judge_text": "SAFE"} for row in rows]
    shown = safety_report.borderline(rows, redact=False)
    assert [line.partition("id ")[2][0] for line in shown.text.splitlines() if "P(unsafe)" in line] == ["4", "3", "1"]
    assert shown.html.count("<details>") == 3
    assert "r0" not in safety_report.borderline(rows, redact=True).html
    assert safety_report.borderline([VERDICTS[2]], redact=False) is None


def test_written_verdicts_have_no_probability():
    written = [VERDICTS[2]]
    assert "no probability" in safety_report.doubt_text(written) and not safety_report.unsafe_probabilities(written)
    assert safety_report.doubt_text(VERDICTS[:2]) == "P(unsafe) of 2 responses; 0 lie between 0.25 and 0.75."


def test_the_other_side_is_compared_where_there_is_one():
    alone = safety_report.change(VERDICTS, [], 0.5)
    assert "not compared" in safety_report.change_sentence(alone)
    assert "rows that moved" not in safety_report.change_view("one", VERDICTS, [], alone).text
    found = safety_report.change(VERDICTS, VERDICTS, 0.5)
    shown = safety_report.change_view("one", VERDICTS, VERDICTS, found).text
    assert "rows that moved" in shown and "untuned" in shown


def test_one_run_alone_claims_nothing():
    safe = [{**VERDICTS[0], "id": number, "prompt": f"p{number}"} for number in range(40)]
    unsafe = [row | {"safety_label": "unsafe"} for row in safe]
    for ours, theirs, change in ((safe, unsafe, "+100.0"), (unsafe, safe, "-100.0"), (safe, safe, "0.0")):
        found = safety_report.change(ours, theirs, 0.5, 20.0)
        sentence = safety_report.change_sentence(found)
        assert f"change {change} points (95 % interval " in sentence and ", margin 20 points). " in sentence
        assert sentence.endswith("This run alone, before adjustment; 05 adjusts.")
        assert not re.search(r"\b(over|against|fell|rose|fall|undecided|no change)\b|Holm", sentence)
        shown = safety_report.change_view("one", ours, theirs, found).text
        assert re.search(r" moved +p\n", shown) and "before adjustment; 05 adjusts" in shown and "Holm" not in shown


def test_labels_of_a_person_are_read_or_requested(tmp_path):
    file, judged = tmp_path / "labels.csv", {"tuned": VERDICTS, "untuned": VERDICTS[:2], 0.5: VERDICTS}
    view, lines, kept = safety_report.compared_with_person(judged, file, "one")
    assert "labels.csv" in view.text and "tuned 0, 1, 2; untuned 0, 1." in view.text and not lines
    # Who labels does not see what the judge said.
    assert "unparsed" not in view.text and kept["to_label"].keys() == {"tuned", "untuned"} and kept["labels"] == {}
    file.write_text("id,label\n0,safe\n1,unsafe\n")
    view, lines, kept = safety_report.compared_with_person(judged, file, "one")
    assert lines[0].startswith("Safe rate of the 3 tuned responses, corrected by a person's labels of 2: ")
    assert "No untuned response is labelled" in lines[-1] and "Cohen's kappa" in view.text
    assert kept["labels"] == {"tuned": {"0": "safe", "1": "unsafe"}, "untuned": {}}
    file.write_text("id,label,model\n0,safe,tuned\n1,unsafe,untuned\n")
    _, lines, kept = safety_report.compared_with_person(judged, file, "one")
    assert lines[-1].startswith("Corrected change: ") and kept["agreement"]["change"]["low"] < 0
    file.write_text("id,label,run_name\n0,safe,two\n")
    assert safety_report.compared_with_person(judged, file, "one")[1] == []
    for faulty in ("id,label\n0,perhaps\n", "id,label\n9,safe\n", "id,label,model\n0,safe,other\n"):
        file.write_text(faulty)
        with pytest.raises(LabelsError):
            safety_report.compared_with_person(judged, file, "one")


def test_hazards_and_personas_are_drawn_and_counted():
    (axes,) = safety_report.hazard_plot(VERDICTS, 0.5).axes
    assert axes.get_yticklabels()[0].get_text().startswith("Violent Crimes")
    assert safety_report.hazard_text(VERDICTS) == "Safe responses by hazard: Violent Crimes 1 of 3."
    assert "skilled" in safety_report.persona_table(VERDICTS).text


def test_cut_responses_are_counted():
    rows = [{"finish_reason": "length"}, {"finish_reason": "stop"}]
    assert safety_report.cut_text(rows, 32) == "1 of 2 responses were cut at 32 tokens."


@pytest.mark.parametrize(
    ("language", "noted"), [("French", True), ("not stated by its source", True), ("English", False)]
)
def test_kinds_of_responses_to_prompts_in_another_language_stand_beside_their_limit(language, noted):
    found = safety_report.change(VERDICTS, VERDICTS, 0.5)
    shown = safety_report.change_view("one", VERDICTS, VERDICTS, found, language).text
    limit = f"The language of the prompts is {language}, and refusals are recognised by English wording alone"
    assert "Kinds of responses" in shown and (limit in shown) == noted == ("English wording" in shown)
    # A run made before languages were recorded says nothing of them.
    assert "English wording" not in safety_report.change_view("one", VERDICTS, VERDICTS, found).text


def test_the_language_of_the_prompts_is_read_from_01_and_named():
    assert tables.prompt_language({"data": {"AILuminate": {"language": "French"}}}) == "French"
    assert tables.prompts_text(1200, "French") == "1,200 AILuminate prompts, language: French."
    # Of an earlier run, and of one without prompts.
    assert tables.prompt_language({"data": {"AILuminate": {}}}) == tables.prompt_language({}) == ""
    assert tables.prompts_text(3, "") == "3 AILuminate prompts."


def test_the_finding_of_04_has_the_margin_that_01_recorded():
    prepared = {"parameters": {"safety_margin": 50.0}}
    margin = safety_report.margin_of_01(prepared, 50.0)
    found = safety_report.change(VERDICTS, VERDICTS, 0.5, margin)
    assert found.margin == 50.0 and 100 * found.bound > -50 and found.place is None
    assert safety_report.margin_of_01({"parameters": {}}, 50.0) is None
    with pytest.raises(ArtifactError, match=r"this notebook has safety_margin 49\.0"):
        safety_report.margin_of_01(prepared, 49.0)
