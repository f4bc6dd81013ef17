"""Many prompts in, texts or label probabilities out, fast: the one place where the project has its own engine.

Greedy decoding: the most likely token, no logits processor, whatever the model's generation_config says; or, where a
call asks for it, seeded draws at a temperature that do not depend on the rows beside them. The tokens that all prompts
of a call begin with are computed once (`attention` holds how they are attended to); rows leave the batch as they finish
and waiting rows take their places; the batch is as large as free memory allows and halves, saying so, where that was
too much. Models with attention of another kind go through ``model.generate``. Knows nothing about GSM8K, verdicts or
files.
"""

import hashlib
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lib.attention import ATTENTION_NAME, SharedPrefix, SlotCache, compute_prefix, forward_step, pack_step
from lib.memory import free_memory_bytes, is_out_of_memory, row_bytes, step_bytes
from lib.model import Runtime, load_dense, load_tokenizer, render_prompt, stop_token_ids

Conversation = Sequence[Mapping[str, str]]
FinishReason = Literal["stop", "length"]
Key = str | int
SUPPORTED_MODELS = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# A shorter prefix costs more in merging than it saves.
MIN_PREFIX_TOKENS = 16
# Entering rows are prefilled in portions of about this many tokens: enough to keep the matrix units busy, and few
# enough that activations stay in the caches of a CPU.
PREFILL_TOKENS = 768
# Rows whose labels are scored in one go: the steps for a label's further tokens are then shared by so many.
SCORED_ROWS = 16
MAX_ROWS = 256
# What is free now is not all ours: the allocator fragments, and other processes move.
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    ``token_ids`` and ``num_output_tokens`` are without the stop token; ``text`` is without special tokens.
    """

    text: str
    finish_reason: FinishReason
    num_output_tokens: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """Draw each token from the model's distribution at a temperature, without cutting it (no top-k, no top-p).

    The random number of a token is a hash of ``seed``, the key of its conversation and its place in the answer, so a
    row draws the same numbers whatever rows are beside it and in whatever order; no generator has a state to restore.

    Raises:
        ValueError: ``temperature`` is not a finite number above 0.
    """

    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; allowed: above 0 (without sampling it is greedy)")

    def uniform(self, key: Key, place: int) -> float:
        """The random number in [0, 1) of the token at ``place`` (from 0) of the answer to conversation ``key``."""
        digest = hashlib.blake2b(json.dumps([self.seed, key, place]).encode(), digest_size=8).digest()
        # 52 bits: then its product with a sum of probabilities stays below that sum.
        return (int.from_bytes(digest) >> 12) / 2**52


@dataclass
class EngineStats:
    """What the last call cost. ``prefill_s`` counts every step in which a prompt was read, the prefix included."""

    wall_s: float = 0.0
    num_rows: int = 0
    num_output_tokens: int = 0
    tokens_per_s: float = 0.0
    num_prefix_tokens: int = 0
    peak_rows: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
    num_halvings: int = 0


@dataclass
class _Row:
    """One prompt on its way: its own tokens are those after the shared prefix."""

    index: int
    prompt: list[int]
    num_prompt_tokens: int
    output: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


@dataclass(frozen=True)
class _Picker:
    """Chooses the next token of each row: the most likely one, or a drawn one where there is a ``sampling``."""

    sampling: Sampling | None
    keys: Sequence[Key]

    def __call__(self, logits: Tensor, rows: Sequence[_Row], places: Sequence[int]) -> list[int]:
        """``logits`` (rows, vocabulary); ``places`` of the tokens to choose in their answers."""
        if self.sampling is None:
            return pick_tokens(logits)
        uniforms = [self.sampling.uniform(self.keys[row.index], place) for row, place in zip(rows, places, strict=True)]
        return draw_tokens(logits, uniforms, self.sampling.temperature)


class Engine:
    """Generation, greedy or sampled, and label scoring for one model.

    The weights must stay as they are while the engine lives: it keeps the keys and values of the last shared prefix.

    Args:
        model: in eval mode; its attention implementation is changed during a call only.
        batch_size: most rows at a time; 0 derives it from the free memory of the device.

    Raises:
        ValueError: the model is in training mode, or ``batch_size`` is negative.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 0) -> None:
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before building an Engine")
        if batch_size < 0:
            raise ValueError(f"batch_size is {batch_size}; allowed: 0 (from free memory) or more")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.stop_ids = frozenset(stop_token_ids(model, tokenizer))
        self.refusal = why_not_shared(model)
        self.stats = EngineStats()
        # Seconds of all calls so far; ``stats`` is of the last one.
        self.work_s = 0.0
        self._prefix: SharedPrefix | None = None

    def describe(self) -> dict[str, object]:
        """What runs and why, for the record of a run."""
        return {
            "engine": "plain batches" if self.refusal else "shared prefix",
            "why": self.refusal or f"{type(self.model).__name__} with full attention in every layer",
            "decoding": "greedy, no logits processor",
            "stop_token_ids": sorted(self.stop_ids),
            "stop_tokens": [self.tokenizer.decode([token]) for token in sorted(self.stop_ids)],
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "batch_size": self.batch_size or f"at most {MAX_ROWS}, from free memory",
        }

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        on_completion: Callable[[int, Completion], None] | None = None,
        sampling: Sampling | None = None,
        keys: Sequence[Key] | None = None,
    ) -> list[Completion]:
        """One completion a conversation, in the order asked for.

        Args:
            max_new_tokens: most tokens a row, a stop token included.
            on_completion: called once for each row, with its index, as soon as it is done.
            sampling: draws instead of greedy decoding.
            keys: one a conversation, what its draws are told apart by; None: its index. Conversations with the same
                key and the same prompt get the same answer.

        Raises:
            ValueError: ``max_new_tokens`` below 1, a prompt that does not fit the model's positions, or another number
                of keys than of conversations.
            FloatingPointError: the model's logits are not numbers.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
        pick = _Picker(sampling, range(len(conversations)) if keys is None else keys)
        if len(pick.keys) != len(conversations):
            raise ValueError(f"{len(pick.keys)} keys for {len(conversations)} conversations; allowed: one each")
        if sampling is not None:
            # A prefix kept from an earlier call may be shorter or longer, and rounding with it: by a near tie a row
            # would then depend on what was asked before.
            self._prefix = None
        results: dict[int, Completion] = {}

        def emit(index: int, completion: Completion) -> None:
            results[index] = completion
            if on_completion is not None:
                on_completion(index, completion)

        with self._call(conversations, max_new_tokens) as prompts:
            way = self._generate_plain if self.refusal else self._generate_shared
            if prompts:
                way(prompts, max_new_tokens, emit, pick)
            self.stats.num_output_tokens = sum(done.num_output_tokens for done in results.values())
        return [results[index] for index in range(len(prompts))]

    def label_probabilities(
        self,
        conversations: Sequence[Conversation],
        *,
        labels: Sequence[str],
        on_result: Callable[[int, list[float]], None] | None = None,
    ) -> list[list[float]]:
        """How likely each label is as the beginning of the answer, relative to the other labels.

        The log-probability of a label is the sum over its tokens (``UNSAFE`` may be two), so a label is not favoured
        for being one token; a softmax over the labels makes each row sum to 1.

        Returns:
            One row a conversation, one probability a label.

        Raises:
            ValueError: fewer than two labels, an empty one, or one whose tokens begin another's.
        """
        label_ids = self._encode_labels(labels)
        results: dict[int, list[float]] = {}

        def emit(index: int, log_probabilities: Tensor) -> None:
            results[index] = torch.softmax(log_probabilities.double(), dim=-1).tolist()
            if on_result is not None:
                on_result(index, results[index])

        with self._call(conversations, max(map(len, label_ids))) as prompts:
            way = self._score_plain if self.refusal else self._score_shared
            if prompts:
                way(prompts, label_ids, emit)
        return [results[index] for index in range(len(prompts))]

    # --- what both kinds of call share ---

    @contextmanager
    def _call(self, conversations: Sequence[Conversation], num_new_tokens: int) -> Iterator[list[list[int]]]:
        """Renders the prompts and times what is done with them."""
        start = time.perf_counter()
        self.stats = EngineStats(num_rows=len(conversations))
        prompts = [render_prompt(self.tokenizer, conversation) for conversation in conversations]
        self._check_positions(prompts, num_new_tokens)
        attention = self.model.config._attn_implementation
        if not self.refusal:
            self.model.set_attn_implementation(ATTENTION_NAME)
        try:
            with torch.inference_mode():
                yield prompts
        finally:
            if not self.refusal:
                self.model.set_attn_implementation(attention)
        self.stats.wall_s = time.perf_counter() - start
        self.work_s += self.stats.wall_s
        self.stats.tokens_per_s = self.stats.num_output_tokens / self.stats.wall_s

    def _check_positions(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> None:
        limit = self.model.config.max_position_embeddings
        for index, prompt in enumerate(prompts):
            if len(prompt) + num_new_tokens > limit:
                raise ValueError(
                    f"conversation {index} has {len(prompt)} prompt tokens and {num_new_tokens} new ones, the model "
                    f"has {limit} positions; shorten the prompt (fewshot_k) or lower max_new_tokens"
                )

    def _encode_labels(self, labels: Sequence[str]) -> list[list[int]]:
        label_ids = [self.tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
        if len(labels) < 2 or not all(label_ids):
            raise ValueError(f"labels are {list(labels)!r}; allowed: two or more that are not empty")
        for one in range(len(labels)):
            for other in range(len(labels)):
                if one != other and label_ids[other][: len(label_ids[one])] == label_ids[one]:
                    raise ValueError(f"the tokens of label {labels[one]!r} begin those of {labels[other]!r}")
        return label_ids

    def _shared_rows(self, prompts: Sequence[Sequence[int]]) -> deque[_Row]:
        """The rows without the tokens they share, longest first, so that the longest do not run alone at the end."""
        shared = self._find_prefix(prompts)
        self.stats.num_prefix_tokens = shared
        rows = [_Row(index, list(prompt[shared:]), len(prompt)) for index, prompt in enumerate(prompts)]
        return deque(sorted(rows, key=lambda row: len(row.prompt), reverse=True))

    def _find_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """Length of the prefix to share; its keys and values are ready afterwards."""
        common = common_prefix_length(prompts)
        kept = self._prefix.tokens if self._prefix is not None else ()
        fits = len(kept) <= common and kept == tuple(prompts[0][: len(kept)])
        # Fewer rows may happen to share a few tokens more; not worth computing the prefix anew.
        if fits and len(kept) >= max(0.9 * common, MIN_PREFIX_TOKENS):
            return len(kept)
        self._prefix = None
        if len(prompts) < 2 or common < MIN_PREFIX_TOKENS:
            return 0
        start = time.perf_counter()
        self._prefix = compute_prefix(self.model, prompts[0][:common])
        self.stats.prefill_s += time.perf_counter() - start
        return common

    def _with_halving(self, num_rows: int, attempt: Callable[[int], None]) -> None:
        """Calls ``attempt`` with a number of rows, and with half of it again each time that memory runs out."""
        while True:
            try:
                return attempt(num_rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or num_rows == 1:
                    raise
                shortage = str(error).splitlines()[0]
            # Outside the except block: the exception's frames hold the tensors that must go first.
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory with {num_rows} rows, going on with {num_rows // 2}: {shortage}", stacklevel=2
            )
            self.stats.num_halvings += 1
            num_rows //= 2

    def _in_slots(
        self,
        waiting: deque[_Row],
        run: Callable[["_SlotBatch"], None],
        num_new_tokens: int,
        most_rows: int = MAX_ROWS,
    ) -> None:
        """Runs all waiting rows, up to ``most_rows`` at a time.

        Those under way when memory runs out wait again, with the tokens they have.
        """
        capacity = max(len(row.prompt) for row in waiting) + num_new_tokens

        def attempt(num_slots: int) -> None:
            batch = _SlotBatch(self.model, self._prefix, num_slots, self.stats)
            try:
                run(batch)
            finally:
                for row in batch.active:
                    row.cached = 0
                    waiting.appendleft(row)

        self._with_halving(self._num_slots(min(len(waiting), most_rows), capacity), attempt)

    def _num_slots(self, num_rows: int, capacity: int) -> int:
        if self.batch_size:
            return min(self.batch_size, num_rows)
        portion = step_bytes(self.model, max(PREFILL_TOKENS, capacity))
        free = MEMORY_SHARE * free_memory_bytes(self.model.device) - portion
        a_row = row_bytes(self.model, capacity)
        if self.refusal:
            # The plain way reads the prompts of all rows at once.
            a_row += step_bytes(self.model, capacity)
        return max(1, min(num_rows, MAX_ROWS, int(free / a_row)))

    def _complete(self, row: _Row, finish_reason: FinishReason) -> Completion:
        text = self.tokenizer.decode(row.output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(text, finish_reason, len(row.output), row.num_prompt_tokens, tuple(row.output))

    # --- shared prefix ---

    def _generate_shared(self, prompts: list[list[int]], max_new_tokens: int, emit: Callable, pick: _Picker) -> None:
        waiting = self._shared_rows(prompts)

        def run(batch: "_SlotBatch") -> None:
            while waiting or batch.active:
                batch.admit(waiting)
                tokens = pick(batch.forward(), batch.active, [len(row.output) for row in batch.active])
                reasons = [self._take_token(*pair, max_new_tokens) for pair in zip(batch.active, tokens, strict=True)]
                for row, reason in batch.remove_finished(reasons):
                    emit(row.index, self._complete(row, reason))

        self._in_slots(waiting, run, max_new_tokens)

    def _take_token(self, row: _Row, token: int, max_new_tokens: int) -> FinishReason | None:
        """Adds a token to a row; returns why the row is done with it, or None."""
        if token in self.stop_ids:
            return "stop"
        row.output.append(token)
        return "length" if len(row.output) == max_new_tokens else None

    def _score_shared(self, prompts: list[list[int]], labels: list[list[int]], emit: Callable) -> None:
        waiting = self._shared_rows(prompts)

        def run(batch: "_SlotBatch") -> None:
            while waiting:
                scores = _score_labels(batch, waiting, labels)
                rows, batch.active = batch.active, []
                for row, score in zip(rows, scores, strict=True):
                    emit(row.index, score)

        self._in_slots(waiting, run, max(map(len, labels)), SCORED_ROWS)

    # --- plain way ---

    def _generate_plain(self, prompts: list[list[int]], max_new_tokens: int, emit: Callable, pick: _Picker) -> None:
        def run(rows: list[_Row]) -> None:
            prompts_here = [row.prompt for row in rows]
            draw = _DrawProcessor(pick, rows) if pick.sampling else None
            outputs = generate_batch(self.model, prompts_here, max_new_tokens, self.stop_ids, draw)
            for row, output in zip(rows, outputs, strict=True):
                done = next((place for place, token in enumerate(output) if token in self.stop_ids), None)
                row.output = output[:done]
                emit(row.index, self._complete(row, "length" if done is None else "stop"))

        self._in_plain_batches(prompts, run, max_new_tokens)

    def _score_plain(self, prompts: list[list[int]], labels: list[list[int]], emit: Callable) -> None:
        def run(rows: list[_Row]) -> None:
            scores = [score_batch(self.model, [row.prompt for row in rows], label) for label in labels]
            for row, score in zip(rows, torch.stack(scores, dim=-1).cpu(), strict=True):
                emit(row.index, score)

        self._in_plain_batches(prompts, run, max(map(len, labels)))

    def _in_plain_batches(
        self, prompts: list[list[int]], run: Callable[[list[_Row]], None], num_new_tokens: int
    ) -> None:
        """Batches of rows of like length, longest first; their order does not depend on what ran before."""
        rows = sorted(
            (_Row(index, list(prompt), len(prompt)) for index, prompt in enumerate(prompts)),
            key=lambda row: len(row.prompt),
            reverse=True,
        )
        capacity = max(len(row.prompt) for row in rows) + num_new_tokens

        def attempt(num_rows: int) -> None:
            while rows:
                run(rows[:num_rows])
                self.stats.peak_rows = max(self.stats.peak_rows, len(rows[:num_rows]))
                del rows[:num_rows]

        self._with_halving(self._num_slots(len(rows), capacity), attempt)


def load_engine(
    folder: Path,
    runtime: Runtime,
    quantization: str,
    adapter_dir: Path | None = None,
    batch_size: int = 0,
    adapter_scale: float = 1.0,
) -> Engine:
    """The engine over the dense model of ``folder``, with the adapter merged in where one is named.

    Args:
        folder: model and tokenizer.
        quantization, adapter_dir, adapter_scale: see ``lib.model.load_dense``.
        batch_size: rows at once; 0: derived from free memory.
    """
    dense = load_dense(folder, runtime, quantization, adapter_dir, adapter_scale)
    return Engine(dense, load_tokenizer(folder), batch_size=batch_size)


class _SlotBatch:
    """The rows under way: row ``i`` of ``active`` has its keys and values in slot ``i``."""

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: SharedPrefix | None,
        num_slots: int,
        stats: EngineStats,
    ) -> None:
        self.model, self.prefix, self.stats = model, prefix, stats
        self.cache = SlotCache(model.config, num_slots, model.dtype, model.device)
        self.active: list[_Row] = []

    def admit(self, waiting: deque[_Row]) -> None:
        """Takes waiting rows in: as many as there are free slots for and fit one portion, but at least one."""
        free, num_tokens = self.cache.num_slots - len(self.active), 0
        while waiting and free:
            num_tokens += len(waiting[0].tokens)
            if num_tokens > PREFILL_TOKENS and num_tokens > len(waiting[0].tokens):
                break
            self.active.append(waiting.popleft())
            free -= 1

    def forward(self, num_parked: int = 0) -> Tensor:
        """Feeds each row the tokens that are not in its slot yet: one to a row under way, all to one that enters.

        Changes nothing but the slots when it fails, so the rows can start again.

        Args:
            num_parked: the first so many rows are fed nothing; all others must then be rows that enter.

        Returns:
            Logits after the last token of each row that was fed, (rows, vocabulary).
        """
        start = time.perf_counter()
        fed = self.active[num_parked:]
        decoding = [(row.tokens[row.cached], row.cached) for row in fed if row.cached]
        entering = [row.tokens for row in fed if not row.cached]
        offset = len(self.prefix.tokens) if self.prefix is not None else 0
        step = pack_step(self.cache, decoding, entering, offset, num_parked)
        logits = forward_step(self.model, self.cache, step, self.prefix)
        for row in fed:
            row.cached = len(row.tokens)
        self._count(bool(entering), time.perf_counter() - start)
        return logits

    def remove_finished(self, reasons: Sequence[FinishReason | None]) -> list[tuple[_Row, FinishReason]]:
        """Frees the slots of rows with a reason; the last row moves into each, so that the first slots stay in use."""
        finished = [(row, reason) for row, reason in zip(self.active, reasons, strict=True) if reason is not None]
        for position in reversed(range(len(reasons))):
            if reasons[position] is not None:
                last = self.active.pop()
                if position < len(self.active):
                    self.cache.move(len(self.active), position, last.cached)
                    self.active[position] = last
        return finished

    def _count(self, prefill: bool, seconds: float) -> None:
        self.stats.num_steps += 1
        self.stats.peak_rows = max(self.stats.peak_rows, len(self.active))
        if prefill:
            self.stats.prefill_s += seconds
        else:
            self.stats.decode_s += seconds


# --- picking ------------------------------------------------------------------------------------------------------


def pick_tokens(logits: Tensor) -> list[int]:
    """The most likely token of each row of (rows, vocabulary).

    Raises:
        FloatingPointError: a row's logits are not numbers (a dtype that overflows), and any pick would be arbitrary.
    """
    # Not argmax: over bfloat16 it takes the CPU six times as long. Both give the first of equals.
    best, tokens = logits.max(dim=-1)
    # One transfer for both: -1 marks a row whose best logit is not a number.
    return _require_numbers(tokens.masked_fill(best.isnan(), -1).tolist())


def draw_tokens(logits: Tensor, uniforms: Sequence[float], temperature: float) -> list[int]:
    """A token of each row of (rows, vocabulary), drawn from softmax(logits / temperature) by inverting its sum.

    Args:
        uniforms: a number in [0, 1) a row: the share of the probability that lies before the drawn token.

    Raises:
        FloatingPointError: as ``pick_tokens``.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    # In float64: over 150,000 tokens a float32 sum is off by more than the rarer tokens weigh.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    shares = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    # The first token whose sum is above the share: never one without probability.
    tokens = torch.searchsorted(cumulative, shares * total, right=True)
    return _require_numbers(tokens.masked_fill(total.isnan(), -1).squeeze(-1).tolist())


