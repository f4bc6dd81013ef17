"""The untuned model: loaded only when needed, rows kept beside the runs and shared by equal protocols."""

import pytest

from lib.engine import generator
from lib.record import rows
from lib.record.paths import run_paths
from lib.record.protocol import ProtocolMismatch, check_alike, judge_quantization, verdict_protocol, without_adapter


class Counting:
    """A generator that says how often it was loaded."""

    def __init__(self):
        self.loads = 0

    def __call__(self):
        self.loads += 1
        return self

    def generate(self, prompts, **_):
        return [prompt.upper() for prompt in prompts]


def test_generator_is_loaded_once_and_only_when_asked():
    counting = Counting()
    lazy = generator.LazyGenerator(counting)
    assert (counting.loads, lazy.loaded, lazy.wall_s) == (0, False, 0.0)
    assert lazy.generate(["a"]) == ["A"] and lazy.generate(["b"]) == ["B"]
    assert (counting.loads, lazy.loaded) == (1, True)


def test_half_batches_last_as_long_as_they_are_wanted_and_load_nothing():
    counting = Counting()
    lazy = generator.LazyGenerator(counting)
    with lazy.in_half_batches():
        assert counting.loads == 0
        lazy.generate(["a"])
        assert lazy._engine.halved
    lazy.generate(["a"])
    assert not lazy._engine.halved
    with lazy.in_half_batches(False):
        lazy.generate(["a"])
        assert not lazy._engine.halved
    with pytest.raises(KeyboardInterrupt), lazy.in_half_batches():
        raise KeyboardInterrupt
    lazy.generate(["a"])
    assert not lazy._engine.halved and counting.loads == 1


def test_presets_that_ask_the_same_share_the_rows(tmp_path):
    protocol = without_adapter({"adapter": "abc", "decoding": "greedy"})
    first = rows.open_untuned_log(run_paths(str(tmp_path), "simple"), "ailuminate_preds", protocol)
    first.append({"id": 0})
    again = without_adapter({"adapter": "another", "decoding": "greedy"})
    assert rows.open_untuned_log(run_paths(str(tmp_path), "medium"), "ailuminate_preds", again).rows == first.rows
    other = without_adapter({"adapter": "abc", "decoding": "greedy, longer"})
    assert rows.open_untuned_log(run_paths(str(tmp_path), "medium"), "ailuminate_preds", other).rows == {}


def test_a_protocol_without_an_adapter_has_no_control():
    with pytest.raises(KeyError, match="adapter"):
        without_adapter({"decoding": "greedy"})


RESPONSE = {"base model": "b", "quantization": "nf4", "adapter": "a"}


def judged(quantization, response=None):
    return verdict_protocol(response or RESPONSE, "judge", "hash", "template", "greedy", quantization)


def test_a_judge_at_the_precision_of_the_model_keeps_the_protocol_that_it_had():
    assert [judge_quantization("nf4", how) for how in ("same", "nf4", "none")] == ["nf4", "nf4", "none"]
    # As it was before the judge had a precision of its own: its rows are reused.
    assert list(judged("nf4")) == [*RESPONSE, "judge", "judge prompt", "judge chat template", "judge decoding"]
    assert judged("none") == judged("nf4") | {"judge quantization": "none"}


def test_judges_of_other_precision_are_not_compared_though_one_protocol_does_not_name_it():
    with pytest.raises(ProtocolMismatch, match="judge quantization is nf4 in one and none in the other"):
        check_alike(judged("nf4"), judged("none"))
    plain = RESPONSE | {"quantization": "none"}
    with pytest.raises(ProtocolMismatch) as caught:
        check_alike(judged("none"), judged("none", plain))
    assert "judge quantization" not in str(caught.value)
    assert check_alike(judged("none"), judged("none")) == []
