"""The report of a study: one HTML page with everything in it, its figures as PNG files, and the runs as CSV."""

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from convneur.config import config_text
from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.models.convneur.config import variant_named
from convneur.planning.forecast import total
from convneur.studies import words
from convneur.studies.cost import read_study_plan
from convneur.studies.figures import draw
from convneur.studies.fit import LEVEL, Findings, StudyFit
from convneur.studies.grid import Place, Point, StudyConfig, study_runs
from convneur.studies.series import series_folder

REPORT_FILE, POINTS_FILE = "report.html", "points.csv"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 77rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } img { max-width: 100%; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 0.8rem; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
.note { color: #555; font-size: 0.9rem }
"""


def write_report(config: StudyConfig, findings: Findings, folder: Path) -> list[Path]:
    """Writes report.html, points.csv and the figures into a folder; returns their paths, the page first."""
    pictures = draw(config, findings)
    page = _page(config, findings, pictures)
    contents = {REPORT_FILE: page.encode(), POINTS_FILE: _csv(findings.points).encode(), **pictures}
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in contents]


def _page(config: StudyConfig, findings: Findings, pictures: Mapping[str, bytes]) -> str:
    parts = [
        *_opening(config, findings),
        *_losses(findings, pictures),
        *_laws(findings),
        *_windows(findings),
        *_best_sizes(findings, pictures),
        *_training(config, findings, pictures),
        *_making(config, findings),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(config.run.name)}</title>"
    return f"{head}<style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n"


def _opening(config: StudyConfig, findings: Findings) -> list[str]:
    finished = len(findings.points)
    return [
        f"<h1>Scaling study {escape(config.run.name)}</h1>",
        f"<p>{finished} of {len(study_runs(config))} runs are finished. "
        f"Sizes {', '.join(config.study.sizes)}; held out {', '.join(config.study.held_out) or 'none'}. Images of "
        f"{config.data.image_size} x {config.data.image_size} pixels from {escape(config.data.root)}. A size such as "
        f"{config.study.sizes[0]} {_size_in_words(config.study.sizes[0])}. Loss is the cross-entropy on the held-out "
        f"images, of the averaged weights where a run keeps an average. All intervals "
        f"are of {LEVEL:.0%}.</p>",
        "<h2>What it says</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in _summary(config, findings)),
        "</ul>",
    ]


def _losses(findings: Findings, pictures: Mapping[str, bytes]) -> list[str]:
    return [
        "<h2>Loss and error by size</h2>",
        _picture(pictures, "loss-by-size.png"),
        "<p class=note>A point is a run. Lines are the fitted laws L = E + A N<sup>-&alpha;</sup>, bands the intervals"
        " of the laws; where there is no line, the section on laws says why. Hollow points are of held-out sizes, which"
        " no fit has seen.</p>",
        "<h2>Memory against local-only at equal compute</h2>",
        _picture(pictures, "memory-against-local.png"),
        _table(
            ("runs", "training MACs", "loss with memory", "loss local-only", "difference"),
            (
                (c.runs, f"{b.budget:.3g}", f"{b.first:.4f}", f"{b.second:.4f}", words.difference(b))
                for c in findings.comparisons
                for b in c.budgets
            ),
        ),
        "<p class=note>At every budget that was run of either kind, the other kind's loss is interpolated between its"
        " neighbouring sizes. The intervals are Student's, from the spread between seeds.</p>",
    ]


def _laws(findings: Findings) -> list[str]:
    return [
        "<h2>Fitted laws</h2>",
        _table(
            ("law", "kind", "runs", "points", "floor E", "exponents"),
            (_fit_row(fit) for fit in findings.fits if fit.fit),
        ),
        *(f"<p class=note>{escape(line)}</p>" for line in _refusals(findings)),
        "<h2>Held-out sizes</h2>",
        _table(
            ("size", "law", "kind", "runs", "predicted, for their mean", "measured", "error", "within the interval"),
            (
                (
                    p.size,
                    f"{f.metric} by {f.axis}",
                    words.kind(f.placement),
                    f"{f.runs}, {p.runs} seeds",
                    words.interval(p.predicted),
                    f"{p.measured:.4g}",
                    "-" if p.error is None else f"{p.error:+.1%}",
                    "yes" if p.predicted.holds(p.measured) else "no",
                )
                for f in findings.fits
                for p in f.predictions
                if p.measured is not None
            ),
        ),
    ]


def _windows(findings: Findings) -> list[str]:
    return [
        "<h2>How the fit depends on its smallest sizes</h2>",
        "<p class=note>The same fit without the smallest size, without the two smallest, and so on, as long as five"
        " sizes and a decade of parameters are left; a single line says that no size may go.</p>",
        _table(
            ("law", "kind", "runs", "from", "sizes", "floor E", "exponent"),
            (
                (
                    f"{f.metric} by {f.axis}",
                    words.kind(f.placement),
                    f.runs,
                    f"{w.smallest:.3g}",
                    str(w.sizes),
                    words.interval(w.floor),
                    words.exponent(w.exponent),
                )
                for f in findings.fits
                for w in f.windows
            ),
        ),
    ]


def _best_sizes(findings: Findings, pictures: Mapping[str, bytes]) -> list[str]:
    return [
        "<h2>Best size at equal compute</h2>",
        "<p class=note>A curve joins sizes that were trained with equal compute, interpolated between lengths of"
        " training. Where its lowest point is its end, a still smaller or larger size may be better: the curve is"
        " dashed, and no best size is given.</p>",
        _picture(pictures, "isoflop.png"),
        _table(
            ("kind", "training MACs", "sizes", "best size"),
            (
                (words.kind(placement), f"{c.budget:.3g}", str(len(c.sizes)), words.best_size(c.best_size))
                for placement, curves in findings.isoflops.items()
                for c in curves
            ),
        ),
    ]


def _training(config: StudyConfig, findings: Findings, pictures: Mapping[str, bytes]) -> list[str]:
    return [
        "<h2>Training</h2>",
        _picture(pictures, "training.png"),
        "<h2>Cost</h2>",
        _table(
            ("size", "kind", "parameters", "MACs of a run, longest", "finished runs", "spent", "predicted for all"),
            _cost_rows(config, findings),
        ),
        "<p class=note>Spent: hours of every GPU, or of every core that computed: wall time times ranks times threads."
        " They include evaluation, checkpoints and waiting for other work on the machine. Predicted: GPU hours of all"
        " runs, by `convneur study run --plan`.</p>",
    ]


def _making(config: StudyConfig, findings: Findings) -> list[str]:
    return [
        "<h2>How it was made</h2>",
        "<p>Laws are fitted to the logarithm of the losses by Huber's cost from many starts. Their intervals come from"
        " a bootstrap that gives every run the residual of a run drawn at random, scaled to the spread of the noise at"
        " its size, taken for a power of it. They can't be promised where the noise changes in another way, and"
        " don't answer for the law being the wrong one. No fit is made below five sizes or a decade of parameters. What"
        " lies beyond the largest size is extrapolated.</p>",
        "<h2>Runs</h2>",
        _table(POINT_COLUMNS[1:], (_point_cells(point)[1:] for point in findings.points)),
        f"<details><summary>The recipe of all runs</summary><pre>{escape(config_text(config))}</pre></details>",
    ]


def _summary(config: StudyConfig, findings: Findings) -> Iterator[str]:
    for comparison in findings.comparisons:
        last = comparison.budgets[-1]
        yield (
            f"Memory against local-only, {comparison.runs}: at {last.budget:.3g} MACs, the largest budget that both"
            f" kinds reach, loss is {last.first:.4f} with memory and {last.second:.4f} local-only; the difference is"
            f" {words.difference(last)}."
        )
    for fit in findings.fits:
        if fit.metric == "loss" and fit.axis == "parameters":
            what = f"Loss by parameters, {words.kind(fit.placement)}, {fit.runs}"
            predictions = "".join(
                f" It predicts {words.interval(line.predicted)} for {line.size}; {words.measured(line.measured)}."
                for line in fit.predictions
            )
            yield f"{what}: {words.law(fit)}.{predictions}" if fit.fit else f"{what}: no fit, {fit.refusal}."
    yield from findings.notes


def _size_in_words(size: str) -> str:
    shape = variant_named(size)
    *depths, last = map(str, shape.depths)
    return f"has {shape.base_width} channels in its first stage and {', '.join(depths)} and {last} blocks in the four"


def _picture(pictures: Mapping[str, bytes], name: str) -> str:
    if name not in pictures:
        return "<p class=note>Not enough runs yet.</p>"
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return "<p class=note>Not enough runs yet.</p>"
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _fit_row(fit: StudyFit) -> tuple[str, ...]:
    assert fit.fit is not None
    exponents = "; ".join(words.exponent(fit.fit.exponent(term)) for term in range(len(fit.fit.law.exponents)))
    law = f"{fit.metric} by {fit.axis}"
    return law, words.kind(fit.placement), fit.runs, str(len(fit.points)), words.interval(fit.fit.floor), exponents


def _refusals(findings: Findings) -> Iterator[str]:
    """Why some laws are not there, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for fit in findings.fits:
        if fit.refusal:
            what = f"{fit.metric} by {fit.axis}, {words.kind(fit.placement)}, {fit.runs}"
            reasons.setdefault(fit.refusal, []).append(what)
    for reason, laws in reasons.items():
        yield f"No fit, because of {reason}: {'; '.join(laws)}."


def _cost_rows(config: StudyConfig, findings: Findings) -> Iterator[tuple[str, ...]]:
    try:
        planned, unplanned = read_study_plan(series_folder(config)), "not planned"
    except DamagedError as error:
        planned, unplanned = {}, f"not known: {error}"
    places = [place for place in study_runs(config) if place.name in planned]

    def predicted(of: Iterable[Place]) -> str:
        spans = [planned[place.name] for place in of]
        return f"{total(spans).low:.3g} to {total(spans).high:.3g} GPU h" if spans else unplanned

    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [p for p in findings.points if (p.place.size, p.place.placement) == (size, placement)]
            if mine:
                macs = f"{max(p.macs for p in mine):.3g}"
                hours = predicted(place for place in places if (place.size, place.placement) == (size, placement))
                yield size, words.kind(placement), f"{mine[0].params:,}", macs, str(len(mine)), _hours(mine), hours
    yield "all", "", "", "", str(len(findings.points)), _hours(findings.points), predicted(places)


def _hours(points: Sequence[Point]) -> str:
    spent = {kind: sum(p.hours for p in points if p.device == kind) for kind in sorted({p.device for p in points})}
    return ", ".join(f"{hours:.3g} {kind} h" for kind, hours in spent.items())


POINT_COLUMNS = (
    "run", "size", "placement", "unique images", "epochs", "lr", "seed", "parameters", "training MACs", "images seen",
    "loss", "top-1", "hours", "device", "commit",
)  # fmt: skip


def _point_cells(point: Point) -> tuple[str, ...]:
    place = point.place
    commit = point.commit or "not known"
    return (
        place.name,
        place.size,
        place.placement,
        str(place.unique_images or "all"),
        str(place.epochs),
        f"{place.lr:g}",
        str(place.seed),
        str(point.params),
        f"{point.macs:.6g}",
        str(point.images),
        f"{point.loss:.5f}",
        f"{point.top1:.5f}",
        f"{point.hours:.4g}",
        point.device,
        commit if not commit[:40].isalnum() else commit[:12] + commit[40:],
    )


def _csv(points: Sequence[Point]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(POINT_COLUMNS)
    writer.writerows(_point_cells(point) for point in points)
    return lines.getvalue()
