"""The front page's figure: what public code takes, what the best plain PyTorch takes, and what this takes."""

from typing import Final

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from records import PUBLIC, Record, cells

OURS: Final = "cpp"
INK: Final = "#767676"
"""Of all text: readable on white and on black."""
COLOURS: Final = ("#D55E00", "#009E73", "#0072B2")
TITLES: Final = {"forward": "Inference", "step": "Training step: forward and backward"}


def figure(record: Record) -> Figure:
    """From the headline's first cell: three bars a pass; a bar's factor is how many times as long as this it takes."""
    cell, machine = cells(record)[0], record["machine"]
    drawn, axes = plt.subplots(len(TITLES), 1, figsize=(8, 3.4), sharex=False)
    drawn.set_facecolor("none")
    for panel, (kind, title) in zip(axes, TITLES.items(), strict=True):
        ours, best = cell.speed_up(OURS, kind), cell.best_peer("float32", kind)
        if ours is None or best is None or ours.public is None:
            raise ValueError(f"the headline lacks {kind} of {OURS}, of {PUBLIC} or of another peer")
        bars = (
            (f"public code: {PUBLIC}", cell.median(PUBLIC, kind), f"  {ours.public:.1f}×"),
            (f"best plain PyTorch: {best}", cell.median(best, kind), f"  {ours.ratio:.1f}×"),
            ("this", ours.median, ""),
        )
        milliseconds = [(seconds or 0) * 1e3 for _, seconds, _ in bars]
        panel.barh(range(len(bars)), milliseconds, color=COLOURS, height=0.75)
        for place, ((_, _, factor), value) in enumerate(zip(bars, milliseconds, strict=True)):
            panel.text(value + max(milliseconds) / 100, place, f"{value:.3g} ms{factor}", va="center", color=INK)
        panel.set_yticks(range(len(bars)), [label for label, _, _ in bars], color=INK)
        panel.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=9)
        panel.set_xlim(0, 1.15 * max(milliseconds))
        panel.set_xticks([])
        panel.invert_yaxis()
        panel.patch.set_alpha(0)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    widths = ", ".join(map(str, cell.data["hidden_dims"]))
    caption = (
        f"{cell.B} rows, {cell.M} scenarios, layers {widths}, float32; × is how many times as long as this\n"
        f"{machine['processor']}, {machine['cpu capability']}, {record['threads']} threads; torch {machine['torch']}, "
        f"saml-kernels {machine['saml-kernels']}, commit {(record['commit'] or 'unknown')[:7]}"
    )
    drawn.supxlabel(caption, color=INK, fontsize=8, ha="left", x=0.01)
    return drawn
