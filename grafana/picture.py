"""Makes dashboard.png, a picture of the dashboard with real data: ``python grafana/picture.py --prometheus URL``.

It asks a Prometheus server what every panel of zodb-s3blobs.json asks, draws a page, and lets headless Chromium make a
picture of it. No Grafana is needed. It draws what this dashboard uses, not all that Grafana can do.
"""

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, UNIT, HEAD = 1600, 36, 64  # pixels: the page, one unit of gridPos, what stands above the first row
CHROMIUM = "chromium --headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars"
CHROMIUM += " --disable-background-networking --disable-component-update --disable-sync"
COLOURS = {"green": "#56a85c", "yellow": "#e8b93a", "orange": "#f7953f", "red": "#e5484d"}
COLOURS |= {"blue": "#5b9bf0", "purple": "#a678de"}
LINES = ["#6cc070", "#f0c541", "#5b9bf0", "#f7953f", "#ef5a66", "#b07be0", "#4fc4c4", "#e58ac0", "#a3b34a", "#8f9bb3"]
FAINT = "#9a9fab"
STYLE = """
* { box-sizing: border-box; margin: 0; font-weight: normal; font-style: normal }
body { background: #111217; color: #d5d8de; font: 13px/1.4 Inter, "DejaVu Sans", sans-serif; padding: 0 16px }
header { display: flex; align-items: center; gap: 10px } h1 { font-size: 21px; flex: 1 }
header span { border: 1px solid #34373f; border-radius: 3px; padding: 4px 10px }
header i, text, .legend, .none { color: #9a9fab; fill: #9a9fab }
section { display: grid; grid-template-columns: repeat(24, minmax(0, 1fr)); gap: 8px }
h2 { font-size: 16px; align-self: end } h2::before { content: "▾"; color: #9a9fab; margin: 0 8px 0 4px }
article { background: #181b1f; border: 1px solid #25282e; border-radius: 3px; padding: 6px 10px; overflow: hidden;
  display: flex; flex-direction: column }
h3 { font-size: 13px; white-space: nowrap; height: 24px }
svg { overflow: visible; width: 100%; height: 100% } text { font-size: 11px } path { vector-effect: non-scaling-stroke }
line { shape-rendering: crispEdges } .plot { flex: 1; min-height: 0; margin: 6px 4px 20px 62px }
.legend { max-height: 38%; overflow: hidden; font-size: 12px; display: flex; flex-wrap: wrap; gap: 0 14px }
.legend i { display: inline-block; width: 13px; height: 4px; border-radius: 2px; margin: 0 6px 3px 0 }
table { border-spacing: 0 } td { padding: 5px 8px; border-bottom: 1px solid #25282e }
.stat { flex: 1; display: flex; gap: 8px } .stat span { line-height: 1.2; z-index: 1 }
.stat div, .none { flex: 1; display: grid; place-items: center; container-type: size; position: relative }
.stat svg { position: absolute; inset: 0; opacity: 0.5 } .none { font-size: 16px }
"""


class Trouble(Exception):
    """A sentence for the person who runs this."""


# --- Values and their units -------------------------------------------------------------------------------------------

UNITS = {  # from which value on Grafana counts in what
    "none": [(1, "")],
    "short": [(1, ""), (1e3, "K"), (1e6, "Mil"), (1e9, "Bil")],
    "ops": [(1, "ops/s"), (1e3, "K ops/s")],
    "percentunit": [(0.01, "%")],
    "s": [(1e-6, "µs"), (1e-3, "ms"), (1, "s"), (60, "min"), (3600, "h"), (86400, "d")],
    "bytes": [(1024**n, f"{prefix}B") for n, prefix in enumerate(["", "Ki", "Mi", "Gi", "Ti"])],
    "Bps": [(1000**n, f"{prefix}B/s") for n, prefix in enumerate(["", "k", "M", "G", "T"])],
}


def formatted(value, unit):
    """The value with three digits, in the largest measure that is not larger than it."""
    if unit not in UNITS:
        raise Trouble(f"The unit {unit} is not known here: add it to UNITS.")
    size = abs(value) or 1
    scale, name = next((measure for measure in reversed(UNITS[unit]) if size >= measure[0]), UNITS[unit][0])
    text = f"{float(f'{value / scale:.3g}'):g}"
    return text + name if name == "%" else f"{text} {name}".strip()


