"""GSM8K: chat messages, few-shot pool, evaluation subset, reading a number out of an answer, scoring rows.

Data set and answer format: Cobbe et al. 2021, arXiv 2110.14168 (a worked answer whose last line is ``#### <number>``).
"""

import math
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from lib.engine.generator import Completion, Generator
from lib.record.paths import project_path
from lib.record.rows import RowLog, fill_rows
from lib.record.text_files import read_prompt

Row = dict[str, Any]
Message = dict[str, str]
Outcome = Literal["correct", "wrong", "no answer", "truncated", "run-on"]

SYSTEM_PROMPT = (
    "Solve the problem step by step. Write each step on its own line, and end with a final line of the form "
    "`#### <number>` that holds the answer as a plain number and nothing else."
)

#
# A number is matched together with everything that belongs to its notation. A notation that is not known here has no
# value, so that no part of it is taken for the number: 12,34 and 10^3 and 1:30 are not 12 and 10 and 1.

# Hyphens and minus signs of all kinds. An em dash is one only right before a number: elsewhere it parts words.
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u02d7\u2796\ufe58\ufe63\uff0d", "-"))
_EM_DASH = re.compile(r"[\u2014\u2015](?=[$£€¥₹]?[.⟨]?[0-9])")
# ½ and \frac{1}{2} become ⟨1/2⟩: brackets that no answer has keep 1½ and \frac{1}{2}5 from becoming 11/2 and 1/25.
_VULGAR_FRACTIONS = {c: f"⟨{unicodedata.normalize('NFKC', c)}⟩" for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_FULL_WIDTH = {chr(0xFEE0 + ord(c)): c for c in "0123456789./+#"}
_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])
_SPELLINGS = _DASHES | str.maketrans({**_VULGAR_FRACTIONS, **_FULL_WIDTH, "\N{DIVISION SLASH}": "/"}) | _INVISIBLE
# A plain space does not part groups: "in 2020 500 people" holds two numbers, and "1 234" may.
_SPACES = "~\u00a0\u2000-\u200a\u202f\u205f\u3000"
_SPACE = re.compile(rf"\\[,;:! ]|[{_SPACES}]")
_GROUP_SEPARATOR = re.compile(
    rf"(?<=[0-9])(?<![0-9]{{4}})(?:\{{,\}}|,?\\[,;:! ]|[_'\u2018\u2019{_SPACES}])(?=[0-9]{{3}}(?![0-9]))"
)
_LIST_MARKER = re.compile(r"^[ \t]*[-*+•][ \t]+", re.MULTILINE)

# Digits are ASCII only: \d takes those of every script. Quantifiers with a second + never give back what they took:
# with them a page of digits or commas is read once.
_INTEGER = r"(?: [0-9]{1,3}+(?:,[0-9]{3})++(?![0-9]) | [0-9]++ )"
_DECIMAL = rf"(?: {_INTEGER}(?:\.[0-9]++)? | (?<![\w.])\.[0-9]++ )"
_LATEX_FRACTION = re.compile(
    rf"""\\[dtc]?frac [ ]?
    (?: \{{[ ]?(?P<top_sign>-[ ]?)?(?P<top>{_DECIMAL})[ ]?\}} | (?P<top_digit>[0-9]) ) [ ]?
    (?: \{{[ ]?(?P<bottom_sign>-[ ]?)?(?P<bottom>{_DECIMAL})[ ]?\}} | (?P<bottom_digit>[0-9]) )""",
    re.VERBOSE,
)
# A minus is a sign unless something stands before it to subtract from: "12-18" and "20 - 2" hold no negative number.
_NOTHING_BEFORE = r"(?<![\w)\]}%⟩])"
_NOTHING_BEFORE_SPACE = rf"{_NOTHING_BEFORE}(?<![\w)\]}}%⟩][ ])"
_MINUS = rf"(?: {_NOTHING_BEFORE}-(?!\s) | {_NOTHING_BEFORE_SPACE}-[ ] )"
# What changes the number after it: ±3, --3, "negative 3", and ,5 (0.5 or 5).
_CHANGED = rf"""(?: [±∓][ ]? | \\(?:pm|over)\b[ ]? | {_NOTHING_BEFORE}[-+]{{2,4}}+
    | {_NOTHING_BEFORE_SPACE}[-+](?:[ ]?[-+]){{1,3}}+[ ]? | \b(?i:minus|negative)[ ] | (?<![\w,]),(?=[0-9]) )"""
