"""The look of the HTML report: one style sheet, for phones, screens and paper, light and dark.

Every colour of text has a contrast of at least 4.5 to what is behind it.
"""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --text: #1b1f24;
  --quiet: #565d66; --line: #d9dcdf; --accent: #0b5a9e; --good: #1d6b34; --bad: #a8321a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --card: #1c2025; --text: #e4e7ea; --quiet: #a5adb6;
    --line: #343a41; --accent: #7dbdf2; --good: #79cf92; --bad: #f3917b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
code { font: .92em/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; color: var(--quiet); max-width: none; }
.facts > span { min-width: 0; }
.status { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.warning { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem .9rem; }
.cards { display: grid; gap: .8rem; margin: 1rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; }
.card dt { color: var(--quiet); font-size: .9rem; }
.card dd { margin: 0; font-size: 1.55rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card.main dd { color: var(--accent); font-weight: 650; }
.card small { display: block; font-size: .82rem; line-height: 1.4; font-weight: 400;
  color: var(--quiet); }
.note { color: var(--quiet); font-size: .9rem; }
.maps { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .7rem .9rem .8rem; break-inside: avoid; }
figcaption { overflow-wrap: anywhere; }
.key { list-style: none; margin: .5rem 0 1rem; padding: 0; display: grid; gap: .15rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); font-size: .9rem; }
.key li { padding-left: 1.4em; text-indent: -1.4em; }
.tables { display: grid; gap: 0 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; font-weight: 600; padding: .8rem 0 .3rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
  border-top: 1px solid var(--line); font-weight: 400; overflow-wrap: break-word; }
thead th, th code { white-space: nowrap; }
thead th { font-size: .85rem; color: var(--quiet); border-top: 0; }
th small, td small { display: block; color: var(--quiet); font-size: .86rem; line-height: 1.45; }
td.number, th.number, td.text { text-align: right; padding-right: 0; }
td.text { overflow-wrap: anywhere; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide .number { padding-right: 1.2rem; }
tr { break-inside: avoid; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line);
  color: var(--quiet); font-size: .88rem; }
@media (max-width: 34rem) {
  .cards { grid-template-columns: 1fr 1fr; }
  .card { padding: .6rem .7rem; } .card dd { font-size: 1.3rem; }
  .wide thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
    overflow: hidden; }
  .wide tr { display: block; padding: .4rem 0; border-top: 1px solid var(--line); }
  .wide th, .wide td, .wide .number { display: block; border: 0; padding: 0;
    text-align: left; }
  .wide td.number::after { content: " times"; } }
@media print {
  :root { --ground: #ffffff; --card: #ffffff; --text: #000000; --quiet: #3c3c3c;
    --line: #bbbbbb; --accent: #0b4a80; --good: #14532d; --bad: #7f1d1d; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } figure, .card { break-inside: avoid; } }
"""
