// Line charts of columns as SVG: hover, zoom, log scale, smoothing; with a table and with keys.
"use strict";

// Makes an element; text is only ever a text node, so nothing in a run's files becomes markup.
function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child || child === 0));
  return node;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const digits = (value, n = 4) => (isNumber(value) ? String(Number(value.toPrecision(n))) : "unknown");

function count(value, n = 3) {
  if (!isNumber(value)) return "unknown";
  let unit = "";
  for (const next of ["k", "M", "B", "T"]) {
    if (Math.abs(value) < 999.5) break;
    [value, unit] = [value / 1000, next];
  }
  return `${Number(value.toPrecision(n))}${unit}`;
}

function duration(s, n = 3) {
  if (!isNumber(s)) return "unknown";
  if (s === 0) return "0 s";
  if (s < 0.0995) return `${digits(s * 1000, n)} ms`;
  if (s < 59.95) return `${digits(s, n)} s`;
  const [m, h, d] = [60, 3600, 86400].map((size) => Math.floor(s / size));
  const two = (value) => String(value).padStart(2, "0");
  if (d) return `${d}d ${two(h % 24)}h`;
  return h ? `${h}h ${two(m % 60)}m` : `${m}m ${two(Math.floor(s % 60))}s`;
}

const percent = (value, n = 3) => `${digits(value * 100, n)} %`;
const X = {
  step: { key: "step", name: "step", format: (v) => Math.round(v).toLocaleString("en-US"), whole: true },
  tokens: { key: "tokens_seen", name: "tokens", format: count },
  time: { key: "time_s", name: "wall time", format: duration, units: [1, 60, 3600, 86400] },
};

// About `n` round numbers in [low, high], each 1, 2 or 5 times a power of ten apart.
function ticks(low, high, n, unit = 1) {
  const raw = (high - low) / n / unit;
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].map((m) => m * power).reduce((a, b) =>
    Math.abs(b - raw) < Math.abs(a - raw) ? b : a);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

// Means over `share` of the values around each, taken twice so that a spike makes no step; fewer
// towards the ends. What is null stays out.
const smoothed = (values, share) => boxMeans(boxMeans(values, share / 2), share / 2);

function boxMeans(values, share) {
  const sums = [0], counts = [0];
  values.forEach((v, i) => {
    sums.push(sums[i] + (v ?? 0));
    counts.push(counts[i] + (v === null ? 0 : 1));
  });
  const half = Math.max(1, Math.round((values.length * share) / 2));
  return values.map((_, i) => {
    const reach = Math.min(half, i, values.length - 1 - i);
    const n = counts[i + reach + 1] - counts[i - reach];
    return n ? (sums[i + reach + 1] - sums[i - reach]) / n : null;
  });
}

