from __future__ import annotations

import json

import pytest

from llmir_iree.params import SourceError, open_checkpoint


@pytest.fixture
def folder(make_folder, weights):
    path = make_folder(weights)
    (path / "tokenizer.json").write_text('{"model": {}}')
    return path


def save(folder, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        checkpoint.save_tokenizer(tmp_path / "out")
    return json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_files_are_copied(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"chat_template": "T", "bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert save(folder, tmp_path) == {"chat_template": "T", "bos_token": "<s>", "eos_token": "</s>"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"model": {}}'
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_special_tokens_become_strings(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>", "lstrip": false}}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "other"}')
    assert save(folder, tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_chat_template_from_a_file_of_its_own(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (folder / "chat_template.jinja").write_text("new")
    assert save(folder, tmp_path)["chat_template"] == "new"


def test_chat_template_from_json(folder, tmp_path):
    (folder / "chat_template.json").write_text('{"chat_template": "T"}')
    assert save(folder, tmp_path)["chat_template"] == "T"


def test_default_of_several_chat_templates(folder, tmp_path):
    templates = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert save(folder, tmp_path)["chat_template"] == "B"


def test_folder_without_tokenizer(make_folder, weights, tmp_path):
    with pytest.raises(SourceError, match=r"has no tokenizer: neither tokenizer.json nor tokenizer.model"):
        save(make_folder(weights), tmp_path)


def test_damaged_sentencepiece_model(make_folder, weights, tmp_path):
    folder = make_folder(weights)
    (folder / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(SourceError) as caught:
        save(folder, tmp_path)
    assert "tokenizer.model cannot be converted to tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)
