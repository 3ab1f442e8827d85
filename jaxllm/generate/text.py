"""From tokens to text as they come: whole characters, stop strings that span tokens, and where a completion ends."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

# A character that UTF-8 bytes do not give: at the end of a text, one whose last bytes are still to come.
_INCOMPLETE = "\ufffd"


class Decodes(Protocol):
    """What this file needs of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str | list[str]: ...


class Completion:
    """The text that follows a prompt, in pieces as its tokens come.

    prompt: its token ids, which can change how the first new tokens are written. stop_ids: tokens that end the
    completion. stop: texts that do; the first to appear, and what follows it, is cut off. room: tokens that it has at
    most.

    ended: why no token is wanted any more: "stop" (a stop token or text), "length" (`room` is used up), or None. text:
    what has been returned so far. room: as given.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        prompt: Sequence[int],
        *,
        room: int,
        stop_ids: Iterable[int] = (),
        stop: Iterable[str] = (),
    ) -> None:
        self.ended: Literal["stop", "length"] | None = None
        self.text = ""
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self.room = room
        self._left = room
        # `ids[read:]` have not become text yet; those before them, from `start` on, are read along, since a
        # tokenizer may write the first token of a text in another way.
        self._ids = list(prompt[-8:])
        self._start, self._read = 0, len(self._ids)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after `token`: no half characters, no beginning of a stop string."""
        if token in self._stop_ids:
            self.ended = "stop"
            return self._release()
        self._ids.append(token)
        self._left -= 1
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) > len(before) and not now.endswith(_INCOMPLETE):
            self._start, self._read = self._read, len(self._ids)
            self._held += now[len(before) :]
        cuts = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if cuts:
            self.ended = "stop"
            return self._give(min(cuts))
        if self._left == 0:
            self.ended = "length"
            return self._release()
        return self._give(len(self._held) - self._beginning_of_a_stop())

    def _release(self) -> str:
        """All that is held back, an unfinished character included."""
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._held += now[len(before) :]
        return self._give(len(self._held))

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        self.text += given
        return given

    def _beginning_of_a_stop(self) -> int:
        """How long the end of the held text is that could become a stop string."""
        lengths = (n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n]))
        return max(lengths, default=0)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