# Numbers that are not read at all: roots, fractions of other things than numbers, digits of other scripts.
_UNKNOWN = r"(?: \\[dtc]?frac | \\sqrt | [√∛∜⅟] | [^\D0-9] ) [^\s$=]*+"
# What goes on with the number before it, in a way that is not read; then the rest of the word.
_CONTINUED = r"""(?: (?:
      [{]?[.,:_'\u2018\u2019·٫٬，][}]?[0-9⟨] | (?<=⟩)[0-9] | [ ][0-9]++/[0-9] | -[0-9]++/[0-9] | \.?\([0-9]
    | (?<![0-9]{4})[ ][0-9]{3}(?![0-9])
    | \^ | \*\*[0-9] | [²³¹\u2070-\u209c\u0300-\u036f\u20d0-\u20f0π∞√∛∜⅟⟨] | [^\D0-9]
    | [eE][-+]?[0-9] | (?<=0)[xX][0-9A-Fa-f] | [A-Za-z]{1,8}[0-9] | &[\#A-Za-z]
    | [ ]?/[ ]?[-$({\\⟨]{0,3}[0-9⟨] | [ ]?\.?\\(?:[dtc]?frac|sqrt|pi|infty|overline|bar|dot)\b
    | (?:k|K|M|bn)\b | [百千万萬億亿] | [ -]?(?i:hundred|thousand|million|billion|trillion|lakh|crore)s?\b
    | [ ]and[ ](?:a[ ](?:half|third|quarter)\b|[0-9]++/[0-9]|⟨)
    ) [^\s$=]*+ )++"""
# An operator or nothing but spaces, then a second number: "3 * 4 = 12" is not 3.
_OPERAND = r"""[ \t)\]}]*+ (?: (?<=[ \t])(?=[0-9⟨]) | (?<=[ \t])[xX](?=[ \t]?[0-9]) | (?<=[ ]):(?=[ ][0-9])
    | (?: [-+×÷·±/] | \*{1,2} | \\(?:times|cdot|div|pm|over)\b ) ) [ \t]*+[-$({\\⟨]{0,3}+[0-9]"""
# Places where no number can begin are passed at once: other characters, and rules of marks.
_NUMBER_PATTERN = rf"""(?=[-+±∓√∛∜⅟\\$£€¥₹⟨.,\dmMnN])(?![-+.,\\]{{6}}) (?: {_UNKNOWN} |
    (?P<changed>{_CHANGED})? (?P<sign>{_MINUS})? (?: \\?[$£€¥₹][ ]?(?P<inner_sign>-)? )?
    (?<![0-9^])(?<!\^[-{{])(?<!\^\{{-)(?<![0-9][.,])
    (?: (?P<whole>{_INTEGER})(?: [ ](?=[0-9]++/[0-9]) | [ ]?(?=⟨[0-9.]) ) )?
    (?: (?P<bracket>⟨)(?P<top_sign>-)? )?
    (?P<number>{_DECIMAL}(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?)
    (?: [ ]?/[ ]?(?P<divisor>{_DECIMAL}) )? (?(bracket)⟩)
    (?P<continued>{_CONTINUED})? (?: (?={_OPERAND})(?P<operand>) )? )"""
_NUMBER = re.compile(_NUMBER_PATTERN, re.VERBOSE)
# Longer ones would take minutes to compare, and no problem has them.
_MOST_CHARACTERS = 10_000

# Between `####` and its number only marks may stand, no words: "#### Step 1" and "#### 1. Add them" are headings.
# At most 40 marks, so that a page of them is not searched from each `####` to its end.
_MARKS = r"(?: [^\w\n\#] | \#(?!\#) | \\(?:boxed|(?:text|math)(?:bf|rm)?) ){0,40}?"
_HEADING_NUMBER = r"[0-9]{1,2}[.:)][ \t]+[^\W\d]"
_ANSWER_LINE = re.compile(rf"(?<!\#)\#{{4,}}+ {_MARKS} (?!{_HEADING_NUMBER}) {_NUMBER_PATTERN}", re.VERBOSE)


