"""The files of a Hugging Face model directory that have to do with text, read once and checked.

`tokenizer.json` must be there. Template and special tokens come from `tokenizer_config.json`, `special_tokens_map.json`,
`chat_template.jinja` (wins over the configuration, as in transformers) and `chat_template.json` (older multimodal models);
end tokens and the defaults of sampling from `generation_config.json`, else `config.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from interlock.core.limits import MODEL_TEXT_FILE_BYTES_MAX
from interlock.text.errors import ModelFilesError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""Keys of generation_config.json that become a request's defaults, as in vLLM (`--generation-config auto`)."""


class TextFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint directory says about text, read, bounded and checked."""

    tokenizer_json: bytes
    special_tokens: dict[str, str]
    """bos_token, eos_token, … → content; a chat template may name them."""
    special_contents: frozenset[str]
    """Every token that the configuration calls special, by content."""
    chat_template: str | None
    eos_token_ids: frozenset[int]
    sampling_defaults: dict[str, float]
    vocabulary_size: int
    """Rows of the model's embedding by config.json, 0 if it does not say: some ids may have no text."""


def read_text_files(model_dir: Path) -> TextFiles:
    """Raises `ModelFilesError` naming the file and what to do."""
    if not model_dir.is_dir():
        raise ModelFilesError(f"{model_dir} is no directory", hint="name a local checkpoint directory")
    config = _read_json(model_dir / "tokenizer_config.json")
    generation = _read_json(model_dir / "generation_config.json")
    model = _read_json(model_dir / "config.json")
    tokens, contents = _special_tokens(config, _read_json(model_dir / "special_tokens_map.json"))
    rows = model.get("vocab_size")
    return TextFiles(
        vocabulary_size=rows if isinstance(rows, int) else 0,
        tokenizer_json=_tokenizer_json(model_dir),
        special_tokens=tokens,
        special_contents=contents,
        chat_template=_chat_template(model_dir, config),
        eos_token_ids=_ids(generation.get("eos_token_id", model.get("eos_token_id"))),
        sampling_defaults={
            key: float(value)
            for key in SAMPLING_DEFAULTS
            if isinstance(value := generation.get(key), int | float) and not isinstance(value, bool)
        },
    )


def _tokenizer_json(model_dir: Path) -> bytes:
    data = _read(model_dir / "tokenizer.json")
    if data is None:
        raise ModelFilesError(
            f"{model_dir} has no tokenizer.json",
            hint="save the model's fast tokenizer there (AutoTokenizer.from_pretrained(…).save_pretrained(…))",
        )
    return data


def _read(path: Path) -> bytes | None:
    try:
        size = path.stat().st_size
        if size > MODEL_TEXT_FILE_BYTES_MAX:
            raise ModelFilesError(
                f"{path} has {size} bytes, more than the {MODEL_TEXT_FILE_BYTES_MAX} that are read"
            )
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    data = _read(path)
    if data is None:
        return {}
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelFilesError(f"{path} is no JSON object: {error}") from error


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an AddedToken object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: dict[str, Any], legacy: dict[str, Any]) -> tuple[dict[str, str], frozenset[str]]:
    tokens = {}
    for name in SPECIAL_TOKENS:
        content = _content(config.get(name)) or _content(legacy.get(name))
        if content is not None:
            tokens[name] = content
    contents = set(tokens.values())
    for source in (config, legacy):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = source.get(key)
            listed = list(extra.values()) if isinstance(extra, dict) else extra
            if isinstance(listed, list):
                contents |= {content for token in listed if (content := _content(token))}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        contents |= {
            content
            for token in decoder.values()
            if isinstance(token, dict) and token.get("special") and (content := _content(token))
        }
    return tokens, frozenset(contents)


def _chat_template(model_dir: Path, config: dict[str, Any]) -> str | None:
    """None: the model has none, and only plain completions can be served."""
    path = model_dir / "chat_template.jinja"
    if (data := _read(path)) is not None:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ModelFilesError(f"{path} is not UTF-8: {error}") from error
    found = config.get("chat_template") or _read_json(model_dir / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool))
