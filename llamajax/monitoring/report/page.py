"""The frame and the style of `report.html`: no script, no font, no image, nothing from outside."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #667079; --rule: #e4e2dc;
  --main: #2456a6; --second: #c2571a; --good: #2d7d46; --bad: #b3261e;
  --p0: #2456a6; --p1: #c2571a; --p2: #2d7d46; --p3: #8b5fbf; --p4: #b08900; --p5: #8a9299;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #98a1a9; --rule: #31373d;
    --main: #7fb0ff; --second: #ffa45c; --good: #71c98c; --bad: #ff8a80;
    --p0: #7fb0ff; --p1: #ffa45c; --p2: #71c98c; --p3: #c3a1ef; --p4: #e3c04b; --p5: #98a1a9;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; font-weight: 600; }
h3 { font-size: 13px; margin: 0 0 6px; font-weight: 600; color: var(--soft); }
header p { margin: 6px 0 0; color: var(--soft); }
.status { font-size: 13px; font-weight: 500; letter-spacing: 0; color: var(--good);
  border: 1px solid currentColor; border-radius: 99px; padding: 2px 10px; vertical-align: middle; }
.warning { color: var(--bad); border-left: 3px solid currentColor; padding-left: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 26px 0; }
.tile, figure, .config > div { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.tile { padding: 12px 16px; }
.label, .note { color: var(--soft); font-size: 13px; }
.value { font-size: 26px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 16px; }
figure { margin: 0; padding: 14px 16px 8px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.key { font-weight: 400; font-size: 13px; color: var(--soft); margin-left: 16px;
  white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: var(--main); }
.key.second::before { background: var(--second); }
.key.faint::before { opacity: 0.35; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.level { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 4; }
.tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--main); stroke-width: 1.8; stroke-linejoin: round; }
.line.faint { stroke-width: 1; opacity: 0.35; }
.line.second { stroke: var(--second); }
.dot { fill: var(--main); }
.dot.second { fill: var(--second); }
.none { color: var(--soft); padding: 40px 0; text-align: center; }
.bar { display: flex; height: 18px; border-radius: 6px; overflow: hidden; margin-bottom: 10px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 9px; }
.part0 { background: var(--p0); } .part1 { background: var(--p1); }
.part2 { background: var(--p2); } .part3 { background: var(--p3); }
.part4 { background: var(--p4); } .part5 { background: var(--p5); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
table.time { width: auto; }
td { padding: 3px 0; vertical-align: top; }
table.time td { padding-right: 28px; }
.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.config { columns: 3 300px; column-gap: 14px; }
.config > div { break-inside: avoid; margin-bottom: 14px; padding: 12px 16px; }
.config td { border-top: 1px solid var(--rule); }
.config td:first-child { color: var(--soft); padding-right: 16px; white-space: nowrap; }
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