// The index of the value nearest to x in a rising list; -1 in an empty one.
function nearest(list, x) {
  let [low, high] = [0, list.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - list[low - 1] < list[low] - x ? low - 1 : low;
}

const MARGIN = { left: 56, right: 26, top: 10, bottom: 24 };

// One chart. view: what all charts share (x, range, smooth, cursor), and the titles of those with a log axis.
// lines: [{name, color, data, means, key, points, dashed}]; marks: [{kind, text, step, time_s}].
// level: [name, value] of a horizontal line. outliers: whether a few far values may be outside the value axis, which then says how many.
class Chart {
  constructor(view, { title, note, lines, format, zero, outliers, wide, level, marks = [] }) {
    Object.assign(this, { view, title, lines, format, zero, outliers, level, marks });
    this.log = view.log.includes(title);
    this.svg = el("svg:svg", {
      role: "img", tabindex: 0, keydown: (e) => this.key(e), dblclick: () => view.zoom(null),
      pointerdown: (e) => this.press(e), pointermove: (e) => this.move(e),
      pointerup: (e) => this.release(e), pointercancel: () => this.drop(),
      pointerleave: () => this.leave(),
      "aria-label": `${title}. Arrow keys read values, plus and minus zoom, Escape shows all.`,
    });
    this.tip = el("div", { class: "tip", hidden: "" });
    this.live = el("div", { class: "unseen", "aria-live": "polite" });
    this.legend = el("div", { class: "legend" });
    this.table = el("details", { class: "table", toggle: () => this.fillTable() },
      el("summary", {}, "Table"));
    const button = el("button", {
      type: "button", class: "small", "aria-pressed": String(this.log), title: "logarithmic value axis",
      click: () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", String(this.log));
        view.log = view.log.filter((other) => other !== title).concat(this.log ? title : []);
        view.keep();
        this.draw();
      },
    }, "log");
    const caption = el("figcaption", {},
      el("span", { class: "title" }, title), note && el("span", { class: "soft" }, note), button);
    this.node = el("figure", { class: wide ? "card chart wide" : "card chart" }, caption, this.legend,
      el("div", { class: "plot" }, this.svg, this.tip), this.live, this.table);
  }

  // Takes the columns of the chosen x axis and smooths them.
  prepare() {
    const { key } = X[this.view.x];
    const pick = (data, name) => {
      const kept = data.step.map((_, i) => i).filter((i) => data[key][i] !== null);
      return { x: kept.map((i) => data[key][i]), y: kept.map((i) => data[name][i] ?? null) };
    };
    for (const line of this.lines) {
      line.raw = pick(line.data, line.key);
      const share = line.points ? 0 : this.view.smooth;
      const base = share && line.means ? pick(line.means, line.key) : line.raw;
      line.soft = share ? { x: base.x, y: smoothed(base.y, share) } : null;
    }
    this.draw();
    if (this.table.open) this.fillTable();
  }

  draw() {
    const width = this.svg.parentNode.clientWidth || 560;
    const height = this.node.classList.contains("wide") && width > 700 ? 320 : 220;
    const [right, floor] = [width - MARGIN.right, height - MARGIN.bottom];
    const [low, high] = this.view.range ?? this.view.full;
    Object.assign(this, { width, height, right, floor });
    this.toX = (v) => MARGIN.left + ((v - low) / (high - low || 1)) * (right - MARGIN.left);
    this.fromX = (px) => low + ((px - MARGIN.left) / (right - MARGIN.left)) * (high - low);
    const scale = (v) => (this.log ? Math.log10(v) : v);
    // Means are between their extremes.
    const inside = this.lines.flatMap(({ raw: { x, y } }) =>
      y.filter((v, i) => this.isDrawn(v) && x[i] >= low && x[i] <= high));
    let [bottom, top] = this.extent(inside.map(scale).sort((a, b) => a - b));
    const room = (top - bottom) * 0.06 || Math.abs(top) * 0.06 || 1;
    [bottom, top] = [this.zero && !this.log && bottom >= 0 ? 0 : bottom - room, top + room];
    this.toY = (v) => floor - ((scale(v) - bottom) / (top - bottom)) * (floor - MARGIN.top);
    this.cursor = el("svg:g", { class: "cursor" });
    this.selection = el("svg:rect", { class: "selection", y: MARGIN.top, height: floor - MARGIN.top, width: 0 });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    if (inside.length) {
      this.axes(low, high, bottom, top);
      const clip = `clip${(Chart.made = (Chart.made ?? 0) + 1)}`;
      const frame = el("svg:rect", { x: MARGIN.left, y: 0, width: right - MARGIN.left, height: floor });
      this.svg.append(el("svg:clipPath", { id: clip }, frame), el("svg:g", { "clip-path": `url(#${clip})` },
        this.drawMarks(), this.drawLevel(), this.lines.map((line) => this.drawLine(line))));
    } else {
      this.svg.append(this.label("nothing logged here", width / 2, height / 2, "middle"));
    }
    this.svg.append(this.selection, this.cursor);
    this.point();
  }

  isDrawn(value) {
    return isNumber(value) && (!this.log || value > 0);
  }

  label(text, x, y, anchor = "end") {
    return el("svg:text", { class: "tick", x, y, "text-anchor": anchor }, text);
  }

  // The ends of a sorted list; without far outliers, which are counted, where the chart allows it.
  extent(values) {
    let [bottom, top] = [values[0], values.at(-1)];
    this.beyond = "";
    const [low, high] = [0.01, 0.99].map((q) => values[Math.floor(q * (values.length - 1))]);
    if (this.outliers && !this.log && high > low) {
      bottom = Math.max(bottom, low - (high - low));
      top = Math.min(top, high + (high - low));
      const [above, below] = [values.filter((v) => v > top).length, values.filter((v) => v < bottom).length];
      this.beyond = [above && `${above} above`, below && `${below} below`].filter(Boolean).join(", ");
    }
    return [bottom, top];
  }

  axes(low, high, bottom, top) {
    let values = ticks(bottom, top, 5);
    if (this.log) {
      const [from, to] = [10 ** bottom, 10 ** top];
      const powers = ticks(Math.floor(bottom), Math.ceil(top), 6).filter(Number.isInteger);
      values = (top - bottom < 1.2 ? ticks(from, to, 5) : powers.map((power) => 10 ** power))
        .filter((v) => v >= from && v <= to);
    }
    for (const value of values) {
      const y = this.toY(value);
      this.svg.append(el("svg:line", { class: "grid", x1: MARGIN.left, x2: this.right, y1: y, y2: y }),
        this.label(this.format(value), MARGIN.left - 8, y + 4));
    }
    this.svg.append(this.label(this.beyond, this.right, 10));
    const axis = X[this.view.x];
    const unit = axis.units?.filter((size) => (high - low) / 3 >= size).pop() ?? 1;
    ticks(low, high, Math.max(2, this.width / 110), unit)
      .filter((value) => !axis.whole || Number.isInteger(value))
      .forEach((value) => this.svg.append(this.label(axis.format(value), this.toX(value), this.height - 6, "middle")));
  }

  drawMarks() {
    const { key } = X[this.view.x];
    return this.marks.filter((mark) => isNumber(mark[key])).map((mark) => {
      const x = this.toX(mark[key]);
      return el("svg:line", { class: `mark ${mark.kind}`, x1: x, x2: x, y1: MARGIN.top, y2: this.floor });
    });
  }

  drawLevel() {
    if (!this.level) return [];
    const y = this.toY(this.level[1]);
    return [el("svg:line", { class: "level", x1: MARGIN.left, x2: this.right, y1: y, y2: y }),
      this.label(`${this.level[0]} ${digits(this.level[1])}`, this.right - 6, y - 5)];
  }

  drawLine({ raw, soft, color, dashed, points }) {
    const style = `--c: var(--${color})`;
    const path = (values, kind) =>
      el("svg:path", { class: `line ${kind}${dashed ? " dashed" : ""}`, style, d: this.path(values) });
    const dots = points && raw.x.length < 200 ? raw.x.map((_, i) => i).filter((i) => this.isDrawn(raw.y[i])) : [];
    return [path(raw, soft ? "faint" : ""), soft && path(soft, ""), dots.map((i) =>
      el("svg:circle", { class: "dot", style, cx: this.toX(raw.x[i]), cy: this.toY(raw.y[i]), r: 3 }))];
  }

  // Where several points share a pixel, their first, last, smallest and largest are drawn.
  path({ x, y }) {
    let text = "", pen = "M", column = [], at = null;
    const flush = () => {
      const values = column.map((p) => p[1]);
      const ends = [Math.min, Math.max].map((best) => values.indexOf(best(...values)));
      const kept = column.length ? [...new Set([0, ...ends, column.length - 1])].sort((a, b) => a - b) : [];
      for (const i of kept) {
        text += `${pen}${column[i][0].toFixed(1)} ${column[i][1].toFixed(1)}`;
        pen = "L";
      }
      column = [];
    };
    for (let i = 0; i < x.length; i++) {
      const px = this.toX(x[i]);
      if (px < -this.width || px > 2 * this.width) continue;
      if (Math.round(px) !== at) flush();
      at = Math.round(px);
      if (this.isDrawn(y[i])) column.push([px, this.toY(y[i])]);
      else {
        flush();
        pen = "M";
      }
    }
    flush();
    return text;
  }

  // Shows the values at the shared cursor: dots, the legend, and a tip where the pointer is.
  point(hovered = false) {
    const { cursor: at } = this.view;
    const rows = this.lines.filter((line) => line.raw.x.length).map((line) => {
      const i = at === null ? line.raw.x.length - 1 : nearest(line.raw.x, at);
      const x = line.raw.x[i];
      return { line, x, value: line.raw.y[i], soft: line.soft?.y[nearest(line.soft.x, x)] };
    });
    const key = ({ color, dashed }, ...words) =>
      el("span", { class: `key${dashed ? " dashed" : ""}`, style: `--c: var(--${color})` }, words);
    const single = at === null ? "last" : "here";
    this.legend.replaceChildren(...rows.map(({ line, value }) =>
      key(line, this.lines.length > 1 ? line.name : single, " ", el("b", {}, this.show(value)))));
    this.cursor.replaceChildren();
    this.tip.hidden = true;
    const x = at === null ? -1 : this.toX(at);
    if (x < MARGIN.left - 1 || x > this.right + 1 || !rows.length) return;
    const dots = rows.filter((row) => this.isDrawn(row.value)).map((row) => el("svg:circle", {
      class: "dot", style: `--c: var(--${row.line.color})`, cx: this.toX(row.x), cy: this.toY(row.value), r: 4,
    }));
    this.cursor.append(el("svg:line", { x1: x, x2: x, y1: MARGIN.top, y2: this.floor }), ...dots);
    const isActive = document.activeElement === this.svg;
    if (!hovered && !isActive) return;
    const axis = X[this.view.x];
    const head = `${axis.name} ${axis.format(rows[0].x)}`;
    const near = this.marks.filter((mark) => Math.abs(this.toX(mark[axis.key]) - x) < 7).slice(0, 4);
    const words = rows.map(({ line, value, soft }) => [line, `${line.name} ${this.show(value)}` +
      (isNumber(soft) ? ` (smoothed ${this.show(soft)})` : "")]);
    this.live.textContent = isActive ? [head, ...words.map((w) => w[1]), ...near.map((m) => m.text)].join(", ") : "";
    this.tip.replaceChildren(el("b", {}, head), ...words.map((pair) => key(...pair)),
      ...near.map((mark) => el("span", { class: `event ${mark.kind}` }, mark.text)));
    this.tip.hidden = false;
    const left = x > this.width / 2 ? x - this.tip.offsetWidth - 14 : x + 14;
    this.tip.style.left = `${Math.max(0, Math.min(left, this.width - this.tip.offsetWidth))}px`;
  }

  // A value with the digits that the files have, or in the unit of the axis.
  show(value) {
    return isNumber(value) ? this.format(value, 6) : "not finite";
  }

  at(event) {
    const box = this.svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * this.width;
    return Math.max(MARGIN.left, Math.min(this.right, px));
  }

  press(event) {
    if (event.button) return;
    this.from = this.at(event);
    this.svg.setPointerCapture(event.pointerId);
  }

  move(event) {
    const px = this.at(event);
    if (this.from !== undefined) {
      this.selection.setAttribute("x", Math.min(px, this.from));
      this.selection.setAttribute("width", Math.abs(px - this.from));
    }
    this.view.moveCursor(this.fromX(px), this);
  }

  release(event) {
    const [a, b] = [this.from, this.at(event)].sort((p, q) => p - q);
    this.drop();
    if (b - a > 6) this.view.zoom([this.fromX(a), this.fromX(b)]);
  }

  drop() {
    this.from = undefined;
    this.selection.setAttribute("width", 0);
  }

  leave() {
    if (this.from === undefined) this.view.moveCursor(null, this);
  }

  key(event) {
    const [low, high] = this.view.range ?? this.view.full;
    const list = this.lines[0]?.raw.x.filter((x) => x >= low && x <= high) ?? [];
    const now = this.view.cursor === null ? -1 : nearest(list, this.view.cursor);
    const stride = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: list.length - 1 }[event.key];
    const middle = this.view.cursor ?? (low + high) / 2;
    const factor = { "+": 0.25, "=": 0.25, "-": 1 }[event.key];
    const reach = (high - low) * factor;
    if (to !== undefined && list.length) {
      this.view.moveCursor(list[Math.max(0, Math.min(list.length - 1, to))], this);
    } else if (factor) this.view.zoom([middle - reach, middle + reach]);
    else if (event.key === "Escape") this.view.zoom(null);
    else return;
    event.preventDefault();
  }

  // Up to 100 rows of what is visible.
  fillTable() {
    if (!this.table.open) return;
    const [low, high] = this.view.range ?? this.view.full;
    const axis = X[this.view.x], rows = new Map();
    this.lines.forEach((line, column) => line.raw.x.forEach((x, i) => {
      if (x < low || x > high) return;
      if (!rows.has(x)) rows.set(x, this.lines.map(() => ""));
      rows.get(x)[column] = this.show(line.raw.y[i]);
    }));
    const all = [...rows].sort((a, b) => a[0] - b[0]), every = Math.ceil(all.length / 100);
    const shown = all.filter((_, i) => i % every === 0 || i === all.length - 1);
    this.table.replaceChildren(this.table.firstChild, table([axis.name, ...this.lines.map((line) => line.name)],
      shown.map(([x, cells]) => [axis.format(x), ...cells]),
      `${this.title}: ${shown.length} of ${all.length} points`));
  }
}

// A table with a head; a cell is text or a node.
function table(head, rows, caption, kind = "") {
  return el("div", { class: `scroll ${kind}`, tabindex: 0, role: "region", "aria-label": caption }, el("table", {},
    el("caption", { class: "unseen" }, caption),
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) => el("td", {}, cell)))))));
}
