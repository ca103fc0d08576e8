"""A small chart as SVG, which is text: lines of points on axes, a name at the end of each line.

python benchmarks/plot.py      docs/images/presets.svg and guidance.svg from results/presets.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, MARGIN, LEGEND = 640, 360, 46, 170
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#7f7f7f", "#8c564b")


def chart(lines: Mapping[str, Points], *, x: str, y: str, title: str) -> str:
    """`y` in [0, 1] is written in percent; x begins at 0."""
    most = max(px for points in lines.values() for px, _ in points)
    high = min(1.0, 1.1 * max(py for points in lines.values() for _, py in points))
    step = _round_step(most)

    def at(px: float, py: float) -> tuple[float, float]:
        wide, tall = WIDTH - 2 * MARGIN - LEGEND, HEIGHT - 2 * MARGIN
        return MARGIN + wide * px / most, HEIGHT - MARGIN - tall * py / high

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(MARGIN, 20, title, size=13),
        _text(at(most / 2, 0)[0], HEIGHT - 10, x, anchor="middle"),
        _text(MARGIN, MARGIN - 8, y),
    ]
    for value in (high * i / 4 for i in range(5)):
        (left, row), (right, _) = at(0, value), at(most, value)
        parts.append(f'<path d="M{left:.1f} {row:.1f}H{right:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, row + 4, f"{value:.0%}", anchor="end"))
    for tick in range(0, int(most) + 1, step):
        parts.append(_text(at(tick, 0)[0], HEIGHT - MARGIN + 16, str(tick), anchor="middle"))
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        places = [at(px, py) for px, py in sorted(points)]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in places]
        parts.append(_text(WIDTH - LEGEND - MARGIN + 30, MARGIN + 16 * i, name, color=color))
    return "\n".join([*parts, "</svg>\n"])


def _round_step(most: float) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200) if most / step <= 8)


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = "#222", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}">{text}</text>'


def samplers(figures: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Rows of the network and what came out right, of every sampler in so many evenly spaced steps of its own."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in _of_equal_prompts(figures):
        is_plain = row["spacing"] is None and row["interval"] is None and row["guidance"] == figures["guidance"]
        if is_plain and isinstance(row["steps"], int) and row["network"] == "built-in":
            lines.setdefault(row["sampler"], []).append((row["rows"], row["right"]))
    return lines


def guidances(figures: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The scale of the guidance and what came out right, by the interval in which there is guidance."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in _of_equal_prompts(figures):
        told = (row["sampler"], row["steps"], row["spacing"], row["network"])
        if told == ("Euler ancestral", 20, None, "built-in"):
            name = "at all timesteps" if row["interval"] is None else "from {} to {}".format(*row["interval"])
            lines.setdefault(name, []).append((row["guidance"], row["right"]))
    return lines


def _of_equal_prompts(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    num_prompts = min(row["prompts"] for row in figures["rows"])
    return [row for row in figures["rows"] if row["prompts"] == num_prompts]


def main() -> None:
    figures = json.loads((RESULTS / "presets.json").read_text())["figures"]
    num_prompts = min(row["prompts"] for row in figures["rows"])
    of = f"Built-in stage I, {num_prompts} prompts"
    charts = {
        "presets": (samplers(figures), "rows of the network", f"{of}, guidance {figures['guidance']:g}"),
        "guidance": (guidances(figures), "guidance", f"{of}, Euler ancestral in 20 steps"),
    }
    for name, (lines, x, title) in charts.items():
        path = Path(__file__).parent.parent / "docs" / "images" / f"{name}.svg"
        path.write_text(chart(lines, x=x, y="everything right", title=title))
        print(path)


if __name__ == "__main__":
    main()
