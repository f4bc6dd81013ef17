"""Many prompts in, texts or label probabilities out: greedy, or by seeded draws that do not depend on other rows.

The common prefix of all prompts is computed once (`attention`), finished rows are replaced by waiting ones, and the
batch halves, with a warning, when memory runs out. Other kinds of attention go through ``model.generate``.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations, takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2ForCausalLM, Qwen3ForCausalLM

from lib.engine.attention import ATTENTION_NAME, SharedPrefix, compute_prefix
from lib.engine.batch import PREFILL_TOKENS, PromptRow, SlotBatch, score_labels
from lib.engine.generator import Completion, Conversation, EngineStats, FinishReason, Key, LazyGenerator, Sampling
from lib.engine.kernels import attention, torch_attention
from lib.engine.load import Runtime, load_dense, load_judge, load_tokenizer, render_prompt, stop_token_ids
from lib.engine.memory import memory_for_work_bytes, row_bytes, step_bytes, with_halving
from lib.engine.picking import Picker
from lib.engine.plain import DrawProcessor, generate_batch, score_batch

SUPPORTED_MODELS = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# A shorter prefix costs more in merging than it saves; on a GPU merging takes launches, and keys are read fast. Here
# and below, a GPU's number is an estimate: no GPU was measured yet.
MIN_PREFIX_TOKENS = {"cpu": 16, "cuda": 128, "mps": 128}
# Rows whose labels are scored in one go: the steps for a label's further tokens are then shared by so many.
SCORED_ROWS = {"cpu": 16, "cuda": 64, "mps": 16}
MAX_ROWS = 256
# What is free now is not all ours: the allocator fragments, and other processes move.
MEMORY_SHARE = 0.7


class Engine:
    """Generation, greedy or sampled, and label scoring; the model is in eval mode, and its weights must not change."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 0) -> None:
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before building an Engine")
        if batch_size < 0:
            raise ValueError(f"batch_size is {batch_size}; allowed: 0 (from free memory) or more")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.halved = False
        self.stop_ids = frozenset(stop_token_ids(model, tokenizer))
        self.refusal = why_not_shared(model)
        self.stats = EngineStats()
        # Seconds of all calls so far; ``stats`` is of the last one.
        self.work_s = 0.0
        self._prefix: SharedPrefix | None = None

    def describe(self) -> dict[str, object]:
        """What runs and why, for the record of a run."""
        stop_ids = sorted(self.stop_ids)
        described = {"engine": "plain batches" if self.refusal else "shared prefix"}
        described["why"] = self.refusal or f"{type(self.model).__name__} with full attention in every layer"
        described |= {"decoding": "greedy, no logits processor", "stop_token_ids": stop_ids}
        described["stop_tokens"] = [self.tokenizer.decode([token]) for token in stop_ids]
        described |= {"dtype": str(self.model.dtype).removeprefix("torch."), "device": str(self.model.device)}
        return described | {"batch_size": self.batch_size or f"at most {MAX_ROWS}, from free memory"}

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        on_completion: Callable[[int, Completion], None] | None = None,
        sampling: Sampling | None = None,
        keys: Sequence[Key] | None = None,
    ) -> list[Completion]:
        """One completion per conversation, in their order.

        Args:
            max_new_tokens: most tokens per row, a stop token included.
            on_completion: called once for each row, with its index, as soon as it is done.
            keys: identify the draws of each conversation; None: its index. Equal keys and prompts get equal answers.

        Raises:
            ValueError: ``max_new_tokens`` below 1, a prompt that does not fit the positions, or too few or many keys.
            FloatingPointError: the model's logits are not numbers.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
        pick = Picker(sampling, range(len(conversations)) if keys is None else keys)
        if len(pick.keys) != len(conversations):
            raise ValueError(f"{len(pick.keys)} keys for {len(conversations)} conversations; allowed: one each")
        if sampling is not None:
            # A prefix kept from an earlier call may be shorter or longer, and rounding with it: by a near tie a row
            # would then depend on the calls before.
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
        """How likely each label begins the answer: per conversation one probability per label, with the sum 1.

        A label's log-probability is the sum over its tokens (``UNSAFE`` may be two).
        """
        label_ids = self._encode_labels(labels)
        results: dict[int, list[float]] = {}

        def emit(index: int, log_probabilities: Tensor) -> None:
            results[index] = torch.softmax(log_probabilities.cpu().double(), dim=-1).tolist()
            if on_result is not None:
                on_result(index, results[index])

        with self._call(conversations, max(map(len, label_ids))) as prompts:
            way = self._score_plain if self.refusal else self._score_shared
            if prompts:
                way(prompts, label_ids, emit)
        return [results[index] for index in range(len(prompts))]

    def share_prefix(self, conversations: Sequence[Conversation]) -> None:
        """Compute what the prompts begin with alike, for calls on them that follow."""
        with self._call(conversations, 1) as prompts:
            if prompts and not self.refusal:
                self._find_prefix(prompts)

    def prefix_of(self, prompt: Sequence[int]) -> SharedPrefix | None:
        """Keys and values kept from the last call, if ``prompt`` begins with their tokens."""
        kept = self._prefix
        return kept if kept is not None and kept.tokens == tuple(prompt[: len(kept.tokens)]) else None

    @contextmanager
    def _call(self, conversations: Sequence[Conversation], num_new_tokens: int) -> Iterator[list[list[int]]]:
        """Render the prompts and time what is done with them."""
        start = time.perf_counter()
        self.stats = EngineStats(num_rows=len(conversations))
        prompts = [render_prompt(self.tokenizer, conversation) for conversation in conversations]
        self._check_positions(prompts, num_new_tokens)
        with attention(self.model, self._attention_name()), torch.inference_mode():
            yield prompts
        self.stats.wall_s = time.perf_counter() - start
        self.work_s += self.stats.wall_s
        self.stats.tokens_per_s = self.stats.num_output_tokens / self.stats.wall_s

    def _attention_name(self) -> str:
        own = self.model.config._attn_implementation
        if not self.refusal:
            return ATTENTION_NAME
        return torch_attention(self.model.device) if own == "sdpa" else own

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
        for (one, ids), (other, other_ids) in permutations(zip(labels, label_ids, strict=True), 2):
            if other_ids[: len(ids)] == ids:
                raise ValueError(f"the tokens of label {one!r} begin those of {other!r}")
        return label_ids

    def _shared_rows(self, prompts: Sequence[Sequence[int]]) -> deque[PromptRow]:
        """The rows without the tokens they share, longest first, so that the longest do not run alone at the end."""
        shared = self._find_prefix(prompts)
        self.stats.num_prefix_tokens = shared
        return deque(_longest_first(prompts, shared))

    def _find_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """Length of the prefix to share; its keys and values are ready afterwards."""
        common = common_prefix_length(prompts)
        kept = self._prefix.tokens if self._prefix is not None else ()
        fits = len(kept) <= common and kept == tuple(prompts[0][: len(kept)])
        # Fewer rows may happen to share a few tokens more; not worth computing the prefix again.
        shortest = MIN_PREFIX_TOKENS[self.model.device.type]
        if fits and len(kept) >= max(0.9 * common, shortest):
            return len(kept)
        self._prefix = None
        if len(prompts) < 2 or common < shortest:
            return 0

        def attempt(portion: int) -> None:
            self._prefix = compute_prefix(self.model, prompts[0][:common], portion)

        with_halving(common, "tokens of the shared prefix", attempt)
        return common

    def _in_slots(
        self,
        waiting: deque[PromptRow],
        run: Callable[["SlotBatch"], None],
        num_new_tokens: int,
        most_rows: int = MAX_ROWS,
    ) -> None:
        """Run all waiting rows; those in progress when memory runs out wait again, with the tokens they have."""
        capacity = max(len(row.prompt) for row in waiting) + num_new_tokens
        most = self._num_slots(min(len(waiting), most_rows), capacity)

        def attempt(num_slots: int) -> None:
            self.stats.num_halvings += num_slots != most
            batch = SlotBatch(self.model, self._prefix, num_slots, self.stats)
            try:
                run(batch)
            finally:
                for row in batch.active:
                    row.cached = 0
                    waiting.appendleft(row)

        with_halving(most, "rows", attempt)

    def _num_slots(self, num_rows: int, capacity: int) -> int:
        most = min(num_rows, self.batch_size or self._fitting_rows(capacity))
        # Half of one row is no row.
        return (most // 2 or min(2, num_rows)) if self.halved else most

    def _fitting_rows(self, capacity: int) -> int:
        device = self.model.device
        portion = step_bytes(self.model, max(PREFILL_TOKENS[device.type], capacity))
        free = MEMORY_SHARE * memory_for_work_bytes(self.model) - portion
        a_row = row_bytes(self.model, capacity)
        if self.refusal:
            # The plain way reads the prompts of all rows at once.
            a_row += step_bytes(self.model, capacity)
        fitting = max(1, min(MAX_ROWS, int(free / a_row)))
        if device.type == "cuda":
            # Rounding depends on the rows beside a row: a power of two is the same in the next run.
            fitting = 2 ** int(math.log2(fitting))
        return fitting

    def _complete(self, row: PromptRow, finish_reason: FinishReason) -> Completion:
        text = self.tokenizer.decode(row.output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(text, finish_reason, len(row.output), row.num_prompt_tokens, tuple(row.output))

    def _generate_shared(self, prompts: list[list[int]], max_new_tokens: int, emit: Callable, pick: Picker) -> None:
        waiting = self._shared_rows(prompts)

        def run(batch: "SlotBatch") -> None:
            while waiting or batch.active:
                batch.admit(waiting)
                tokens = pick(batch.forward(), batch.active, [len(row.output) for row in batch.active])
                reasons = [self._take_token(*pair, max_new_tokens) for pair in zip(batch.active, tokens, strict=True)]
                for row, reason in batch.remove_finished(reasons):
                    emit(row.index, self._complete(row, reason))

        self._in_slots(waiting, run, max_new_tokens)

    def _take_token(self, row: PromptRow, token: int, max_new_tokens: int) -> FinishReason | None:
        """Add a token to a row; return why the row is done with it, or None."""
        if token in self.stop_ids:
            return "stop"
        row.output.append(token)
        return "length" if len(row.output) == max_new_tokens else None

    def _score_shared(self, prompts: list[list[int]], labels: list[list[int]], emit: Callable) -> None:
        waiting = self._shared_rows(prompts)

        def run(batch: "SlotBatch") -> None:
            while waiting:
                scores = score_labels(batch, waiting, labels)
                rows, batch.active = batch.active, []
                for row, score in zip(rows, scores, strict=True):
                    emit(row.index, score)

        self._in_slots(waiting, run, max(map(len, labels)), SCORED_ROWS[self.model.device.type])

    def _generate_plain(self, prompts: list[list[int]], max_new_tokens: int, emit: Callable, pick: Picker) -> None:
        def run(rows: list[PromptRow]) -> None:
            prompts_here = [row.prompt for row in rows]
            draw = DrawProcessor(pick, rows) if pick.sampling else None
            outputs = generate_batch(self.model, prompts_here, max_new_tokens, self.stop_ids, draw)
            for row, output in zip(rows, outputs, strict=True):
                done = next((place for place, token in enumerate(output) if token in self.stop_ids), None)
                row.output = output[:done]
                emit(row.index, self._complete(row, "length" if done is None else "stop"))

        self._in_plain_batches(prompts, run, max_new_tokens)

    def _score_plain(self, prompts: list[list[int]], labels: list[list[int]], emit: Callable) -> None:
        def run(rows: list[PromptRow]) -> None:
            scores = [score_batch(self.model, [row.prompt for row in rows], label) for label in labels]
            for row, score in zip(rows, torch.stack(scores, dim=-1).cpu(), strict=True):
                emit(row.index, score)

        self._in_plain_batches(prompts, run, max(map(len, labels)))

    def _in_plain_batches(
        self, prompts: list[list[int]], run: Callable[[list[PromptRow]], None], num_new_tokens: int
    ) -> None:
        """Batches of rows of like length, longest first; their order does not depend on what ran before."""
        rows = _longest_first(prompts)
        capacity = max(len(row.prompt) for row in rows) + num_new_tokens
        most = self._num_slots(len(rows), capacity)

        def attempt(num_rows: int) -> None:
            self.stats.num_halvings += num_rows != most
            while rows:
                run(rows[:num_rows])
                self.stats.peak_rows = max(self.stats.peak_rows, len(rows[:num_rows]))
                del rows[:num_rows]

        with_halving(most, "rows", attempt)


def _longest_first(prompts: Sequence[Sequence[int]], num_shared: int = 0) -> list[PromptRow]:
    rows = [PromptRow(index, list(prompt[num_shared:]), len(prompt)) for index, prompt in enumerate(prompts)]
    return sorted(rows, key=lambda row: len(row.prompt), reverse=True)


def load_engine(folder: Path, runtime: Runtime, quantization: str, batch_size: int = 0) -> Engine:
    """The engine over ``lib.engine.load.load_dense``; ``batch_size`` as in ``Engine``."""
    return Engine(load_dense(folder, runtime, quantization), load_tokenizer(folder), batch_size=batch_size)


def judge_generator(folder: Path, runtime: Runtime, quantization: str, batch_size: int = 0) -> LazyGenerator:
    """The judge, loaded when first used (``lib.engine.load.load_judge``)."""
    return LazyGenerator(
        lambda: Engine(load_judge(folder, runtime, quantization), load_tokenizer(folder), batch_size=batch_size)
    )


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with, leaving each at least one more token."""
    low, high = min(prompts), max(prompts)
    # All others lie between the two in the order of lists, so they share what these two share.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
    return min(shared, min(map(len, prompts)) - 1)


def why_not_shared(model: PreTrainedModel) -> str:
    """Why the shared-prefix engine does not take this model; empty when it does."""
    config = model.config
    if not isinstance(model, SUPPORTED_MODELS):
        allowed = ", ".join(supported.__name__ for supported in SUPPORTED_MODELS)
        return f"{type(model).__name__} is not one of {allowed}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"layers with {', '.join(sorted(kinds))}"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rope_type {rope} makes a token's position depend on the longest row beside it"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return ""