def _plain(text: str) -> str:
    text = _EM_DASH.sub("-", text.translate(_SPELLINGS)).replace("\N{FRACTION SLASH}", "/")
    text = _SPACE.sub(" ", _GROUP_SEPARATOR.sub(",", text))
    return _LATEX_FRACTION.sub(_bracketed, text)


def _bracketed(fraction: re.Match[str]) -> str:
    sign = "-" if bool(fraction["top_sign"]) != bool(fraction["bottom_sign"]) else ""
    return f"⟨{sign}{fraction['top'] or fraction['top_digit']}/{fraction['bottom'] or fraction['bottom_digit']}⟩"


def _is_negative(match: re.Match[str]) -> bool:
    return sum(bool(match[name]) for name in ("sign", "inner_sign", "top_sign")) % 2 == 1


def _value(match: re.Match[str]) -> Fraction | None:
    """Exact value of a match of ``_NUMBER``; None for a notation that is not known, and for a fraction over 0."""
    unread = (match[name] for name in ("changed", "continued", "operand"))
    if match["number"] is None or any(part is not None for part in unread) or len(match[0]) > _MOST_CHARACTERS:
        return None
    # 0.333... goes on for ever.
    if "." in match["number"] and match.string.startswith(("..", "…"), match.end()):
        return None
    parts = (("whole", "0"), ("number", "0"), ("divisor", "1"))
    # By way of Decimal: int() refuses more than 4,300 digits, float() loses them.
    exact = (Fraction(Decimal((match[name] or default).replace(",", ""))) for name, default in parts)
    integer, number, divisor = exact
    if divisor == 0:
        return None
    value = integer + number / divisor
    return -value if _is_negative(match) else value


def _written(match: re.Match[str] | None) -> str | None:
    """The number as written, without currency, group commas and spaces that carry nothing; None without a value."""
    if match is None or _value(match) is None:
        return None
    sign = "-" if _is_negative(match) else ""
    integer = f"{match['whole']} " if match["whole"] else ""
    divisor = f"/{match['divisor']}" if match["divisor"] else ""
    return f"{sign}{integer}{match['number']}{divisor}".replace(",", "")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    # A list of all of them would hold gigabytes for a long text of digits and spaces.
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0] if last else None


def parse_number(text: str | None) -> Fraction | None:
    """Exact value of the first number in ``text``; None without one, or where its notation is not known.

    Read are ``-3.5``, ``$1,234.``, ``70_000``, ``3/4``, ``1 1/2``, ``1½``, ``\\frac{3}{4}``, ``2e3``; a percentage is
    the number before its sign (GSM8K asks "what percent" and answers ``25``).
    """
    match = _NUMBER.search(_plain(text or ""))
    return _value(match) if match else None


def extract_answer(text: str | None) -> str | None:
    """The number after the last ``####`` that has one on its line; None without one or in an unknown notation."""
    return _written(_last(_ANSWER_LINE, _plain(text or "")))


def extract_answer_flexible(text: str | None) -> str | None:
    """Flexible reading: the strict one or, where no ``####`` has a number that is read, the last number anywhere."""
    # A list marker is no minus sign: "- 18 apples" as a line is 18.
    return extract_answer(text) or _written(_last(_NUMBER, _LIST_MARKER.sub("", _plain(text or ""))))


def is_correct(predicted: str | None, gold: str | None) -> bool:
    """Whether both hold a number and these are equal, exactly: ``18``, ``18.0`` and ``$18.`` are, None never is."""
    value = parse_number(predicted)
    return value is not None and value == parse_number(gold)


@dataclass(frozen=True)
class Split:
    """Few-shot pool and development rows (both of GSM8K train) and training rows of a run."""

    fewshot: list[Row]
    dev: list[Row]
    train: list[Row]
    num_removed: int  # training rows whose question is in the pool or among the development rows


