"""The front page's figure: what public code takes, what the best plain PyTorch takes, and what saml-kernels takes."""

from typing import Final

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import page as pages
from records import PUBLIC, Record, cells

OURS: Final = "cpp"
INK: Final = "#767676"
"""Of all text: readable on white and on black."""
COLOURS: Final = ("#999999", "#999999", "#0072B2")
TITLES: Final = {"forward": "Inference, on a CPU", "step": "Training step (forward and backward), on a CPU"}


def figure(record: Record) -> Figure:
    """From the headline's first cell: three bars a pass; × says how many times as long as the last one it takes."""
    cell, machine = cells(record)[0], record["machine"]
    drawn, axes = plt.subplots(len(TITLES), 1, figsize=(8, 3.6))
    drawn.set_facecolor("none")
    for panel, (kind, title) in zip(axes, TITLES.items(), strict=True):
        ours, best = cell.speed_up(OURS, kind), cell.best_peer("float32", kind)
        public = cell.timed(PUBLIC, kind)
        if ours is None or best is None or public is None or ours.public is None:
            raise ValueError(f"the headline lacks {kind} of {OURS}, of {PUBLIC} or of another peer")
        how = best if "compiled" in best else f"{best}, eager"
        bars = (
            ("what public code does: every row\nthrough all towers", public.median, f"  {ours.public:.1f}×"),
            (f"best plain PyTorch, eager or\ncompiled: {how}", cell.median(best, kind) or 0, f"  {ours.ratio:.1f}×"),
            ("saml-kernels", ours.median, ""),
        )
        longest = max(seconds for _, seconds, _ in bars) * 1e3
        panel.barh(range(len(bars)), [seconds * 1e3 for _, seconds, _ in bars], color=COLOURS, height=0.72)
        for place, (_, seconds, factor) in enumerate(bars):
            text = f"{pages.digits(seconds * 1e3)} ms{factor}"
            panel.text(seconds * 1e3 + longest / 100, place, text, va="center", color=INK)
        panel.set_yticks(range(len(bars)), [label for label, _, _ in bars], color=INK)
        panel.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=9)
        panel.set_xlim(0, 1.2 * longest)
        panel.set_xticks([])
        panel.invert_yaxis()
        panel.patch.set_alpha(0)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    widths = ", ".join(map(str, cell.data["hidden_dims"]))
    caption = (
        f"{cell.B} rows, {cell.M} scenarios, layers {widths}, float32; × is how many times as long as saml-kernels\n"
        f"CPU: {machine['processor']}, {machine['cpu capability']}, {record['threads']} threads; "
        f"torch {machine['torch']}, saml-kernels {machine['saml-kernels']}"
    )
    drawn.supxlabel(caption, color=INK, fontsize=8, ha="left", x=0.01)
    return drawn
