// The page of one run, or of several beside each other: what is above the sections, and the curves.

const DATA = JSON.parse(document.getElementById("data").textContent);
const [RUN] = DATA.runs;
const MANY = DATA.runs.length > 1;
const GIB = 2 ** 30;
const HOUR = 3600;
// Each curve has its own color. With several runs, each run has one, by its place in the command line.
const COLORS = ["blue", "orange", "green", "purple", "red", "gold", "cyan", "gray"];
const TRAINING = { color: "blue" };
const FAR = { zero: true, outliers: true };
const CHARTS = [
  ["Learning rate", (v, n = 2) => (v ? v.toExponential(n - 1) : "0"), { learning_rate: TRAINING }, { zero: true }],
  ["Gradient norm", digits, { grad_norm: TRAINING }, { outliers: true }],
  ["Tokens a second", count, { tokens_per_s: TRAINING }, FAR],
  ["Model FLOPs utilization", percent, {
    mfu_full: { color: "blue", name: "full attention" },
    mfu_causal: { color: "purple", name: "causal attention", dashed: true },
  }, FAR],
  ["Step time", duration, { step_time_s: TRAINING }, FAR],
  ["Waiting for data, a step", duration, { data_wait_s: { color: "data" } }, FAR],
  ["Memory in use, fullest device, GiB", (v, n) => digits(v / GIB, n), { memory_bytes: TRAINING }, { zero: true }],
];
const MARKED = { skipped_update: "skip", rollback: "rollback", start: "restart", signal: "stop", stage: "stage" };

const plural = (n, word) => `${n.toLocaleString("en-US")} ${word}${n === 1 ? "" : "s"}`;
const whole = (n) => n.toLocaleString("en-US");
const label = (name) => name.replaceAll("_", " ");
const last = (list) => list?.at(-1);
// A value of a row: null is not finite, undefined was never logged.
const logged = (value, format) => (isNumber(value) ? format(value) : value === undefined ? "none yet" : "not finite");
// Held-out losses of runs, by set: `eval_loss` or `eval_loss/SET`; `ema_loss` of averaged weights.
const heldOutKeys = (runs) => [...new Set(runs.flatMap((run) => Object.keys(run.curves.evaluations)))]
  .filter((key) => /^(eval|ema)_loss/.test(key)).sort((a, b) => (setName(a) < setName(b) ? -1 : 1));
const setName = (key) => [key.split("/")[1], key.startsWith("ema") && "averaged weights"].filter(Boolean).join(", ");
const runColor = (run) => COLORS[DATA.runs.indexOf(run) % COLORS.length];
const running = (run) => ["running", "in progress"].includes(run.verdict.status);

// With the digits of a float32; whole ones exactly.
const short = (value) => (Number.isInteger(value) ? value : Number(value.toPrecision(7)));

function text(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "string" ? value : JSON.stringify(value, (_, v) => (isNumber(v) ? short(v) : v));
}

function money(deviceHours) {
  if (!DATA.price_per_hour || !isNumber(deviceHours)) return "";
  const two = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
  return (deviceHours * DATA.price_per_hour).toLocaleString("en-US", two);
}

// A page opened from disk may have no storage.
function stored(value) {
  try {
    if (value) sessionStorage.setItem("llamajax", JSON.stringify(value));
    return JSON.parse(sessionStorage.getItem("llamajax")) ?? {};
  } catch {
    return {};
  }
}

// What all charts share, and what is open or chosen elsewhere; kept over a reload of the page.
// log: titles of charts. open: whether, by `keyOf` of what can be opened. events: which are shown.
const view = {
  x: "step", smooth: 0.02, range: null, theme: "auto", log: [], open: {}, events: "notable", ...stored(),
  cursor: null, charts: [],

  prepare() {
    const { key } = X[this.x];
    const columns = DATA.runs.flatMap((run) => [run.curves.train, ...Object.values(run.curves.evaluations)]);
    const all = columns.flatMap((each) => each[key]).filter(isNumber);
    const ends = [Math.min, Math.max].map((best) => all.reduce((a, b) => best(a, b), all[0]));
    this.full = all.length ? ends : [0, 1];
    this.charts.forEach((chart) => chart.prepare());
    this.keep();
  },

  zoom(range) {
    const [low, high] = this.full;
    const cut = range && [Math.max(low, range[0]), Math.min(high, range[1])];
    this.range = cut && cut[1] > cut[0] && (cut[0] > low || cut[1] < high) ? cut : null;
    document.getElementById("all").hidden = !this.range;
    this.charts.forEach((chart) => {
      chart.draw();
      chart.fillTable();
    });
    this.keep();
  },

  moveCursor(x, from) {
    this.cursor = x;
    this.charts.forEach((chart) => chart.point(chart === from));
  },

  keep() {
    const { x, smooth, range, theme, log, open, events } = this;
    document.documentElement.dataset.theme = theme;
    stored({ x, smooth, range, theme, log, open, events });
  },
};