_QUOTATION_MARKS = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
# "Question:", "Q3." and "**Question 12:**" before a question, but not "Question 1.5 kg of flour".
_QUESTION_LABEL = re.compile(r"\A[\W_]*q(?:uestion)?[*_ ]{0,3}#?[0-9]{0,4}[*_ ]{0,3}(?::|[.)](?![0-9]))")
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_APOSTROPHE = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")
# All that is no word, but for a decimal point: 1.5 and .5 are other numbers than 15 and 5. `operator` stands where it
# makes another problem: 2*3, 2/3, 2^3, 20-5, -5, 5 %.
_PUNCTUATION = re.compile(
    r"""(?P<operator> (?<=[0-9])[ ]?[*/^-](?=[ ]?[0-9]) | (?<![\w-])-(?=[ ]?[0-9]) | % )
    | [^\w\s.] | _ | \.(?![0-9]) | (?<=[^\W\d_])\. | (?<=\.)\.""",
    re.VERBOSE,
)


def plain_spelling(text: str) -> str:
    """One spelling for a text in other case, spacing, width, dashes, quotation marks or with invisible characters."""
    visible = text if text.isascii() else "".join(map(_visible, text))
    text = unicodedata.normalize("NFKC", visible).translate(_DASHES).translate(_QUOTATION_MARKS).casefold()
    return " ".join(text.split())


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":  # zero-width space and joiner, soft hyphen, byte order mark, marks of direction
        return ""
    # NFKC alone makes 52 of "5²" and 11/2 of "1½".
    return f" {character}" if category == "No" else character


@lru_cache(maxsize=1 << 16)
def normalise_question(text: str) -> str:
    """Words and numbers by which copies of a question are found, without punctuation and label ("Question 3:")."""
    spelled = plain_spelling(text)
    words = _QUESTION_LABEL.sub("", spelled).replace("\N{FRACTION SLASH}", "/")
    words = _APOSTROPHE.sub("", _THOUSANDS_COMMA.sub("", words))
    # Where nothing but marks is left, they are the question.
    return " ".join(_PUNCTUATION.sub(_spaced, words).split()) or spelled


def _spaced(match: re.Match[str]) -> str:
    category = unicodedata.category(match[0][-1])
    if category[0] == "M":  # a combining mark is part of its letter
        return match[0]
    return f" {match[0]} " if match["operator"] or category == "Sm" else " "  # Sm: + = < × and their like


