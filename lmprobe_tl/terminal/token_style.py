"""How a place on the scale of scores looks in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.style import Style

from lmprobe_tl.colours import palette_colour, share_colour


class TokenStyle:
    """Styles for one console: backgrounds on the scale, with black text; None throughout where the console has no colours.

    Flagged text is underlined, and a prompt is in italics, so that neither needs colour to be seen.
    """

    def __init__(self, console: Console) -> None:
        self.coloured = console.color_system is not None and not console.no_color
        self._n_colours = {"truecolor": None, "256": 256}.get(str(console.color_system), 8)

    def __call__(self, share: float, *, flagged: bool = False, prompt: bool = False) -> Style | None:
        """The style of a token at `share` of the scale, from -1 to 1."""
        if not self.coloured:
            return None
        background = share_colour(share) if self._n_colours is None else palette_colour(share, self._n_colours)
        # The terminal's own "black" may be any colour of its theme; with eight colours there is no other.
        text = "black" if self._n_colours == 8 else "#000000"
        return Style(color=text, bgcolor=background, underline=flagged, italic=prompt)
