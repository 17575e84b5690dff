"""Text to tokens and back, and the chat template, out of a bundle's `tokenizer` folder.

Reads the files that transformers writes, without importing it:

    tokenizer.json              the tokenizer proper
    tokenizer_config.json       special tokens, often the chat template (optional)
    chat_template.jinja         the chat template, where it has a file of its own (optional)
    generation_config.json      more end-of-sequence tokens (optional)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmir_iree.params.errors import BundleError, RequestError

Message = Mapping[str, Any]

# What a byte sequence that is not (yet) UTF-8 decodes to.
_REPLACEMENT = "\ufffd"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer, its special tokens and its chat template."""

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_token_ids: frozenset[int],
        chat_template: str | None,
    ) -> None:
        self._model = model
        self._special_tokens = dict(special_tokens)
        self._template = None if chat_template is None else _compile_template(chat_template)
        self.eos_token_ids = eos_token_ids

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer's folder.

        Raises:
            BundleError: a file is missing or does not hold what it should.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise BundleError(f"{file}: missing; export the bundle again, with --tokenizer FOLDER")
        try:
            model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises nothing narrower.
            raise BundleError(f"{file}: not a tokenizer: {error}") from None
        # A file may carry the limits of whoever trained it; prompts are neither cut nor filled up here.
        model.no_truncation()
        model.no_padding()

        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = {
            name: token for name in _SPECIAL_TOKENS if (token := _token_text(config.get(name))) is not None
        }
        eos_ids = _read_json(folder / "generation_config.json").get("eos_token_id")
        eos_token_ids = set(eos_ids if isinstance(eos_ids, list) else [eos_ids])
        eos_token_ids.add(model.token_to_id(special_tokens.get("eos_token", "")))
        eos_token_ids.discard(None)
        return cls(model, special_tokens, frozenset(eos_token_ids), _read_template(folder, config))

    @property
    def vocab_size(self) -> int:
        """Tokens there are, the added ones included."""
        return self._model.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Tokens of a text; with `add_special`, also those that every text of this model begins (or ends) with."""
        return list(self._model.encode(text, add_special_tokens=add_special).ids)

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._model.decode(list(tokens), skip_special_tokens=skip_special)

    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation the way that the model was trained on, as transformers does.

        The result holds its special tokens already: encode it with `add_special=False`.

        Args:
            messages: mappings with "role" and "content".
            add_generation_prompt: end with what precedes an answer.

        Raises:
            RequestError: the model has no template, or its template refuses the messages.
        """
        if self._template is None:
            raise RequestError("this model has no chat template; send it a plain prompt")
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None


class TextStream:
    """Turns tokens into text one by one: never half a character, never a space too many or too few.

    The pieces and the rest joined are what `Tokenizer.decode` gives for all tokens at once. A token's text may depend
    on the tokens before it (byte pieces make up a character, SentencePiece drops a leading space), so each piece is
    what a token adds to the text of the last few, not the text of the token alone.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take the next token.

        Returns:
            The text that is certain now; "" while a character is incomplete.
        """
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        if len(text) <= len(self._context_text) or text.endswith(_REPLACEMENT):
            return ""
        piece = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer.decode(self._context)
        return piece

    def flush(self) -> str:
        """The rest, once no more tokens come: U+FFFD for what never became a character."""
        text = self._tokenizer.decode(self._context + self._pending)
        rest = text[len(self._context_text) :]
        self._context, self._context_text, self._pending = [], "", []
        return rest


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks an answer for training on; here only what it holds is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the tag by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile_template(source: str) -> jinja2.Template:
    """Compile a template in a sandbox, with the names that transformers gives to templates.

    Raises:
        BundleError: the source is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise BundleError(f"the bundle's chat template cannot be read: line {error.lineno}: {error.message}") from None


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # Several by name; "default" is the one for plain conversations.
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _token_text(token: object) -> str | None:
    """Text of a special token, which the config holds as a string or as a mapping."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object's file, empty if there is no such file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BundleError(f"{file}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{file}: expected an object, got {type(data).__name__}")
    return data
