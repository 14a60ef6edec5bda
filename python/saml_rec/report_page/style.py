"""Colours and layout. Series have classes s0, s1, ..; markers tell them apart where colours do not."""

SERIES = 8

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --text: #1b1f24; --muted: #565f6b; --line: #c9ced6; --accent: #0b62a8;
  --s0: #0060a8; --s1: #b84300; --s2: #00785a; --s3: #a2447c; --s4: #7a5b00; --s5: #2a2f36;
  --s6: #0f7f97; --s7: #7048b6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --text: #e8ebef; --muted: #a7b0bb; --line: #434b56; --accent: #6cb6ff;
    --s0: #5cb3ff; --s1: #ff9a57; --s2: #3fd0a4; --s3: #f09ccb; --s4: #e8c547; --s5: #d5dae1;
    --s6: #5fd3ea; --s7: #bda0ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
.figures { columns: 2 25rem; column-gap: 1rem; }
figure { break-inside: avoid; margin: 0 0 1rem; padding: .75rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem;
  }
figcaption { font-size: .9rem; margin-bottom: .5rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; }
svg .small { font-size: 9px; }
svg .grid { stroke: var(--line); stroke-width: .7; }
svg .cell { fill: var(--accent); stroke: var(--line); stroke-width: .4; }
svg .line { fill: none; stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0;
  margin: 0 0 .4rem; font-size: .9rem; }
.legend svg { display: inline-block; width: 14px; height: 14px; margin: 0 .3rem 0 0; vertical-align: -2px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9.5rem; }
tr:last-child > * { border-bottom: 0; }
thead th { background: var(--card); }
summary { cursor: pointer; margin: .5rem 0; }
"""

STYLE += "\n".join(
    f".s{index} {{ color: var(--s{index}); fill: var(--s{index}); stroke: var(--s{index}); }}"
    for index in range(SERIES)
)
