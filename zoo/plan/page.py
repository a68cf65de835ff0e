"""A plan as one web page that needs nothing else: pictures are inside it, and no script runs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from zoo.plan.explain import described, different, in_words
from zoo.plan.report import TIGHT, as_text
from zoo.plan.wording import count, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zoo.plan.estimate import Estimate
    from zoo.plan.plan import Plan

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.sub { color: #595959; margin-top: 0; } .layout { font-size: 1.25rem; font-weight: 600; margin: 1rem 0 .6rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; padding: .8rem 0; border: solid #ddd; border-width: 1px 0; }
.facts div { line-height: 1.25; } .facts b { display: block; font-size: 1.25rem; } .facts span { color: #595959; }
svg { width: 100%; height: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; } th { color: #595959; font-weight: 400; }
td.n, th.n { text-align: right; } pre { overflow-x: auto; font-size: .85rem; line-height: 1.35; }
.note { color: #595959; font-size: .9rem; }
"""
CAPTIONS = {
    "memory": ("Memory", "What fills the fullest device, beside the runner-up; the dashed line is what there is."),
    "time": ("Time of a step", "What runs beside other work counts only as far as it is not hidden."),
    "landscape": ("The landscape of layouts", "Each point is a layout that was priced; the star is the plan."),
    "sensitivity": (
        "What a better machine would bring",
        "The step with less (orange) and more (blue) of each resource, everything else as it is.",
    ),
}
LEGEND = (
    "One of each way to divide the model. tp: devices that share the matrices of a layer; pp: stages, in vp pieces "
    "each; cp: devices that share a sequence; ep: groups that share the experts, etp: devices that share an expert; "
    "dp: replicas; shard: devices that share the weights of a replica. Degrees of one are left out."
)
MOST_ROWS = 12


def page(plan: Plan, drawn: Mapping[str, Figure], further: Mapping[str, list[RenderableType]] | None = None) -> str:
    """The page.

    Args:
        drawn: Pictures by name, as `zoo.plan.pictures.pictures` gives them.
        further: More sections by title: parts of a report.
    """
    best, chip = plan.best, plan.question.machine.chip
    title = f"{best.model} on {best.num_devices:,} x {chip.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(_about(plan))}</p>',
        f'<p class="layout">{escape(described(best))}</p>',
        _facts(best),
        _section("Why this one", plan.reasons),
        _section("What runs out first", in_words(plan.limits)),
        *(_picture(name, figure) for name, figure in drawn.items()),
        f'<h2>The best layouts</h2><p class="note">{escape(LEGEND)}</p>{_layouts(plan)}',
        *(f"<h2>{escape(name)}</h2><pre>{escape(as_text(lines))}</pre>" for name, lines in (further or {}).items()),
        f'<p class="note">{escape(_footer(plan))}</p>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def write_page(path: Path, text: str) -> None:
    """Write a page; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _about(plan: Plan) -> str:
    best, q = plan.best, plan.question
    params = q.spec.params()
    active = f", {count(params.active)} active" if params.active != params.total else ""
    announced = "; announced, not measured" if q.machine.chip.announced else ""
    return (
        f"{count(params.total)} parameters{active}; {best.global_batch:,} sequences of {best.seq_len:,} tokens a step; "
        f"{best.precision}, {q.optimizer}; {q.machine.name}, domains of {q.machine.domain_size}{announced}"
    )


def _facts(best: Estimate) -> str:
    limit = best.memory_limit_gib
    tight = ", tight" if limit and best.total_memory_gib > TIGHT * limit else ""
    facts = {
        "a step": seconds(best.step_time_s),
        "tokens/s a device": f"{best.tokens_per_s_per_device:,.0f}",
        "tokens/s in all": count(best.tokens_per_s),
        "MFU": f"{best.mfu:.1%}",
        f"GiB{f' of {limit:g}' if limit else ''} a device{tight}": f"{best.total_memory_gib:.4g}",
    }
    shown = [f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for what, value in facts.items()]
    return f'<div class="facts">{"".join(shown)}</div>'


def _section(title: str, sentences: Iterable[str]) -> str:
    return f"<h2>{escape(title)}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in sentences)}</ul>"


def _picture(name: str, figure: Figure) -> str:
    title, caption = CAPTIONS[name]
    return f'<h2>{escape(title)}</h2><p class="note">{escape(caption)}</p>{svg_of(figure, name)}'


def svg_of(figure: Figure, name: str) -> str:
    """A figure as an element of a page: without the preamble and metadata, which name addresses elsewhere.

    Ids are made different from those of the other figures of the page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)


def _layouts(plan: Plan) -> str:
    found, rows = plan.found, []
    for row in different(found, MOST_ROWS):
        again = found.recompute(row)
        later = f"{found.seconds[row] / found.seconds[0] - 1:+.1%}" if row else ""
        cells = [str(found.layout(row)), "" if again == "none" else again]
        numbers = [
            str(found.micro_batch(row)),
            seconds(float(found.seconds[row])),
            later,
            f"{found.memory_gib[row]:.4g}",
        ]
        rows.append(
            "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "".join(f'<td class="n">{n}</td>' for n in numbers)
        )
    names = ("micro-batch", "step", "", "GiB")
    head = "<th>layout</th><th>recompute</th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _footer(plan: Plan) -> str:
    found = plan.found
    return (
        f"{found.num_legal:,} legal layouts, {len(found):,} of them priced, {found.num_fitting:,} fit; the others "
        f"cannot win. Constants of {plan.best.engine}."
    )