function pill(run) {
  const { status, incidents, level } = run.verdict;
  return el("span", { class: `pill ${level}` }, [status, ...incidents].join(" · "));
}

function header() {
  const { facts, verdict, config, curves } = RUN;
  const axes = Object.entries(facts.mesh ?? {}).filter(([, size]) => size > 1);
  const about = [
    config.model?.name && text(config.model.name),
    isNumber(facts.num_parameters) && `${count(facts.num_parameters)} parameters`,
    facts.platform && `${facts.num_devices ?? ""} × ${facts.device_kind || facts.platform}`,
    axes.length && `mesh ${axes.map((pair) => pair.join(" ")).join(" × ")}`,
    facts.versions?.jax && `jax ${facts.versions.jax}`,
  ];
  const broken = curves.nonfinite.slice(0, 6).map(([step, key]) => `${label(key)} at step ${whole(step)}`);
  if (curves.nonfinite.length > 6) broken.push("…");
  const written = new Date(DATA.written_s * 1000).toLocaleString();
  const where = DATA.runs.map((run) => run.workdir).join(", ");
  const name = (run) => el("b", { class: "key", style: `--c: var(--${runColor(run)})` }, run.name);
  return el("header", {},
    el("h1", {}, MANY ? plural(DATA.runs.length, "run") : RUN.name),
    DATA.runs.map((run) => el("p", { class: "verdict" }, MANY && name(run), pill(run))),
    MANY ? null : [
      el("p", { class: "soft" }, about.filter(Boolean).join(" · ")),
      verdict.error && el("p", { class: "alert" }, verdict.error),
      broken.length > 0 && el("p", { class: "alert" }, "Not finite: ", broken.join(", ")),
    ],
    el("p", { class: "soft" }, `Written ${written} from ${where}`, DATA.runs.some((run) => run.curves.means) &&
      ". Of many rows the extremes are drawn; smoothed curves are means of all"));
}

// What one looks at first: [name, value, note].
function figures(run) {
  const { curves: { train, evaluations }, facts, measured } = run;
  const [time, packing] = [facts.time_breakdown ?? {}, facts.packing ?? {}];
  const deviceHours = isNumber(run.devices) && isNumber(time.wall_s) ? (time.wall_s * run.devices) / HOUR : null;
  const step_s = (measured.step_time_s ?? 0) + (last(train.data_wait_s) ?? 0);
  const left_s = running(run) && isNumber(run.steps) ? (run.steps - run.step) * step_s : 0;
  const mfu = isNumber(measured.mfu_full)
    ? `MFU ${percent(measured.mfu_full)}, causal ${percent(measured.mfu_causal)}`
    : "MFU unknown: no peak of this device";
  const perplexity = (loss) => `perplexity ${logged(loss, (v) => digits(Math.exp(v)))}`;
  const bits = (value) => (isNumber(value) ? `, ${digits(value)} bits a byte` : "");
  return [
    ["Step", whole(run.step), isNumber(run.steps) && `of ${whole(run.steps)}`],
    ["Training loss", logged(last(train.loss), digits), "last row, nats a token"],
    ...heldOutKeys([run]).map((key) => {
      const name = setName(key), loss = last(evaluations[key][key]);
      const each = key.startsWith("eval") && key.replace("eval_loss", "eval_bits_per_byte");
      return [name ? `Held out: ${name}` : "Held out", logged(loss, digits), perplexity(loss) + bits(last(evaluations[each]?.[each]))];
    }),
    ["Tokens seen", count(last(train.tokens_seen)), isNumber(packing.efficiency) &&
      `${percent(packing.efficiency)} not padding, ${percent(packing.cut_examples_share)} of examples cut`],
    ["Tokens a second", count(measured.tokens_per_s), mfu],
    isNumber(time.goodput) && ["Goodput", percent(time.goodput), "share of time in steps that count"],
    isNumber(time.wall_s) && ["Wall clock", duration(time.wall_s),
      left_s ? `about ${duration(left_s)} of steps left` : plural(facts.starts ?? 1, "start")],
    deviceHours && ["Device hours", digits(deviceHours),
      DATA.price_per_hour ? `cost ${money(deviceHours)}` : plural(run.devices, "device")],
  ].filter(Boolean);
}

function tiles() {
  return el("section", { class: "tiles", "aria-label": "Summary" }, figures(RUN).map(([name, value, note]) =>
    el("div", { class: "card tile" },
      el("div", { class: "soft" }, name), el("div", { class: "value" }, value), el("div", { class: "soft" }, note))));
}

function segmented(name, options, chosen, choose) {
  const buttons = Object.entries(options).map(([value, shown]) => el("button", {
    type: "button", "aria-pressed": String(value === chosen),
    click: (event) => {
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === event.target)));
      choose(value);
    },
  }, shown));
  return el("div", { class: "segmented", role: "group", "aria-label": name }, buttons);
}