def _require_numbers(picked: list[int]) -> list[int]:
    if -1 in picked:
        raise FloatingPointError("the model's logits are NaN, its dtype overflows; use compute_dtype: float32")
    return picked


def _score_labels(batch: _SlotBatch, waiting: deque[_Row], labels: list[list[int]]) -> Tensor:
    """Log-probability of each label after as many waiting rows as there are slots for; those are active then.

    Prompts are read in portions, the labels' further tokens for all rows at once: such a step costs as much for one row
    as for many.

    Returns:
        (rows, labels) in float32 on the CPU.
    """
    portions = []
    while waiting and len(batch.active) < batch.cache.num_slots:
        num_parked = len(batch.active)
        batch.admit(waiting)
        for row in batch.active[num_parked:]:
            # What memory running out has left of an earlier attempt.
            row.output = []
        portions.append(torch.log_softmax(batch.forward(num_parked).float(), dim=-1))
    first = torch.cat(portions)
    scores = []
    for label in labels:
        score = first[:, label[0]]
        for row in batch.active:
            # Each label starts right after the prompt and overwrites the tokens of the one before.
            row.output, row.cached = [], len(row.prompt)
        for token, following in pairwise(label):
            for row in batch.active:
                row.output.append(token)
            score = score + torch.log_softmax(batch.forward().float(), dim=-1)[:, following]
        scores.append(score)
    return torch.stack(scores, dim=-1).cpu()


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with, leaving each at least one token of its own."""
    low, high = min(prompts), max(prompts)
    # All others lie between the two in the order of lists, so they share what these two share.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
    return min(shared, min(map(len, prompts)) - 1)


def why_not_shared(model: PreTrainedModel) -> str:
    """Why the shared-prefix engine does not take this model; empty when it does."""
    config = model.config
    if not isinstance(model, SUPPORTED_MODELS):
        allowed = ", ".join(supported.__name__ for supported in SUPPORTED_MODELS)
        return f"{type(model).__name__} is none of {allowed}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"layers with {', '.join(sorted(kinds))}"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rope_type {rope} makes a token's position depend on the longest row beside it"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return ""


# --- the plain way ------------------------------------------------------------------------------------------------


def greedy_config(max_new_tokens: int, stop_ids: Iterable[int]) -> GenerationConfig:
    """Greedy decoding with every field that could change a logit set to do nothing."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
        use_cache=True,
    )