def marks(low, high, unit, count):
    """Round values for an axis, about so many: the first is not above low, the last not below high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    steps = [power, 2 * power, 5 * power, 10 * power]
    if unit == "bytes":
        steps = [2 ** math.ceil(math.log2(rough))]
    elif unit == "s" and 20 < rough < 86400:
        steps = [30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400]
    step = next(step for step in steps if step >= rough * 0.99)
    return [step * n for n in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


# --- What the panels ask ----------------------------------------------------------------------------------------------


@dataclass
class Series:
    """One answer to a query of a panel."""

    name: str
    ref: str  # the letter of the query
    labels: dict
    field: dict  # the panel's `fieldConfig.defaults` with the overrides for this query
    values: list  # one for each moment of the time range, NaN where there is none; or a single one

    @property
    def known(self):
        return [value for value in self.values if math.isfinite(value)]

    def shown(self, value):
        """The value as text, and its colour by the thresholds."""
        for mapping in self.field["mappings"]:
            if mapped := mapping["options"].get(f"{value:g}"):
                return mapped["text"], COLOURS[mapped["color"]]
        steps = [step for step in self.field["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
        return formatted(value, self.field["unit"]), COLOURS[steps[-1]["color"]]


class Source:
    """A Prometheus server, and the time range of the picture."""

    def __init__(self, url, start, end, scrape_interval):
        self.url, self.start, self.end = url.rstrip("/"), start, end
        self.step = max(scrape_interval, math.ceil((end - start) / 160))
        self.count = int((end - start) / self.step) + 1
        self.rate_interval = max(4 * scrape_interval, self.step + scrape_interval)  # so Grafana has it

    def share(self, moment):
        """Where it is in the time range: 0 is the start, 1 the end."""
        return (moment - self.start) / (self.end - self.start)

    def ask(self, query, start):
        """The result that the HTTP API gives."""
        params = urllib.parse.urlencode({"query": query, "start": start, "end": self.end, "step": self.step})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{params}", timeout=60) as answer:
                return json.load(answer)["data"]["result"]
        except OSError as error:
            raise Trouble(f"Prometheus at {self.url} does not answer {query} ({error}).") from None

    def query(self, expression, instant=False):
        """Pairs of labels and values. Of all variables but one everything is chosen."""
        query = re.sub(r"\$\w+", ".+", expression.replace("$__rate_interval", f"{self.rate_interval}s"))
        start = self.end if instant else self.start
        for series in self.ask(query, start):
            values = [math.nan] * (1 if instant else self.count)
            for moment, value in series["values"]:
                values[round((moment - start) / self.step)] = float(value)
            yield series["metric"], values


def ask(panel, source):
    """All series of a panel."""
    result = []
    for target in panel["targets"]:
        ref, field = target["refId"], dict(panel["fieldConfig"]["defaults"])
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["options"] in (ref, "Value", f"Value #{ref}"):
                field |= {item["id"]: item["value"] for item in override["properties"]}
        for labels, values in source.query(target["expr"], target.get("instant", False)):
            legend = re.sub("{{(.*?)}}", lambda match, labels=labels: labels.get(match[1], ""), target["legendFormat"])
            result.append(Series(legend.strip(), ref, labels, field, values))
    return result


# --- How it is drawn: places are shares of width and height, from the upper left corner -------------------------------


def line(x1, y1, x2, y2, colour, dashes="none"):
    ends = f'x1="{x1:.2%}" y1="{y1:.2%}" x2="{x2:.2%}" y2="{y2:.2%}"'
    return f'<line {ends} stroke="{colour}" stroke-dasharray="{dashes}"/>'


def curve(values, floor, low, high, colour, opacity):
    """A line and the area between it and the floor, which the browser stretches; a gap where there is no value."""

    def corner(n, value):
        return f"{1000 * n / max(1, len(values) - 1):.1f} {1000 * (high - value) / (high - low):.1f}"

    lines, area = "", ""
    for there, group in itertools.groupby(range(len(values)), lambda n: math.isfinite(values[n])):
        if there:
            run = list(group)
            top = "L".join(corner(n, values[n]) for n in [*run, run[-1]])  # a single point is drawn as a dot
            lines += f"M{top}"
            area += f"M{top}L{'L'.join(corner(n, floor[n]) for n in reversed(run))}Z"
    fill = f'<path d="{area}" fill="{colour}" opacity="{opacity / 100}" shape-rendering="crispEdges"/>'
    stroke = f'<path d="{lines}" stroke="{colour}" fill="none" stroke-width="1.5" stroke-linecap="round"/>'
    return f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{fill}{stroke}</svg>'


def events(annotations, source):
    """Dashed lines where annotations are. Their values are moments in milliseconds."""
    for annotation in annotations:
        for x in {source.share(value / 1000) for _, values in source.query(annotation["expr"]) for value in values}:
            if 0 <= x <= 1:
                yield line(x, 0, x, 1, COLOURS[annotation["iconColor"]], "4 4")


def axes(panel, source, scale, high):
    """The times below a panel and the values beside it, a line for each, and dashed lines for the thresholds."""
    field, zone = panel["fieldConfig"]["defaults"], time.localtime(source.end).tm_gmtoff
    for mark in marks(source.start + zone, source.end + zone, "s", panel["gridPos"]["w"] / 1.5):
        x, text = source.share(mark - zone), time.strftime("%H:%M", time.gmtime(mark))
        if 0 <= x <= 1:
            yield line(x, 0, x, 1, "#23262c")
            yield f'<text x="{x:.2%}" y="100%" dy="16" text-anchor="middle">{text}</text>'
    for mark in scale:
        y, text = 1 - mark / high, formatted(mark, field["unit"])
        yield line(0, y, 1, y, "#2a2d34")
        yield f'<text x="-8" y="{y:.2%}" dy="4" text-anchor="end">{text}</text>'
    for step in field["thresholds"]["steps"]:
        if field["custom"]["thresholdsStyle"]["mode"] != "off" and 0 < (step["value"] or 0) <= high:
            y = 1 - step["value"] / high
            yield line(0, y, 1, y, COLOURS[step["color"]], "8 6")


def timeseries(panel, series, source, marked):
    field, floor, curves = panel["fieldConfig"]["defaults"], [0] * source.count, []
    for one, colour in zip(series, itertools.cycle(LINES)):
        values, below = one.values, floor
        if field["custom"]["stacking"]["mode"] == "normal":
            values = floor = [base + value for base, value in zip(below, values, strict=True)]
        curves.append((one.name, values, below, COLOURS.get(one.field["color"].get("fixedColor"), colour)))
    highest = max((value for _, values, *_ in curves for value in values if math.isfinite(value)), default=0)
    scale = marks(0, field.get("max") or highest or 1, field["unit"], panel["gridPos"]["h"] / 2)
    high = field.get("max") or scale[-1]
    svg = [*axes(panel, source, scale, high), *marked]
    for _, values, below, colour in reversed(curves):  # the first on top: it is not hidden by those on it
        svg.append(curve(values, below, 0, high, colour, field["custom"]["fillOpacity"]))
    names = [f'<span><i style="background: {colour}"></i>{escape(name)}</span>' for name, *_, colour in curves]
    return f'<div class="plot"><svg>{"".join(svg)}</svg></div><div class="legend">{"".join(names)}</div>'


def stat(panel, series, source, marked):
    """A large figure, for a range with its course below it."""
    options, result = panel["options"], ""
    for one in series:
        highest = max(one.known)
        text, colour = one.shown(highest if options["reduceOptions"]["calcs"] == ["max"] else one.known[-1])
        ink, ground = ("#fff", colour) if options["colorMode"] == "background" else (colour, "none")
        course, high = "", 3 * (highest or 1)
        if options["graphMode"] == "area":
            course = curve(one.values, [0] * source.count, -high / 30, high, ink, 20)
        size = f"font-size: min(46cqh, {150 / max(5, len(text)):.0f}cqw); color: {ink}"
        result += f'<div style="background: {ground}">{course}<span style="{size}">{escape(text)}</span></div>'
    return f'<div class="stat">{result}</div>'


def table(panel, series, source, marked):
    """A line for all series with the same labels, a column for each label and then for each query."""
    organize = next(item["options"] for item in panel["transformations"] if item["id"] == "organize")
    lines, titles = {}, {one.ref: one.field["displayName"] for one in series}
    for one in series:
        shown = {label: text for label, text in one.labels.items() if label not in organize["excludeByName"]}
        lines.setdefault(tuple(sorted(shown.items())), {})[one.ref] = one
    labels = {label for key in lines for label, _ in key}
    labels = sorted(labels, key=lambda label: organize["indexByName"].get(label, math.inf))
    rows = [[(organize["renameByName"].get(label, label), FAINT) for label in labels]]
    rows[0] += [(title, FAINT) for title in titles.values()]
    for key, cells in lines.items():
        nothing = panel["fieldConfig"]["defaults"]["noValue"], FAINT
        figures = [cells[ref].shown(cells[ref].known[-1]) if ref in cells else nothing for ref in titles]
        rows.append([(dict(key).get(label, ""), "inherit") for label in labels] + figures)
    cells = ["".join(f'<td style="color: {colour}">{escape(text)}</td>' for text, colour in row) for row in rows]
    return f"<table><tr>{'<tr>'.join(cells)}</table>"


KINDS = {"timeseries": timeseries, "stat": stat, "table": table}

# --- The page ---------------------------------------------------------------------------------------------------------


def drawn(panel, source, marked):
    """What is inside the frame of a panel."""
    if panel["type"] not in KINDS:
        raise Trouble(f"Panels of the type {panel['type']} cannot be drawn yet: add it to KINDS.")
    if series := [one for one in ask(panel, source) if one.known]:
        return KINDS[panel["type"]](panel, series, source, marked)
    return f'<p class="none">{escape(panel["fieldConfig"]["defaults"]["noValue"])}</p>'


def page(dashboard, source):
    """The dashboard as HTML, its height in pixels, and what went wrong, in sentences."""
    marked = list(events(dashboard["annotations"]["list"], source))
    chosen = [item["label"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    header = "".join([f"<h1>{dashboard['title']}</h1>", *(f"<span><i>{label}</i>&ensp;All</span>" for label in chosen)])
    header += f"<span>Last {formatted(source.end - source.start, 's')}</span>"
    body, wrong = "", []
    for panel in dashboard["panels"]:
        place, title = panel["gridPos"], escape(panel["title"])
        area = f"grid-area: {place['y'] + 1} / {place['x'] + 1} / span {place['h']} / span {place['w']}"
        try:
            if panel["type"] == "row":
                body += f'<h2 style="{area}">{title}</h2>'
            else:
                body += f'<article style="{area}"><h3>{title}</h3>{drawn(panel, source, marked)}</article>'
        except Trouble as error:
            wrong.append(f"Panel {panel['title']}: {error}")
    height = HEAD + UNIT * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) + 8
    html = f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><header style="height: {HEAD}px">{header}'
    return f'{html}</header><section style="grid-auto-rows: {UNIT - 8}px">{body}</section>', height, wrong


def photograph(html, height, file):
    """Has Chromium make a PNG file of the page."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "page.html")
        source.write_text(html, encoding="utf-8")
        command = [*CHROMIUM.split(), f"--window-size={WIDTH},{height}", f"--user-data-dir={directory}/profile"]
        command += [f"--screenshot={file.absolute()}", source.as_uri()]
        try:
            subprocess.run(command, check=True, timeout=120, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise Trouble(f"Chromium is not installed, or it failed: {error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=30, help="how far back the picture goes (default: 30)")
    parser.add_argument("--scrape-interval", type=int, default=15, metavar="SECONDS", help="of this Prometheus (15)")
    parser.add_argument("--output", type=Path, default=HERE / "dashboard.png", metavar="FILE")
    options = parser.parse_args()
    now = time.time()
    source = Source(options.prometheus, now - 60 * options.minutes, now, options.scrape_interval)
    try:
        html, height, wrong = page(json.loads((HERE / "zodb-s3blobs.json").read_text(encoding="utf-8")), source)
        if not wrong:
            photograph(html, height, options.output)
    except Trouble as error:
        wrong = [str(error)]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