function toolbar() {
  const shown = el("output", {}, percent(view.smooth));
  const slider = el("input", {
    type: "range", min: 0, max: 20, step: 0.5, value: view.smooth * 100,
    input: () => {
      view.smooth = slider.valueAsNumber / 100;
      shown.textContent = percent(view.smooth);
      view.prepare();
    },
  });
  const setAxis = (x) => {
    [view.x, view.range, view.cursor] = [x, null, null];
    document.getElementById("all").hidden = true;
    view.prepare();
  };
  const setTheme = (theme) => {
    view.theme = theme;
    view.keep();
  };
  return el("div", { class: "toolbar", role: "toolbar", "aria-label": "Charts" },
    segmented("Horizontal axis", { step: "Step", tokens: "Tokens", time: "Wall time" }, view.x, setAxis),
    el("label", {}, "Smoothing ", slider, shown),
    el("button", { type: "button", id: "all", hidden: view.range ? null : "", click: () => view.zoom(null) }, "Show all"),
    el("span", { class: "soft hint" }, "drag to zoom, double-click for all"),
    segmented("Theme", { auto: "Auto", light: "Light", dark: "Dark" }, view.theme, setTheme));
}

// Events that are drawn on the curves; the run's first start is none.
function marks(run) {
  const { step, tokens_seen: tokens } = run.curves.train;
  const first = run.left_out_events ? -1 : run.events.findIndex((event) => event.event === "start");
  return run.events.filter((e, i) => (MARKED[e.event] && i !== first) || e.error).map((e) => ({
    kind: e.error ? "rollback" : MARKED[e.event],
    text: `${e.event === "start" ? "restart" : label(e.event)} at step ${whole(e.step)}${e.reason ? `: ${e.reason}` : ""}`,
    step: e.step,
    time_s: e.at_s,
    tokens_seen: tokens[nearest(step, e.step)] ?? null,
  }));
}

function charts() {
  const shared = { marks: MANY ? [] : marks(RUN) };
  const add = (title, format, lines, more) =>
    lines.length && view.charts.push(new Chart(view, { ...shared, title, format, lines, ...more }));
  // The lines of a column, one a run; of several runs each has its color.
  const lines = (key, name, style) => DATA.runs
    .filter((run) => run.curves.train[key]?.some((value) => value !== null))
    .map((run) => ({ key, name, data: run.curves.train, means: run.curves.means, ...style, ...own(run) }));
  const own = (run) => (MANY ? { name: run.name, color: runColor(run) } : {});
  // A set and the average of the weights on it have one color.
  const heldOut = heldOutKeys(DATA.runs);
  const sets = [...new Set(heldOut.map((key) => key.split("/")[1]))];
  const evaluated = (key, name, index) => DATA.runs.filter((run) => run.curves.evaluations[key]).map((run) => ({
    key, name, points: true, color: COLORS[1 + (index % 7)], data: run.curves.evaluations[key],
    dashed: key.startsWith("ema"), ...own(run),
  }));
  const losses = (key) => evaluated(key, ["held out", setName(key)].filter(Boolean).join(": "), sets.indexOf(key.split("/")[1]));
  const { unigram_entropy: unigram } = RUN.facts;
  const wide = { wide: true, note: "nats a token", level: isNumber(unigram) && !MANY ? ["unigram entropy", unigram] : null };
  add("Loss", digits, [...lines("loss", "training", TRAINING), ...(MANY ? [] : heldOut.flatMap(losses))], wide);
  if (MANY) heldOut.forEach((key) => add(["Held-out loss", setName(key)].filter(Boolean).join(": "), digits, losses(key), wide));
  const tasks = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.curves.evaluations)))].filter((key) => key.startsWith("task/"));
  const accuracies = tasks.flatMap((key, i) => evaluated(key, key.split("/")[1], i));
  if (MANY) accuracies.forEach((line) => (line.name += `: ${line.key.split("/")[1]}`));
  add("Accuracy of tasks", percent, accuracies, { zero: true });
  for (const [title, format, columns, more] of CHARTS) {
    add(title, format, Object.entries(columns).flatMap(([key, style]) => lines(key, style.name ?? title, style)), more);
  }
  // Other numbers of the rows, with one chart for all `GROUP/NAME`.
  const known = ["loss", "step", "time_s", "tokens_seen", ...CHARTS.flatMap((row) => Object.keys(row[2]))];
  const columns = new Set(DATA.runs.flatMap((run) => Object.keys(run.curves.train)));
  known.forEach((key) => columns.delete(key));
  const varying = [...columns].filter((key) => DATA.runs.some((run) => new Set(run.curves.train[key]).size > 1));
  for (const group of new Set(varying.map((key) => key.split("/")[0]))) {
    const keys = varying.filter((key) => key.split("/")[0] === group);
    add(label(group), digits, keys.flatMap((key, i) =>
      lines(key, label(key.slice(group.length + 1) || group), { color: COLORS[i % COLORS.length] })));
  }
  return el("section", { class: "charts", "aria-label": "Curves" }, view.charts.map((chart) => chart.node));
}
