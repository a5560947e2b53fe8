"""Token ids that come one by one, as text with scores: for the terminal and for the report."""

from __future__ import annotations

from typing import Any


class TokenText:
    """Turns tokens into the text that each adds, with its score.

    A character that is split over several tokens comes whole, with the highest score of its tokens. Each token is decoded
    after the one before it, since many tokenizers drop the leading space of the first token that they decode.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []
        self._scores: list[float] = []

    def add(self, token_id: int, score: float) -> tuple[str, float] | None:
        """The text that the token completes and its score; None while it adds none (a special token, or a character's first
        bytes)."""
        self._pending.append(token_id)
        self._scores.append(score)
        text = self._new_text()
        return None if text.endswith("\ufffd") else self._taken(text)

    def rest(self) -> tuple[str, float] | None:
        """What still waits for the rest of a character, at the end of the tokens."""
        return self._taken(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._before, skip_special_tokens=True)
        return self._tokenizer.decode(self._before + self._pending, skip_special_tokens=True)[len(before) :]

    def _taken(self, text: str) -> tuple[str, float] | None:
        score = max(self._scores, default=0.0)
        # After a special token, which adds nothing, the text before it is still what the next token follows.
        self._before = self._pending if text else self._before
        self._pending, self._scores = [], []
        return (text, score) if text else None
