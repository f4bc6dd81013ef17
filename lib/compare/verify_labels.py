"""What 04's manifest lists of rows to label, with the labels given, recomputed from these labels and the verdicts."""

from lib.compare.found import Found
from lib.compare.runs import SAFETY_STAGE, Run
from lib.compare.verify_tables import differing
from lib.evaluate.labels import MODELS, LabelsError, agreement, labels_record

# Versions of scipy find quantiles of beta and gamma to about eight digits.
TOLERANCE = 1e-6


def check_labels(run: Run, found: Found) -> None:
    """Rows to label, corrected rates and agreement of one run; whether a person gave these labels, no file shows."""
    claimed, where = run.facts(SAFETY_STAGE).get("labels"), f"run_{run.name}, labels of a person"
    if not claimed or not run.safety.rows:
        return
    rows = zip(MODELS, (run.safety.rows, run.safety.untuned_rows), strict=True)
    judged = {model: of_model for model, of_model in rows if of_model}
    missing = [model for model in claimed.get("to_label", {}) if model not in judged]
    if missing:
        found.absent.append(f"{where}: verdicts of the {missing[0]} model")
        return
    given = {model: {int(row_id): label for row_id, label in one.items()} for model, one in claimed["labels"].items()}
    try:
        expected = labels_record(judged, given, agreement(judged, given) if any(given.values()) else None)
    except LabelsError as error:
        found.mismatches.append(f"{where}: {error}")
        return
    found.checked["lists of rows to label, with the labels given"] += 1
    found.mismatches += [
        f"{where}: {place} is {got!r}, recomputed {one!r}"
        for place, got, one in differing(claimed, expected, tolerance=TOLERANCE)
    ]
