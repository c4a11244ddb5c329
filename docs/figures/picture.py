"""What is every picture made of?

Shapes and words on a canvas, as SVG text that follows the reader's light or dark scheme. Each picture has a ground of
its own, so that it can be read on any page.
"""

from html import escape

Pair = tuple[str, str]  # a colour in the light scheme and in the dark one

GROUND: Pair = ("#ffffff", "#0d1117")
# kind of box: fill, edge
BOXES: dict[str, tuple[Pair, Pair]] = {
    "plain": (("#f6f8fa", "#21262d"), ("#8c959f", "#768390")),
    "attention": (("#ddf4ff", "#0c2d4d"), ("#218bff", "#4493f8")),
    "dense": (("#dafbe1", "#12361f"), ("#2da44e", "#3fb950")),
    "expert": (("#fff1d6", "#3d2e08"), ("#a8780b", "#d29922")),
    "cached": (("#fbefff", "#321f57"), ("#a475f9", "#ab7df8")),
}
INK: dict[str, Pair] = {"ink": ("#1f2328", "#e6edf3"), "soft": ("#59636e", "#9198a1")}
LINE: Pair = ("#6e7781", "#8b949e")
GRID: Pair = ("#d8dee4", "#2d333b")
# Things that are compared, in this order. Each pair differs for the colour-blind too (tests/test_figures.py).
SERIES: tuple[Pair, ...] = (
    ("#0370f6", "#4c95ff"),  # blue
    ("#c04c0b", "#ee7f24"),  # orange
    ("#01512d", "#4be3a0"),  # green
    ("#870b8d", "#ebb6fc"),  # purple
    ("#747682", "#83858d"),  # grey
)
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def n(value: float) -> str:
    """A length in pixels, to a hundredth: the same text on every machine."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


class Picture:
    """Shapes on a canvas; x grows to the right and y downwards, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def rect(
        self, x: float, y: float, w: float, h: float, kind: str, *, round_by: float = 0, opacity: float = 1
    ) -> None:
        extra = (f' rx="{n(round_by)}"' if round_by else "") + (f' fill-opacity="{n(opacity)}"' if opacity < 1 else "")
        self.shapes.append(f'<rect class="{kind}" x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}"{extra}/>')

    def box(self, x: float, y: float, w: float, h: float, kind: str, *lines: str) -> None:
        """A rounded box; the first line of its text is strong, the others are soft."""
        self.rect(x, y, w, h, kind, round_by=7)
        top = y + h / 2 - 7.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + 15 * i, line, "ink strong" if i == 0 else "soft")

    def text(
        self, x: float, y: float, words: str, style: str = "ink", anchor: str = "middle", *, turned: bool = False
    ) -> None:
        """Words whose middle is at height y; turned: read upwards, with their middle at x."""
        turn = f' transform="rotate(-90 {n(x)} {n(y)})"' if turned else ""
        place = f'x="{n(x)}" y="{n(y + 4)}" text-anchor="{anchor}"{turn}'
        self.shapes.append(f'<text class="{style}" {place}>{escape(words, quote=False)}</text>')

    def line(self, *points: tuple[float, float], style: str = "line") -> None:
        path = " L".join(f"{n(x)} {n(y)}" for x, y in points)
        self.shapes.append(f'<path class="{style}" d="M{path}"/>')

    def area(self, *points: tuple[float, float], style: str) -> None:
        """What these corners enclose."""
        corners = " ".join(f"{n(x)},{n(y)}" for x, y in points)
        self.shapes.append(f'<polygon class="{style}" points="{corners}"/>')

    def dot(self, x: float, y: float, style: str, radius: float = 3.5) -> None:
        self.shapes.append(f'<circle class="{style}" cx="{n(x)}" cy="{n(y)}" r="{n(radius)}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line along the points, with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.line(*points[:-1], (x - 5 * dx, y - 5 * dy))
        left, right = (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)
        self.area((x, y), left, right, style="head")

    def plus(self, x: float, y: float) -> None:
        """The sum of a branch and the residual stream."""
        self.dot(x, y, "plain", 9)
        self.line((x - 4, y), (x + 4, y))
        self.line((x, y - 4), (x, y + 4))

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        title = escape(self.title, quote=False)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title">'
        ground = f'<rect class="ground" width="{self.width}" height="{self.height}" rx="8"/>'
        return "\n".join([head, f'<title id="title">{title}</title>', style(), ground, *self.shapes, "</svg>"]) + "\n"


def style() -> str:
    """Colours of both schemes, and the sizes of text and lines."""
    shapes = [
        f"text {{ font: 12px {FONT} }}",
        ".strong { font-weight: 600 }",
        ".title { font-size: 14px; font-weight: 600 }",
        ".small { font-size: 11px }",
        f".code {{ font-family: {MONO} }}",
        ".line, .grid { fill: none; stroke-width: 1.5 }",
        ".grid { stroke-width: 1 }",
        ".curve { fill: none; stroke-width: 2; stroke-linejoin: round }",
        ".thin { stroke-width: 1; stroke-opacity: .35 }",
        ".dashed { stroke-dasharray: 6 4 }",
        ".dotted { stroke-dasharray: 2 3 }",
        ".band { stroke: none; fill-opacity: .18 }",
    ]
    dark = "@media (prefers-color-scheme: dark) {"
    return "\n".join(["<style>", *shapes, *colours(0), dark, *colours(1), "}", "</style>"])


def colours(scheme: int) -> list[str]:
    """The rules of one scheme: 0 light, 1 dark."""
    rules = [f".ground {{ fill: {GROUND[scheme]} }}"]
    rules += [f".{name} {{ fill: {fill[scheme]}; stroke: {edge[scheme]} }}" for name, (fill, edge) in BOXES.items()]
    rules += [f".{name} {{ fill: {pair[scheme]} }}" for name, pair in INK.items()]
    rules += [f".line {{ stroke: {LINE[scheme]} }}", f".head {{ fill: {LINE[scheme]} }}"]
    rules += [f".grid {{ stroke: {GRID[scheme]} }}"]
    for number, pair in enumerate(SERIES):
        rules += [f".fill{number} {{ fill: {pair[scheme]} }}", f".curve{number} {{ stroke: {pair[scheme]} }}"]
    rules += [f".on{a}{b} {{ fill: {('#000000', '#ffffff')[(a, b)[scheme]]} }}" for a in (0, 1) for b in (0, 1)]
    return rules
