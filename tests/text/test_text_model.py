"""What is read from a model directory, and what is said when it cannot be."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from interlock.core import limits
from interlock.engines.demo_model import CHAT_TEMPLATE as DEMO_TEMPLATE
from interlock.host.real import RealHost
from interlock.testing.text_files import END_ID, write_text_files
from interlock.text.errors import ModelFilesError, PromptError
from interlock.text.model import TextModel

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🚂?"},
    {"role": "assistant", "content": "Ja."},
    {"role": "user", "content": "hello,  world\n"},
]
TEXTS = ["hello, world", "  Grüße aus Zürich 🚂\n\n", "<|user|>x<|end|>", "", "日本"]


def test_end_tokens_specials_and_defaults_come_from_the_models_files(model_dir: Path) -> None:
    model = TextModel.load(model_dir)
    assert set(model.eos_token_ids) == {END_ID}
    assert model.sampling_defaults == {"temperature": 0.5, "top_k": 20.0}
    assert model.special_ids == {0, 1, 2, 3, 4}
    assert model.apply_chat_template([{"role": "user", "content": "x"}]) == (
        "<|begin|><|user|>x<|end|><|assistant|>"
    )


def test_a_template_in_its_own_file_wins(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("own file")
    assert TextModel.load(model_dir).apply_chat_template([]) == "own file"


def test_of_several_templates_the_default_is_taken(model_dir: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    path.write_text(json.dumps(config))
    assert TextModel.load(model_dir).apply_chat_template([]) == "b"


def test_training_truncation_and_padding_never_touch_a_prompt(model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert 4 < len(TextModel.load(model_dir).encode("hello, interlocking world")) < 64


def test_a_model_without_template_says_to_use_completions(tmp_path: Path) -> None:
    model = TextModel.load(write_text_files(tmp_path, chat_template=None))
    with pytest.raises(PromptError, match="/v1/completions"):
        model.apply_chat_template([])


def test_each_missing_or_broken_file_is_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFilesError, match="is no directory"):
        TextModel.load(model_dir / "absent")
    (model_dir / "generation_config.json").write_text("[1")
    with pytest.raises(ModelFilesError, match=r"generation_config\.json is no JSON object"):
        TextModel.load(model_dir)
    (model_dir / "generation_config.json").unlink()
    (model_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json cannot be used"):
        TextModel.load(model_dir)
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelFilesError, match=r"no tokenizer\.json"):
        TextModel.load(model_dir)
    monkeypatch.setattr("interlock.text.files.MODEL_TEXT_FILE_BYTES_MAX", 10)
    with pytest.raises(ModelFilesError, match="more than the 10"):
        TextModel.load(model_dir)


def test_half_a_surrogate_pair_is_the_users_error(model: TextModel) -> None:
    with pytest.raises(PromptError, match="surrogates"):
        model.encode("a\ud800b")


def test_a_token_shows_its_text_or_its_bytes(byte_level: TextModel, byte_fallback: TextModel) -> None:
    ids = {byte_level.token_bytes(i): i for i in range(byte_level.vocabulary_size)}
    assert byte_level.token_text(ids[b"\xe3"]) == "bytes:\\xe3"
    assert byte_level.token_text(0) == "<|end|>"
    assert byte_level.token_bytes(10**9) == byte_level.token_bytes(-1) == b""
    pieces = {byte_fallback.token_bytes(i) for i in range(byte_fallback.vocabulary_size)}
    assert {b"\xe3", b" h", b"ll"} <= pieces, "a byte is a byte, a leading space is kept"


def test_decode_is_the_inverse_of_encode(model: TextModel) -> None:
    for text in ("hello, world", "Grüße 🚂"):
        assert model.decode(model.encode(text, add_special=False)) == text


@pytest.mark.parametrize("template", [DEMO_TEMPLATE, None], ids=["demo template", "tiny template"])
def test_templates_and_ids_equal_those_of_transformers(model_dir: Path, template: str | None) -> None:
    if template is not None:
        (model_dir / "chat_template.jinja").write_text(template)
    script = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "conversation, texts = json.load(sys.stdin)\n"
        "chat = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)\n"
        "ids = [tokenizer.encode(text) for text in texts]\n"
        "print(json.dumps([chat, ids, [tokenizer.decode(i, skip_special_tokens=True) for i in ids]]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(model_dir)], input=json.dumps([CONVERSATION, TEXTS]),
        capture_output=True, text=True, timeout=120, check=True, env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    chat, ids, texts = json.loads(ran.stdout.splitlines()[-1])
    model = TextModel.load(model_dir)
    assert model.apply_chat_template(CONVERSATION) == chat
    assert [model.encode(text) for text in TEXTS] == ids
    assert [model.decode(i) for i in ids] == texts


async def test_a_long_text_is_tokenised_beside_the_loop_not_instead_of_it(byte_level: TextModel) -> None:
    host = RealHost()
    encoding = asyncio.ensure_future(
        host.in_thread(byte_level.encode, "The levers of an interlocking. " * 40_000)
    )
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len(await encoding) > 40_000
    assert turns > 20, "the tokenizer held the interpreter's lock"
    host.close()


def test_the_tokenizer_file_bound_is_above_what_is_published() -> None:
    assert limits.MODEL_TEXT_FILE_BYTES_MAX > 34 * 2**20