def eval_indices(num_rows: int, fraction: float, seed: int) -> list[int]:
    """The first ``floor(fraction * num_rows)`` of a seeded permutation, as ``datasets.Dataset.shuffle`` takes them.

    A fraction of 1.0 keeps every row, in order. Raises ValueError outside (0, 1], or where no row is left.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"gsm8k_eval_fraction is {fraction}; allowed: above 0, up to 1")
    # The fraction as it is written: 0.29 * 100 is 28.999999999999996 in floating point.
    num_kept = math.floor(Fraction(str(fraction)) * num_rows)
    if num_kept == 0:
        raise ValueError(f"gsm8k_eval_fraction is {fraction} of {num_rows} rows: no row is left; raise it")
    if num_kept == num_rows:
        return list(range(num_rows))
    return np.random.default_rng(seed).permutation(num_rows)[:num_kept].tolist()


def split_train(
    gsm8k_train: Sequence[Row],
    train_rows: Sequence[Row],
    *,
    pool_size: int,
    dev_rows: int,
    max_train_rows: int,
    seed: int,
    examples: Sequence[Row] | None = None,
) -> Split:
    """Draw the few-shot pool and the development rows from GSM8K train, and take their questions out of training.

    Both depend on ``gsm8k_train`` and ``seed`` alone: presets that train on another file have the same examples.
    ``examples`` take the place of the pool; development rows are then drawn as they are beside the pool, without the
    questions of the examples. ``max_train_rows`` (0 = all) is a seeded choice kept in the file's order. Raises
    ValueError where GSM8K train has too few distinct questions, or no training row is left.
    """
    rng = np.random.default_rng(seed)
    distinct: dict[str, Row] = {}
    for index in rng.permutation(len(gsm8k_train)):
        distinct.setdefault(normalise_question(gsm8k_train[index]["question"]), gsm8k_train[index])
    shuffled = list(distinct.values())
    pool = shuffled[:pool_size] if examples is None else list(examples)
    shown = {normalise_question(row["question"]) for row in pool}
    free = [row for row in shuffled[pool_size:] if normalise_question(row["question"]) not in shown]
    num_distinct, dev = len(shuffled[:pool_size]) + len(free), free[:dev_rows]
    if pool_size + dev_rows > num_distinct:
        raise ValueError(
            f"fewshot_pool_size is {pool_size} and dev_rows is {dev_rows}, together {pool_size + dev_rows}; "
            f"allowed: up to the {num_distinct} distinct questions of GSM8K train"
        )
    held_out = shown | {normalise_question(row["question"]) for row in dev}
    kept = [row for row in train_rows if normalise_question(row["question"]) not in held_out]
    if not kept:
        raise ValueError(
            f"no training row is left: {len(train_rows)} rows, all of them among the {len(held_out)} that "
            f"fewshot_pool_size ({pool_size}) and dev_rows ({dev_rows}) keep out; lower them or add rows"
        )
    num_removed = len(train_rows) - len(kept)
    if 0 < max_train_rows < len(kept):
        # A seeded choice and not the first rows: a file sorted by topic or length would give a lopsided sample.
        kept = [kept[index] for index in sorted(rng.permutation(len(kept))[:max_train_rows])]
    return Split(pool, dev, kept, num_removed)


def fewshot_examples(pool: Sequence[Row], fewshot_k: int) -> list[Row]:
    """The first ``fewshot_k`` rows of the pool; ValueError where it holds fewer."""
    if not 0 <= fewshot_k <= len(pool):
        raise ValueError(f"fewshot_k is {fewshot_k}; allowed: 0 to {len(pool)}, the rows of the few-shot pool")
    return list(pool[:fewshot_k])


def read_system_prompt(system_prompt_file: str) -> str:
    """The system message of training and evaluation: of the file, or ours where none is named; TextFileError."""
    return read_prompt(project_path(system_prompt_file)) if system_prompt_file else SYSTEM_PROMPT


def build_messages(question: str, fewshot: Sequence[Row], system: str = SYSTEM_PROMPT) -> list[Message]:
    """Chat of an evaluation: system, then each example as a user and an assistant turn, then the question."""
    messages = [{"role": "system", "content": system}]
    for example in fewshot:
        messages.append({"role": "user", "content": example["question"]})
        messages.append({"role": "assistant", "content": example["answer"]})
    return [*messages, {"role": "user", "content": question}]


def without_calculator_marks(answer: str) -> str:
    """The answer without GSM8K's ``<<48/2=24>>``."""
    return re.sub(r"<<[^<>\n]*>>", "", answer)


def training_messages(row: Mapping[str, Any], system: str = SYSTEM_PROMPT) -> list[Message]:
    """Chat of a training row: as in evaluation, zero-shot, and the answer with its marks (baselines were set so)."""
    return [*build_messages(row["question"], [], system), {"role": "assistant", "content": row["answer"]}]


def evaluate(
    rows: Sequence[Row],
    fewshot: Sequence[Row],
    generator: Generator,
    *,
    max_new_tokens: int,
    log: RowLog,
    system: str = SYSTEM_PROMPT,
) -> list[Row]:
    """Scored rows in the order of ``rows`` (``test_index, question, answer``); those not in ``log`` are answered."""
    # A share of the rows has their numbers.
    numbered = [{"id": position, **row} for position, row in enumerate(rows)]
    check_kept({row["id"]: row for row in numbered}, log)

    def generate(missing: list[Row], record: Callable[[int, Completion], None]) -> None:
        conversations = [build_messages(row["question"], fewshot, system) for row in missing]
        generator.generate(conversations, max_new_tokens=max_new_tokens, on_completion=record)

    return fill_rows(log, numbered, generate, _scored_row, kind="answers")


