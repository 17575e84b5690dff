"""The files that stand beside weights: config.json, the tokenizer's, generation_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmir_iree.params.errors import SourceError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        SourceError: the file is missing, is no JSON, or is no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, readable and ending in a newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `config` if it names a model type, which is the least that transformers needs.

    Raises:
        SourceError: it does not.
    """
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{where} has no model_type, so it is not the config of a transformers model")
    return config


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a Hugging Face folder.

    The chat template may stand in a file of its own and special tokens may be objects; tokenizer_config.json of the
    target has the template and plain strings, whatever the source's vintage.

    Raises:
        SourceError: the folder has no tokenizer.
    """
    target.mkdir(parents=True, exist_ok=True)
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
        config = _tokenizer_config(source)
    elif (source / "tokenizer.model").is_file():
        _convert_sentencepiece(source, target)
        config = _tokenizer_config(source) | _tokenizer_config(target)
    else:
        raise SourceError(f"{source} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    write_json(target / "tokenizer_config.json", config)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / "special_tokens_map.json").is_file():
        config = read_json(folder / "special_tokens_map.json") | config
    for token in _SPECIAL_TOKENS:
        if isinstance(config.get(token), dict):
            config[token] = config[token].get("content")
    template = _chat_template(folder, config.get("chat_template"))
    return config | ({"chat_template": template} if template is not None else {})


def _chat_template(folder: Path, configured: Any) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if configured is None and (folder / "chat_template.json").is_file():
        configured = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(configured, list):  # several templates by name; the one called "default" is for plain chat
        named = {item.get("name"): item.get("template") for item in configured if isinstance(item, dict)}
        configured = named.get("default", next(iter(named.values()), None))
    return configured if isinstance(configured, str) else None


def _convert_sentencepiece(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(target))
    except Exception as error:  # whatever transformers meets in a stranger's files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"{source}/tokenizer.model cannot be converted to tokenizer.json: {reason[0]}") from error
    if not (target / "tokenizer.json").is_file():
        raise SourceError(
            f"{source}/tokenizer.model cannot be converted to tokenizer.json; add that file to the folder"
        )
