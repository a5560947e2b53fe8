"""How the page looks: on a screen wide or narrow, light or dark, and on paper."""

from __future__ import annotations

from lmprobe_tl.colours import score_share, share_colour
from lmprobe_tl.plots.svg import colour_variables

N_STEPS = 17  # of the scale of tokens: a class each is a quarter of the size that a colour each would be


def style_sheet() -> str:
    """All of the page's CSS."""
    light, dark = (f"{colour_variables(theme)} {_OWN[theme]}" for theme in ("light", "dark"))
    return (
        f":root {{ color-scheme: light dark; {light} }} {_steps(dark=False)}\n{_RULES}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} {_steps(dark=True)} }}\n"
        f"@media screen and (max-width: 40rem) {{ {_NARROW} }}\n@media print {{ {_PAPER} }}\n"
    )


def step_of(logit: float, threshold: float = 0.0) -> int:
    """Place on the scale, from 0 far below the threshold to N_STEPS - 1 far above it; the class is 's' and this number."""
    return round((score_share(logit, threshold) + 1) / 2 * (N_STEPS - 1))


def _steps(*, dark: bool) -> str:
    shares = [2 * at / (N_STEPS - 1) - 1 for at in range(N_STEPS)]
    return " ".join(f".s{at} {{ background: {share_colour(share, dark=dark)}; }}" for at, share in enumerate(shares))


_OWN = {
    "light": "--raised: #f3f3f0; --quiet: #565656; --good: #00634a; --bad: #a33a00; --unsure: #6a5200;",
    "dark": "--raised: #222427; --quiet: #b4b4b4; --good: #4fd3ab; --bad: #ff9a56; --unsure: #e8c95a;",
}
_RULES = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--surface); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; max-width: 50rem; }
.note { font-weight: 400; max-width: 24rem; }
.quiet, .note, caption, figcaption { color: var(--quiet); font-size: .875rem; }
.verdict { border-left: .4rem solid; padding: .6rem 1rem; margin: 1rem 0; background: var(--raised); }
.verdict strong { font-size: 1.15rem; }
.verdict p { color: var(--ink); }
.good { color: var(--good); } .bad { color: var(--bad); } .unsure { color: var(--unsure); }
.scroll { overflow-x: auto; margin: .5rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--series-0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9375rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .3rem 1.1rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; overflow-wrap: anywhere; min-width: 5.5rem; }
thead th { vertical-align: bottom; min-width: 0; overflow-wrap: normal; }
td { font-variant-numeric: tabular-nums; }
td .range { white-space: nowrap; }
td.facts, .facts td { overflow-wrap: anywhere; min-width: 9rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2rem 1.5rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 32rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; padding: .25rem 0; font-weight: 600; }
.example { margin: 1rem 0 1.5rem; }
pre { margin: .35rem 0; padding: .6rem .75rem; border: 1px solid var(--grid); background: var(--raised);
  font: .875rem/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span[title] { padding: .1rem 0; unicode-bidi: isolate; }
.hi { border-bottom: 2px solid var(--bad); }
.top { outline: 2px solid var(--ink); outline-offset: -1px; }
.wrong { text-decoration: underline wavy; }
.nl::before { content: "\\21B5"; opacity: .75; } .tab::before { content: "\\2192"; opacity: .75; }
.ctl { border: 1px dotted; font-size: .75rem; }
code, .piece { font-family: ui-monospace, monospace; font-size: .9em; white-space: pre-wrap; }
.scale span { display: inline-block; padding: .1rem .5rem; }
"""
_NARROW = """body { padding: 1rem .75rem 3rem; } th, td { padding-right: .7rem; font-size: .875rem; }
  td .range { display: inline-block; } pre { padding: .5rem; }"""
_PAPER = """body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  pre, figure, tr, .verdict { break-inside: avoid; } pre span, .scale span { print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .pictures { grid-template-columns: 1fr 1fr; }"""
