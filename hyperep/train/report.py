# SPDX-License-Identifier: Apache-2.0
"""``report.html``: a run on one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from hyperep.train.themes import DARK, LIGHT, Theme

__all__ = ["Picture", "report_page"]

Picture = Mapping[str, bytes]
"""PNG by the name of its theme."""


def report_page(
    *,
    title: str,
    headline: str,
    figures: Sequence[tuple[str, str, str]],
    verdict: tuple[bool, str] | None,
    pictures: Sequence[tuple[str, str, Picture]],
    tables: Sequence[tuple[str, Mapping[str, str]]],
) -> str:
    """Lay out the page.

    Args:
        title: of the page.
        headline: a sentence that says what the run was.
        figures: name, value and a remark for each of the large figures at the top.
        verdict: whether the run was verified, and the sentence about it.
        pictures: heading, caption and picture.
        tables: heading and rows.
    """
    parts = [f"<header><h1>{_text(title)}</h1><p>{_text(headline)}</p></header>"]
    if verdict is not None:
        passed, sentence = verdict
        kind, mark = ("good", "✓") if passed else ("bad", "✗")
        parts.append(f'<p class="verdict {kind}"><span aria-hidden="true">{mark}</span> {_text(sentence)}</p>')
    cards = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><dd class=remark>{_text(remark)}</dd></div>"
        for name, value, remark in figures
    )
    parts.append(f'<dl class="figures">{cards}</dl>')
    parts += [_picture(*picture) for picture in pictures]
    parts.append(f'<div class="tables">{"".join(_table(*table) for table in tables)}</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value)


def _table(heading: str, rows: Mapping[str, str]) -> str:
    body = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in rows.items())
    return f"<section><h2>{_text(heading)}</h2><table>{body}</table></section>"


def _picture(heading: str, caption: str, picture: Picture) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(picture[t.name]).decode()}" for t in (LIGHT, DARK))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{_text(heading)}"></picture><figcaption>{_text(caption)}</figcaption></figure>'
    )


def _variables(theme: Theme, **others: str) -> str:
    colours = {"page": theme.page, "ink": theme.ink, **others}
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


_LIGHT = _variables(LIGHT, around="#f3f5f8", border="#e1e5eb", good="#1a7f4b", bad="#c0342b")
_DARK = _variables(DARK, around="#0f1319", border="#2a313c", good="#4cc38a", bad="#ff7b72")
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--around); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }}
main {{ max-width: 960px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em }}
h2 {{ font-size: 1rem; margin: 0 0 .6rem }}
header p {{ margin: 0; opacity: .8 }}
.verdict {{ margin: 1.25rem 0 0; padding: .7rem 1rem; border-radius: 10px; background: var(--page);
  border: 1px solid var(--border); border-left: 4px solid }}
.verdict span {{ font-weight: 700; margin-right: .4rem }}
.good {{ border-left-color: var(--good) }} .good span {{ color: var(--good) }}
.bad {{ border-left-color: var(--bad) }} .bad span {{ color: var(--bad) }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: .8rem; margin: 1.25rem 0 }}
.figures div, figure, section {{ background: var(--page); border: 1px solid var(--border); border-radius: 10px }}
.figures div {{ padding: .9rem 1rem }}
.figures dt {{ font-size: .85rem; opacity: .75 }}
.figures dd {{ margin: 0; font-size: 1.6rem; font-weight: 650; font-variant-numeric: tabular-nums }}
.figures .remark {{ font-size: .8rem; font-weight: 400; opacity: .75 }}
figure {{ margin: 0 0 .8rem; padding: 1rem }}
figure img {{ display: block; width: 100%; height: auto }}
figcaption {{ font-size: .85rem; opacity: .8; margin-top: .6rem }}
.tables {{ columns: 340px 2; column-gap: .8rem }}
section {{ padding: 1rem 1.1rem; margin-bottom: .8rem; break-inside: avoid }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem 0; border-top: 1px solid var(--border) }}
tr:first-child > * {{ border-top: 0 }}
th {{ font-weight: 500; opacity: .75; padding-right: 1rem; white-space: nowrap }}
td {{ overflow-wrap: anywhere; font-variant-numeric: tabular-nums }}
"""
