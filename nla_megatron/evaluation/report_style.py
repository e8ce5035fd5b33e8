"""The look of the report: one style sheet, light and dark, from a phone to a wide screen and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d2126; --muted: #626a73; --line: #e3e5e8; --bar: #dfe3ea;
  --accent: #3b64ad; --good: #2b7a5b; --bad: #b3372f; --mark: #f6e6b8;
  --series-1: #3b64ad; --series-2: #c2691c; --series-3: #2f8a68; --series-4: #8d5aa8; --series-5: #a8893a;
  --series-6: #6b7480; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14161a; --card: #1b1e23; --ink: #e4e6e9; --muted: #98a0aa; --line: #2d3138; --bar: #343a44;
  --accent: #86a8e6; --good: #6cc3a0; --bad: #ee8a80; --mark: #57491b;
  --series-1: #86a8e6; --series-2: #e59a5c; --series-3: #6cc3a0; --series-4: #c39bdc; --series-5: #d3ba70;
  --series-6: #a2abb6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 56px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; margin: 2px 0 12px; }
h2 { font-size: 20px; margin: 56px 0 4px; }
p { margin: 0 0 12px; max-width: 68ch; }
.kicker { color: var(--muted); font-size: 14px; margin: 0; }
.muted, figcaption, .caption { color: var(--muted); font-size: 14px; }
.caption { margin-bottom: 16px; }
.head { display: grid; grid-template-columns: minmax(0, 4fr) minmax(0, 7fr); gap: 16px 48px; margin-top: 28px;
  padding: 28px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; align-items: center; }
.hero { font-size: 64px; line-height: 1.05; font-weight: 600; letter-spacing: -0.03em; }
.hero-label { font-weight: 600; margin: 0; }
.head p { margin-bottom: 6px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 8px 16px 8px 0; border-bottom: 1px solid var(--line); font-weight: 400;
  vertical-align: middle; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-size: 13px; padding-top: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.main > * { font-weight: 600; }
td.plot { width: 38%; min-width: 90px; padding: 0; }
.mark { position: relative; height: 17px; margin: 0 5px; }
.mark i { position: absolute; }
.mark .scale { left: 0; right: 0; top: 8px; height: 1px; background: var(--line); }
.mark .zero { top: 1px; width: 1px; height: 15px; background: var(--muted); opacity: 0.5; }
.mark .whisker { top: 2px; height: 13px; border-radius: 2px; background: var(--accent); opacity: 0.3; }
.mark .dot { top: 5px; width: 7px; height: 7px; margin-left: -3px; border-radius: 50%; background: var(--accent); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 18px 32px;
  margin: 28px 0 0; }
dl.facts dt { color: var(--muted); font-size: 13px; }
dl.facts dd { margin: 0; }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 20px; }
figure { margin: 0; padding: 18px 20px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { line-height: 1.45; margin-top: 6px; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart circle:hover { fill-opacity: 1; }
svg.chart .bar:hover { opacity: 0.7; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px 64px;
  align-items: start; }
.share { height: 8px; border-radius: 4px; background: var(--bar); min-width: 1px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px 6px;
  margin-bottom: 16px; break-inside: avoid; }
article header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 24px; font-size: 14px;
  color: var(--muted); margin-bottom: 8px; }
article header b { color: var(--ink); }
blockquote { margin: 0 0 14px; padding-left: 14px; border-left: 3px solid var(--line); white-space: pre-wrap;
  font-size: 15px; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 1px 3px; margin: 0 -3px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
article h3 { font-size: 13px; font-weight: 600; color: var(--muted); margin: 0 0 2px; }
article .text { white-space: pre-line; font-size: 15px; }
footer { margin-top: 48px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted); font-size: 14px; }
code { font: 0.92em ui-monospace, monospace; }
@media (max-width: 640px) {
  main { padding: 24px 14px 40px; }
  .head { grid-template-columns: minmax(0, 1fr); padding: 20px 16px; }
  .hero { font-size: 52px; }
  h2 { margin-top: 40px; }
  th, td { padding-right: 10px; }
  td.plot { display: none; }
  thead th.plot { display: none; }
  figure { padding: 14px 12px 12px; }
}
@media print { body { background: none; } figure, article { break-inside: avoid; } }
"""