def check_kept(rows: Mapping[int, Row], log: RowLog) -> None:
    """Score ``log``'s rows by today's rules; ValueError where one is about another question than ``rows`` has."""
    for row_id, kept in log.rows.items():
        row = rows.get(row_id)
        if row and (kept["question"], kept["gold_answer"]) != (row["question"], row["answer"]):
            raise ValueError(f"{log.path.name} holds another question under id {row_id}; delete the file")
        log.rows[row_id] = {**kept, **score_row(kept)}


def _scored_row(row: Row, completion: Completion) -> Row:
    answered = {"id": row["id"], "question": row["question"], "gold_answer": row["answer"]}
    answered |= {"model_output": completion.text}
    score = score_row({**answered, "finish_reason": completion.finish_reason})
    counts = {name: getattr(completion, name) for name in ("finish_reason", "num_prompt_tokens", "num_output_tokens")}
    first = {name: score.pop(name) for name in ("parsed_final", "correct")}
    # In the order of the columns that every row file has.
    return {**answered, **first, "test_index": row["test_index"], **score, **counts}


def score_row(row: Mapping[str, Any]) -> Row:
    """Both readings, whether each is correct, and ``outcome``, from a row's texts; ValueError for a bad gold answer."""
    score = _score(row["gold_answer"], row["model_output"], row.get("finish_reason") == "length")
    if score is None:
        raise ValueError(f"gold answer of row {row.get('id')} has no number after '####': {row['gold_answer'][-80:]!r}")
    # A copy: the kept one must stay what the texts say.
    return dict(score)


# A comparison scores each row half a dozen times, and reading its texts takes 0.2 ms; 32,768 rows hold some 50 MB.
@lru_cache(maxsize=32_768)
def _score(gold_answer: str, model_output: str, cut_off: bool) -> Row | None:
    """As ``score_row``; None where the gold answer has no number."""
    gold = extract_answer(gold_answer)
    if gold is None:
        return None
    strict, flexible = extract_answer(model_output), extract_answer_flexible(model_output)
    score = {"parsed_final": strict, "correct": is_correct(strict, gold)}
    score |= {"parsed_flexible": flexible, "correct_flexible": is_correct(flexible, gold)}
    read = {"model_output": model_output, "finish_reason": "length" if cut_off else "stop"}
    return {**score, "outcome": outcome({**read, **score})}


def outcome(row: Mapping[str, Any]) -> Outcome:
    """What became of a row, read strictly; the first that holds:

    ``correct``; ``truncated``, the token limit came before an answer; ``no answer``, without a ``####`` number;
    ``run-on``, wrong and with text after the first answered ``####`` line (an invented next question, say); ``wrong``.
    A row without ``finish_reason`` is never ``truncated``.
    """
    if row["correct"]:
        return "correct"
    if row["parsed_final"] is None:
        return "truncated" if row.get("finish_reason") == "length" else "no answer"
    return "run-on" if _goes_on(row["model_output"]) else "wrong"


def _goes_on(text: str) -> bool:
    """Whether a line with text follows the first answered ``####`` line."""
    text = _plain(text)
    match = _ANSWER_LINE.search(text)
    return match is not None and bool(text[match.end() :].partition("\n")[2].strip())


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and rates over all ``rows``, each scored again; ``mean_output_tokens`` is None where one is unknown."""
    if not rows:
        raise ValueError("no rows to summarise: an accuracy needs at least one")
    scores = [score_row(row) for row in rows]
    summary: dict[str, Any] = {"n": len(rows)}
    for suffix in ("", "_flexible"):
        summary[f"num_correct{suffix}"] = sum(score[f"correct{suffix}"] for score in scores)
        summary[f"accuracy{suffix}"] = summary[f"num_correct{suffix}"] / len(rows)
    counts = Counter(score["outcome"] for score in scores)
    summary["outcomes"] = {kind: counts[kind] for kind in get_args(Outcome)}
    tokens = [row.get("num_output_tokens") for row in rows]
    return summary | {"mean_output_tokens": None if None in tokens else sum(tokens) / len(tokens)}
