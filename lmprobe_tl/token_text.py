"""Token ids that come one by one, as text with scores: for the terminal and for the report."""

from __future__ import annotations

from typing import Any

# A character has at most four bytes and a token at least one, so that only the last three can be its beginning.
_MOST_BEGUN = 3


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
        n_tokens = len(self._pending)
        text = self._new_text(n_tokens)
        if text.endswith("\ufffd"):
            n_tokens = self._n_finished()
            text = self._new_text(n_tokens)
        return self._taken(n_tokens, text)

    def rest(self) -> tuple[str, float] | None:
        """What still waits for the rest of a character, at the end of the tokens."""
        return self._taken(len(self._pending), self._new_text(len(self._pending)))

    def _n_finished(self) -> int:
        """How many of the waiting tokens are too far back to be part of a character that is still to be completed."""
        left = _MOST_BEGUN
        for at in reversed(range(len(self._pending))):
            if left == 0:
                return at + 1
            # A special token adds nothing.
            left -= bool(self._tokenizer.decode([self._pending[at]], skip_special_tokens=True))
        return 0

    def _new_text(self, n_tokens: int) -> str:
        before = self._tokenizer.decode(self._before, skip_special_tokens=True)
        return self._tokenizer.decode(self._before + self._pending[:n_tokens], skip_special_tokens=True)[len(before) :]

    def _taken(self, n_tokens: int, text: str) -> tuple[str, float] | None:
        score = max(self._scores[:n_tokens], default=0.0)
        # After a special token, which adds nothing, the text before it is still what the next token follows.
        self._before = self._pending[:n_tokens] if text else self._before
        del self._pending[:n_tokens], self._scores[:n_tokens]
        return (text, score) if text else None
