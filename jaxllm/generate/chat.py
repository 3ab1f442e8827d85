"""A conversation with a model, written by the tokenizer's chat template as the conversations it was trained on were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxllm.data.text.chat import ChatTemplate, RenderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A reply that no template writes by itself.
_REPLY = "jaxllm-reply"


class Conversation:
    """What was said so far. stop_ids, stop: the token, or else the text, by which the template ends a reply.

    Raises UserError if the tokenizer has no chat template, or does not read the template's marks as tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self._template = ChatTemplate(tokenizer, RenderConfig())
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self.stop_ids, self.stop = self._end_of_turn()

    def ask(self, said: str) -> list[int]:
        """The tokens that ask for a reply to `said` and everything before it."""
        self._messages.append({"role": "user", "content": said})
        return self._ids(self._template.question(self._messages))

    def answered(self, reply: str) -> None:
        """Keeps the reply to what was asked last."""
        self._messages.append({"role": "assistant", "content": reply})

    def _end_of_turn(self) -> tuple[list[int], list[str]]:
        """What the template writes behind a reply: models often name another end of text in their files."""
        messages = [*self._messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]
        end = self._template.written(messages).rpartition(_REPLY)[2].strip()
        ids = self._ids(end) if end else []
        if ids and ids[0] in self._tokenizer.get_added_vocab().values():
            return ids[:1], []
        return [], [end] if end else []

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