@contextmanager
def own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Puts ``config`` in the place of the model's own.

    ``generate(generation_config=...)`` fills what is None there from the model's: so would a repetition penalty that
    ships with the weights come back.
    """
    shipped, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = shipped


class _DrawProcessor(LogitsProcessor):
    """Leaves each row the one token that is drawn for it, so that ``model.generate`` takes it greedily."""

    def __init__(self, pick: _Picker, rows: Sequence[_Row]) -> None:
        self.pick, self.rows = pick, rows
        self.longest = max(len(row.prompt) for row in rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` (rows, tokens so far), ``scores`` (rows, vocabulary) before any other change."""
        # Prompts are padded to the longest, so all rows are at the same place.
        place = input_ids.shape[1] - self.longest
        tokens = torch.tensor(self.pick(scores, self.rows, [place] * len(self.rows)), device=scores.device)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    draw: LogitsProcessor | None = None,
) -> list[list[int]]:
    """``model.generate`` over left-padded prompts: the new tokens of each row, with what follows a stop token.

    Args:
        draw: takes the place of the most likely token; None: greedy.
    """
    input_ids, attention_mask = left_pad(prompts, model.device)
    drawing = {"logits_processor": LogitsProcessorList([draw])} if draw else {}
    with own_generation_config(model, greedy_config(max_new_tokens, stop_ids)):
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **drawing)
    return output[:, input_ids.shape[1] :].tolist()


def score_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], label: Sequence[int]) -> Tensor:
    """Log-probability of ``label`` after each prompt, (rows,) in float32, by one full forward pass."""
    input_ids, attention_mask = left_pad([[*prompt, *label] for prompt in prompts], model.device)
    position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    # The last logits but one for each label token: what was predicted in its place.
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=len(label) + 1,
    ).logits[:, -len(label) - 1 : -1]
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    target = torch.tensor(label, device=model.device)[None, :, None].expand(len(prompts), -1, 1)
    return log_probabilities.gather(-1, target).sum(dim=(1, 2))


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (rows, longest), padded on the left; the padding's id plays no part."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
