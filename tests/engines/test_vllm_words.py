"""What vLLM must not be told, and what it says when it cannot start, without starting it."""

from __future__ import annotations

import pytest

from interlock.engines.vllm_args import RefusedArgument, check_vllm_args
from interlock.engines.vllm_failures import explain_failure


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--tensor-parallel-size", "--tp"),
        ("--tensor_parallel_size=2", "--tp"),
        ("-tp", "--tp"),
        ("--kv-transfer-config", "shared KV cache"),
        ("--kv-transfer-config.kv_role=kv_both", "shared KV cache"),
        ("--block-size=16", "alike"),
        ("--port", "before the --"),
        ("--no-enable-prefix-caching", "shared cache"),
    ],
)
def test_an_argument_that_interlock_sets_is_refused_by_name(argument: str, words: str) -> None:
    with pytest.raises(RefusedArgument) as refusal:
        check_vllm_args(["--max-num-seqs", "8", argument, "2"])
    assert argument.partition("=")[0] in str(refusal.value)
    assert words in str(refusal.value)


def test_other_arguments_pass() -> None:
    check_vllm_args(["--max-model-len", "2048", "--num-gpu-blocks-override=64", "--seed", "-1"])


CORE_LOG = """\
(EngineCore pid=1) ERROR 11-21 [core.py:1200] EngineCore failed to start.
(EngineCore pid=1) ERROR 11-21 [core.py:1200] Traceback (most recent call last):
(EngineCore pid=1) ERROR 11-21 [core.py:1200] ValueError: To serve at least one request with the models's max seq len \
(8192), 0.19 GiB KV cache is needed, which is larger than the available KV cache memory (0.05 GiB).
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_is_found_in_what_the_core_printed() -> None:
    empty = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    said = explain_failure(empty, CORE_LOG)
    assert "KV cache is needed" in said
    assert "--max-model-len" in said


def test_a_cause_that_says_enough_is_taken_as_it_is() -> None:
    said = explain_failure(ValueError("Model architectures ['Foo'] are not supported for now."), CORE_LOG)
    assert said.startswith("vLLM does not support this model")


def test_an_error_without_words_is_named() -> None:
    assert "KeyError" in explain_failure(KeyError(), "")


def test_pydantics_frame_is_taken_off_the_sentence_in_it() -> None:
    class ValidationError(ValueError):
        pass

    framed = ValidationError(
        "1 validation error for ModelConfig\n  Value error, The length 100000 is too great. "
        "[type=value_error, input_value=ArgsKwargs((), {'model': ...}), input_type=ArgsKwargs]\n    For further information"
    )
    assert explain_failure(framed, "") == "vLLM says: The length 100000 is too great."


def test_a_process_that_the_system_killed_is_said_to_lack_memory() -> None:
    killed = RuntimeError("Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -9}")
    assert "want of memory" in explain_failure(killed, "")
