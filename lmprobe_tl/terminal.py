"""Tokens in the terminal as they come, coloured by their score."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from lmprobe_tl.colours import score_colour
from lmprobe_tl.live_records import TokenEvent
from lmprobe_tl.token_text import TokenText
from lmprobe_tl.watches import threshold_logit
from lmprobe_tl.weights import ProbeWeights

# Around flagged text where there are no colours.
OPEN_MARK, CLOSE_MARK = "\u27e6", "\u27e7"
# A model may write escape sequences; none of them may reach the terminal.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TokenPrinter:
    """An `on_token` that prints one row's tokens as they are scored; with several probes, by the score of the first.

    Colours run from blue (well below the threshold) to orange (well above), which colour-blind readers tell apart. Where the
    console has no colours, flagged text stands between marks. The prompt is dim. Control characters are spelled out.
    """

    def __init__(self, console: Console, weights: ProbeWeights, tokenizer: Any, row: int = 0) -> None:
        self._console, self._name, self._row = console, weights.name, row
        self._threshold = threshold_logit(weights)
        self._coloured = console.color_system is not None and not console.no_color
        self._text = TokenText(tokenizer)
        self._generated = False
        self._flagged = False

    def __call__(self, event: TokenEvent) -> None:
        if event.row != self._row:
            return
        self._generated = event.generated
        self._print(self._text.add(event.token_id, event.logits[self._name]))

    def _print(self, added: tuple[str, float] | None) -> None:
        if added is None:
            return
        text, logit = added
        text = _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
        if self._coloured:
            style = Style(bgcolor=score_colour(logit, self._threshold), color="black", dim=not self._generated)
            # A background on a line end would paint the rest of the line.
            for at, line in enumerate(text.split("\n")):
                self._write(Text("\n" * (at > 0)) + Text(line, style=style if line.strip() else ""))
            return
        flagged = logit >= self._threshold
        mark = (OPEN_MARK if flagged else CLOSE_MARK) if flagged != self._flagged else ""
        self._flagged = flagged
        self._write(Text(mark + text))

    def _write(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)

    def finish(self) -> None:
        """Print what still waits for the rest of a character, close an open mark, and end the line."""
        self._print(self._text.rest())
        self._console.print(CLOSE_MARK if self._flagged and not self._coloured else "")
        self._flagged = False
