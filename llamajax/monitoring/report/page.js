// The page of one run, or of several beside each other, from the JSON of #data.

const DATA = JSON.parse(document.getElementById("data").textContent);
const [RUN] = DATA.runs, MANY = DATA.runs.length > 1;
if (new Set(DATA.runs.map((run) => run.name)).size < DATA.runs.length) DATA.runs.forEach((run) => (run.name = run.workdir));
const GIB = 2 ** 30, HOUR = 3600;
// Colors belong to things: these, and runs by their place in the command line.
const PARTS = [
  ["start_s", "Starting and importing", "start"], ["init_s", "Initializing weights", "restore"],
  ["import_s", "Importing weights", "restore"], ["restore_s", "Restoring checkpoints", "restore"],
  ["compile_s", "Compiling", "compile"], ["data_wait_s", "Waiting for data", "data"],
  ["evaluation_s", "Evaluating", "evaluation"], ["checkpoint_s", "Waiting for checkpoints", "save"],
  ["canary_s", "Checking devices", "canary"], ["export_s", "Exporting weights", "canary"],
  ["redone_s", "Steps done twice", "redone"], ["rolled_back_s", "Steps rolled back", "rollback"],
  ["down_s", "No process", "down"], ["other_s", "Everything else", "other"],
];
const KIND = { init: "restore", import: "restore", export: "canary" };
const CHARTS = [
  ["learning_rate", "Learning rate", (v, n = 2) => (v ? v.toExponential(n - 1) : "0"), { zero: true }],
  ["grad_norm", "Gradient norm", digits, { outliers: true }],
  ["tokens_per_s", "Tokens a second", count, { zero: true, outliers: true }],
  ["mfu", "Model FLOPs utilization", percent, { zero: true, outliers: true }], ["step_time_s", "Step time", duration, { zero: true, outliers: true }],
  ["data_wait_s", "Waiting for data, a step", duration, { zero: true, outliers: true }],
  ["memory_bytes", "Memory in use, fullest device, GiB", (v, n) => digits(v / GIB, n), { zero: true }],
];
const RUN_COLORS = ["blue", "orange", "green", "purple", "red", "gold", "cyan", "gray"];
const SET_COLORS = ["orange", "green", "purple", "red", "gold", "cyan"];
const plural = (n, word) => `${n.toLocaleString("en-US")} ${word}${n === 1 ? "" : "s"}`;
const text = (value) => (value === null || value === undefined ? "none" : typeof value === "string" ? value : JSON.stringify(value));
const money = (hours) => (DATA.price_per_hour && isNumber(hours) ? (hours * DATA.price_per_hour).toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 }) : "");
const runColor = (run) => RUN_COLORS[DATA.runs.indexOf(run) % RUN_COLORS.length];

// What all charts share; kept over a reload of the page.
const view = {
  x: "step", smooth: 0.02, range: null, cursor: null, theme: "auto", charts: [],
  ...(JSON.parse(stored("get") || "{}")),
  prepare() {
    const all = DATA.runs.flatMap((run) => [run.curves.train, ...Object.values(run.curves.evaluations)])
      .flatMap((columns) => columns[X[this.x].key]).filter(isNumber);
    this.full = [all.reduce((a, b) => Math.min(a, b), Infinity), all.reduce((a, b) => Math.max(a, b), -Infinity)];
    if (!all.length) this.full = [0, 1];
    this.charts.forEach((chart) => chart.prepare());
    this.keep();
  },
  zoom(range) {
    const [low, high] = this.full;
    if (range) range = [Math.max(low, range[0]), Math.min(high, range[1])];
    this.range = range && range[1] > range[0] && (range[0] > low || range[1] < high) ? range : null;
    this.charts.forEach((chart) => {
      chart.draw();
      chart.fillTable();
    });
    document.getElementById("all").hidden = !this.range;
    this.keep();
  },
  moveCursor(x, from) {
    this.cursor = x;
    this.charts.forEach((chart) => chart.point(chart === from));
  },
  keep() {
    stored("set", JSON.stringify({ x: this.x, smooth: this.smooth, range: this.range, theme: this.theme }));
  },
};

// A page opened from disk may have no storage.
function stored(action, value) {
  try {
    return action === "get" ? sessionStorage.getItem("llamajax") : sessionStorage.setItem("llamajax", value);
  } catch {
    return null;
  }
}

function header() {
  const { facts, verdict } = RUN;
  const about = [
    RUN.config.model?.name && text(RUN.config.model.name),
    isNumber(facts.num_parameters) && `${count(facts.num_parameters)} parameters`,
    facts.platform && `${facts.num_devices ?? ""} × ${facts.device_kind || facts.platform}`,
    facts.mesh && `mesh ${Object.entries(facts.mesh).filter(([, n]) => n > 1).map((pair) => pair.join(" ")).join(" × ") || "of one"}`,
    facts.versions?.jax && `jax ${facts.versions.jax}`,
  ].filter(Boolean);
  return el("header", {}, el("h1", {}, MANY ? plural(DATA.runs.length, "run") : RUN.name),
    DATA.runs.map((run) => el("p", { class: "verdict" }, MANY && el("b", { class: "key", style: `--c: var(--${runColor(run)})` }, run.name),
      el("span", { class: `pill ${run.verdict.level}` }, run.verdict.status, run.verdict.incidents.length ? ` · ${run.verdict.incidents.join(" · ")}` : ""))),
    !MANY && el("p", { class: "soft" }, about.join(" · ")),
    verdict.error && !MANY && el("p", { class: "alert" }, verdict.error),
    !MANY && RUN.curves.nonfinite.length > 0 && el("p", { class: "alert" }, "Not finite: ",
      RUN.curves.nonfinite.slice(0, 6).map(([step, key]) => `${key} at step ${step.toLocaleString("en-US")}`).join(", "), RUN.curves.nonfinite.length > 6 && ", …"),
    el("p", { class: "soft" }, `Written ${new Date(DATA.written_s * 1000).toLocaleString()} from ${DATA.runs.map((run) => run.workdir).join(", ")}`));
}

const last = (list) => list?.at(-1);
const finite = (value, format) => (isNumber(value) ? format(value) : value === undefined ? "none yet" : "not finite");
const hours = (run) => (isNumber(run.devices) && run.facts.time_breakdown ? (run.facts.time_breakdown.wall_s * run.devices) / HOUR : null);

// What one looks at first: [name, value, note].
function figures(run) {
  const { train, evaluations } = run.curves, { facts, measured } = run, time = facts.time_breakdown ?? {};
  const step_s = (measured.step_time_s ?? 0) + (last(train.data_wait_s) ?? 0);
  const left = ["running", "in progress"].includes(run.verdict.status) && isNumber(run.steps) && step_s ? `about ${duration((run.steps - run.step) * step_s)} of steps left` : "";
  return [
    ["Step", run.step.toLocaleString("en-US"), isNumber(run.steps) ? `of ${run.steps.toLocaleString("en-US")}` : ""],
    ["Training loss", finite(last(train.loss), digits), "last step, nats a token"],
    ...Object.entries(evaluations).map(([name, columns]) => [name ? `Held out: ${name}` : "Held out", finite(last(columns.loss), digits), `perplexity ${finite(last(columns.loss), (v) => digits(Math.exp(v)))}`]),
    isNumber(facts.unigram_entropy) && ["Unigram entropy", digits(facts.unigram_entropy), "loss of knowing frequencies only"],
    ["Tokens seen", count(last(train.tokens_seen)), ""],
    ["Tokens a second", count(measured.tokens_per_s), isNumber(measured.mfu_full) ? `MFU ${percent(measured.mfu_full)}, causal ${percent(measured.mfu_causal)}` : "MFU unknown: no peak of this device"],
    isNumber(time.goodput) && ["Goodput", percent(time.goodput), "share of time in steps that count"],
    isNumber(time.wall_s) && ["Wall clock", duration(time.wall_s), left || (facts.starts > 1 ? `${facts.starts} starts` : "")],
    hours(run) && ["Device hours", digits(hours(run)), money(hours(run)) ? `cost ${money(hours(run))}` : `${digits(run.devices, 3)} devices`],
  ].filter(Boolean);
}

function tiles() {
  return el("section", { class: "tiles", "aria-label": "Summary" }, figures(RUN).map(([name, value, note]) =>
    el("div", { class: "card tile" }, el("div", { class: "label" }, name), el("div", { class: "value" }, value), el("div", { class: "soft" }, note))));
}

function segmented(label, options, chosen, choose) {
  const buttons = Object.entries(options).map(([value, name]) => el("button", {
    type: "button", "aria-pressed": String(value === chosen),
    click: (event) => {
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === event.target)));
      choose(value);
    },
  }, name));
  return el("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

function toolbar() {
  const shown = el("output", {}, percent(view.smooth));
  const slider = el("input", {
    type: "range", min: 0, max: 20, step: 0.5, value: view.smooth * 100, id: "smooth",
    input: () => {
      view.smooth = slider.valueAsNumber / 100;
      shown.textContent = percent(view.smooth);
      view.prepare();
    },
  });
  const theme = (value) => {
    view.theme = value;
    document.documentElement.dataset.theme = value;
    view.keep();
  };
  theme(view.theme);
  return el("div", { class: "toolbar", role: "toolbar", "aria-label": "Charts" },
    segmented("Horizontal axis", { step: "Step", tokens: "Tokens", time: "Wall time" }, view.x, (x) => {
      [view.x, view.range, view.cursor] = [x, null, null];
      document.getElementById("all").hidden = true;
      view.prepare();
    }),
    el("label", {}, "Smoothing ", slider, shown),
    el("button", { type: "button", id: "all", hidden: view.range ? null : "", click: () => view.zoom(null) }, "Show all"),
    el("span", { class: "soft hint" }, "drag to zoom, double-click for all"),
    segmented("Theme", { auto: "Auto", light: "Light", dark: "Dark" }, view.theme, theme));
}

// Events that are drawn on the curves.
function marks(run) {
  const { step, tokens_seen: tokens } = run.curves.train;
  const kinds = { skipped_update: "skip", rollback: "rollback", start: "start", signal: "stop" };
  return run.events.filter((e) => (kinds[e.event] && (e.event !== "start" || e.at_s > 60 || e.step)) || e.error).map((e) => {
    const at = nearest(step, e.step);
    return { kind: e.error ? "rollback" : kinds[e.event], step: e.step, time_s: e.at_s, tokens_seen: tokens[at] ?? null,
      text: `${e.event.replace("_", " ")} at step ${e.step}${e.reason ? `: ${e.reason}` : ""}` };
  });
}

function charts() {
  const sets = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.curves.evaluations)))].sort();
  const lines = (run, key, name, color, more = {}) => ({ name: MANY ? run.name : name, color: MANY ? runColor(run) : color, data: run.curves.train, means: run.curves.means, key, ...more });
  const heldOut = (run, set, i) => ({ name: MANY ? run.name : set ? `held out: ${set}` : "held out", color: MANY ? runColor(run) : SET_COLORS[i % SET_COLORS.length], data: run.curves.evaluations[set], key: "loss", points: true });
  const has = (run, key) => run.curves.train[key]?.some((value) => value !== null);
  const shared = { marks: MANY ? [] : marks(RUN) };
  const found = [];
  const add = (title, format, all, more) => all.length && found.push(new Chart(view, { ...shared, title, format, lines: all, ...more }));
  const each = (key, name, color, more) => DATA.runs.filter((run) => has(run, key)).map((run) => lines(run, key, name, color, more));
  const heldOuts = (set, i) => DATA.runs.filter((run) => run.curves.evaluations[set]).map((run) => heldOut(run, set, i));
  const losses = each("loss", "training", "blue");
  add("Loss", digits, MANY ? losses : [...losses, ...sets.flatMap(heldOuts)], { wide: true, note: "nats a token" });
  if (MANY) sets.forEach((set, i) => add(set ? `Held-out loss: ${set}` : "Held-out loss", digits, heldOuts(set, i), { wide: true, note: "nats a token" }));
  for (const [key, title, format, more] of CHARTS) {
    const all = key === "mfu" ? [...each("mfu_full", "full attention", "blue"), ...each("mfu_causal", "causal attention", "purple", { dashed: true })] : each(key, title, key === "data_wait_s" ? "data" : "blue");
    add(title, format, all, more);
  }
  const known = new Set([...CHARTS.map((row) => row[0]), "step", "time_s", "tokens_seen", "loss", "mfu_full", "mfu_causal"]);
  const others = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.curves.train)))].filter((key) => !known.has(key));
  const groups = [...new Set(others.map((key) => key.split("/")[0]))];
  const varies = (key) => DATA.runs.some((run) => new Set(run.curves.train[key]).size > 1);
  for (const group of groups) {
    const keys = others.filter((key) => key.split("/")[0] === group && varies(key));
    add(group.replaceAll("_", " "), digits, keys.flatMap((key, i) => each(key, key.slice(group.length + 1) || group, RUN_COLORS[i % RUN_COLORS.length])));
  }
  view.charts = found;
  return el("section", { class: "charts", "aria-label": "Curves" }, found.map((chart) => chart.node));
}

const card = (title, ...children) => children.flat().some(Boolean) && el("section", { class: "card" }, el("h2", {}, title), children);

// Each part takes its share off the wall clock; what stays are the steps that count.
function waterfall(run) {
  const time = run.facts.time_breakdown;
  if (!time || !(time.wall_s > 0)) return null;
  const known = new Map(PARTS.map(([key, name, color]) => [key, [name, color]]));
  const lost = Object.entries(time).filter(([key, s]) => key.endsWith("_s") && !["wall_s", "steps_s"].includes(key) && s > 0)
    .map(([key, s]) => [...(known.get(key) ?? [key.slice(0, -2).replaceAll("_", " "), "other"]), s])
    .sort((a, b) => PARTS.findIndex((p) => p[1] === a[0]) - PARTS.findIndex((p) => p[1] === b[0]));
  const sum = lost.reduce((total, row) => total + row[2], time.steps_s);
  let end = time.wall_s;
  const bars = [["Wall clock", "wall", time.wall_s, 0], ...lost.map(([name, color, s]) => [name, color, s, (end -= s)]), ["Steps that count (goodput)", "steps", time.steps_s, 0]];
  const rows = bars.map(([name, color, s, from]) => {
    const cost = isNumber(run.devices) && money((s * run.devices) / HOUR);
    return [name, el("div", { class: "track" }, el("i", { style: `--c: var(--${color}); left: ${(100 * from) / time.wall_s}%; width: ${(100 * s) / time.wall_s}%` })),
      duration(s), percent(s / time.wall_s), ...(DATA.price_per_hour ? [cost] : [])];
  });
  const off = Math.abs(sum / time.wall_s - 1) > 0.01 && `The parts add up to ${percent(sum / time.wall_s)} of the wall clock.`;
  return el("div", { class: "waterfall" }, table(["Part", "", "Time", "Share", ...(DATA.price_per_hour ? ["Cost"] : [])], rows, "Where the time went"),
    el("p", { class: "soft" }, off, DATA.price_per_hour && `Cost at ${DATA.price_per_hour} an hour for each of ${plural(run.devices, "device")}, time without a process included.` +
      (new Set(run.processes.map((p) => p.devices)).size > 1 ? " The number of devices changed: parts are at its mean over time." : "")));
}

function timeline(run) {
  const whole = Math.max(...run.processes.map((p) => p.to_s), 0);
  if (!whole) return null;
  const bar = (kind, from, to, name) => el("i", { style: `--c: var(--${kind}); left: ${(100 * from) / whole}%; width: ${Math.max(0.15, (100 * (to - from)) / whole)}%`, title: `${name}: ${duration(to - from)}` });
  return [el("h3", {}, "Processes over time"), el("div", { class: "lanes" }, run.processes.slice(-30).map((p) =>
    el("div", { class: "lane" }, el("span", {}, `from step ${p.step}`), el("div", { class: "track", role: "img", "aria-label": `${duration(p.from_s)} to ${duration(p.to_s)}, ${p.end}` },
      bar("steps", p.from_s, p.to_s, "steps"), p.parts.map(([kind, from, to]) => bar(KIND[kind] ?? kind, from, to, kind))), el("span", { class: `end ${p.end === "finished" ? "good" : ["running", "stopped"].includes(p.end) ? "warn" : "bad"}` }, p.end)))),
  el("p", { class: "legend" }, [...new Map(PARTS.map((part) => [part[2], part[1]]))].filter(([color]) => ["start", "restore", "compile", "evaluation", "save"].includes(color))
    .concat([["steps", "Steps"]]).map(([color, name]) => el("span", { class: "key", style: `--c: var(--${color})` }, name)))];
}

function planned(run) {
  const { plan, facts, measured } = run, gib = (v) => `${digits(v / GIB)} GiB`;
  const rows = [
    ["Memory of a device", plan.peak_bytes ?? facts.program_bytes, measured.peak_memory_bytes, gib], ["Step time", plan.step_time_s, measured.step_time_s, duration],
    ["Tokens a second", plan.tokens_per_s, measured.tokens_per_s, count], ["MFU, full attention", plan.mfu_full, measured.mfu_full, percent], ["MFU, causal", plan.mfu_causal, measured.mfu_causal, percent],
  ].filter((row) => isNumber(row[1])).map(([name, a, b, format]) => [name, format(a), isNumber(b) ? format(b) : "unknown", isNumber(b) ? digits(b / a, 4) : ""]);
  const terms = Object.entries(plan.terms ?? {}).flatMap(([key, value]) => (key === "links_s" ? Object.entries(value).map(([axes, s]) => [`collectives along ${axes}`, s]) : key.endsWith("_s") ? [[key === "hidden_s" ? "collectives hidden behind products" : key.slice(0, -2), key === "hidden_s" ? -value : value]] : []));
  return rows.length > 0 && [table(["", "Planned", "Measured", "Ratio"], rows, "Planned and measured"),
    terms.length > 0 && [el("h3", {}, "Terms of the planned step"), table(["Term", "Time"], terms.map(([name, s]) => [name, `${s < 0 ? "−" : ""}${duration(Math.abs(s))}`]), "Terms of the planned step")],
    el("p", { class: "soft" }, plan.devices ? `Planned for ${plan.devices}.` : "Planned memory is what the compiled program asks for; llamajax plan --json=WORKDIR/plan.json adds the rest.")];
}

function mesh(run) {
  const axes = run.facts.mesh, { model = {}, data = {} } = run.config;
  if (!axes || typeof axes !== "object" || !Object.values(axes).every(isNumber)) return null;
  const size = (name) => axes[name] ?? 1, names = ["data", "stage", "fsdp", "sequence", "tensor"];
  const share = (what, total, ...by) => (isNumber(total) ? `${digits(total / by.reduce((n, a) => n * size(a), 1), 6)} of ${total.toLocaleString("en-US")} ${what}` : "unknown");
  const total = names.reduce((n, a) => n * size(a), 1), shards = size("stage") * size("fsdp") * size("tensor");
  const cells = Array.from({ length: Math.min(total, 64) }, (_, device) => {
    let rest = device;
    const at = Object.fromEntries([...names].reverse().map((a) => [a, [rest % size(a), (rest = Math.floor(rest / size(a)))][0]]));
    const weights = (at.stage * size("fsdp") + at.fsdp) * size("tensor") + at.tensor;
    const place = names.filter((a) => size(a) > 1).map((a) => `${a} ${at[a]}`).join(", ") || "all";
    return el("div", { class: "device", style: `--c: var(--${RUN_COLORS[weights % RUN_COLORS.length]})`, title: place }, el("b", {}, `weights ${weights + 1}/${shards}`), el("span", {}, `batch ${at.data * size("fsdp") + at.fsdp + 1}/${size("data") * size("fsdp")}`), el("small", {}, place));
  });
  const inner = size("tensor") * size("sequence") > 1 ? size("tensor") * size("sequence") : size("fsdp");
  return [el("div", { class: "mesh", style: `--columns: ${Math.min(8, inner > 1 ? inner : total)}` }, cells), total > 64 && el("p", { class: "soft" }, `The first 64 of ${total} devices.`),
    table(["Axis", "Size", "What it splits", "On each device"], [
      ["data", size("data"), "rows of the batch; weights are copied", share("rows", data.global_batch_size, "data", "fsdp")],
      ["fsdp", size("fsdp"), "rows of the batch, and the width of weights, gradients and moments", share("of the model's width", model.hidden_size, "fsdp")],
      ["sequence", size("sequence"), "positions of each row", share("positions", data.seq_len, "sequence")],
      ["tensor", size("tensor"), "heads, feed-forward width and vocabulary", share("heads", model.num_heads, "tensor")],
      ["stage", size("stage"), "layers", share("layers", model.num_layers, "stage")],
    ].filter((row) => row[1] > 1 || total === 1).map((row) => [...row.slice(0, 1), String(row[1]), ...row.slice(2)]), "What lies where"),
    isNumber(run.facts.num_parameters) && el("p", { class: "soft" }, `Each device keeps about ${count(run.facts.num_parameters / shards)} of ${count(run.facts.num_parameters)} parameters, and their moments.`)];
}

function samples(run) {
  const rows = [...run.samples].reverse();
  return rows.length > 0 && el("div", { class: "samples" }, rows.map((s, i) => el("details", { open: i < 3 ? "" : null }, el("summary", {}, `Step ${s.step.toLocaleString("en-US")}`), el("p", {}, el("b", {}, s.prompt), s.text))));
}

function describe(e, run) {
  if (e.event === "skipped_update") {
    return [e.reason, e.samples && `; samples ${e.samples.slice(0, 8).join(", ")}${e.samples.length > 8 ? ` and ${e.samples.length - 8} more` : ""}`, e.box && ["; ", el("a", { href: e.box }, "black box")],
      "; its documents: ", el("code", {}, `python -m llamajax.replay --workdir=${run.workdir} --step=${e.step}`)];
  }
  const process = e.event === "start" && run.processes.find((p) => Math.abs(p.from_s + (e.duration_s ?? 0) - e.at_s) < 0.1);
  const lost = process && process.lost_s ? (process.lost_s * (process.devices ?? 1)) / HOUR : 0;
  if (lost) return `after ${duration(process.lost_s)} without a new step: ${digits(lost, 3)} device hours lost${money(lost) ? `, ${money(lost)}` : ""}`;
  return Object.entries(e).filter(([k, v]) => !["event", "step", "at_s", "duration_s"].includes(k) && !/^(kept|removed)_/.test(k) && v !== null && v !== "").map(([k, v]) => `${k.replaceAll("_", " ")} ${isNumber(v) ? digits(v, 6) : text(v)}`).join(", ");
}

function events(run) {
  const kinds = [...new Set(run.events.map((e) => e.event))].sort();
  const holder = el("div", {});
  const fill = (kind) => {
    const shown = run.events.filter((e) => (kind === "all" ? true : kind === "notable" ? !["save", "evaluation", "compile", "restore", "canary"].includes(e.event) || e.error : e.event === kind)).reverse();
    holder.replaceChildren(table(["Time", "Step", "Event", "Took", "What"], shown.map((e) => [duration(e.at_s), e.step.toLocaleString("en-US"), el("span", { class: `event ${e.error ? "rollback" : e.event}` }, e.event.replaceAll("_", " ")), isNumber(e.duration_s) ? duration(e.duration_s) : "", describe(e, run)]), "Events, newest first", "stack"));
  };
  fill("notable");
  return run.events.length > 0 && [el("label", {}, "Show ", el("select", { change: (event) => fill(event.target.value) }, ["notable", "all", ...kinds].map((kind) => el("option", { value: kind }, kind.replaceAll("_", " "))))),
    run.left_out_events > 0 && el("p", { class: "soft" }, `${plural(run.left_out_events, "older event")} in events.jsonl alone.`), holder];
}

const flat = (value, path = "") => (value && typeof value === "object" && !Array.isArray(value) ? Object.entries(value).flatMap(([k, v]) => flat(v, path ? `${path}.${k}` : k)) : [[path, text(value)]]);

function config(run) {
  const changes = run.processes.flatMap((p, i) => [...Object.entries(p.overrides ?? {}).filter(() => i === run.processes.length - 1).map(([k, v]) => [k, text(v[0]), text(v[1]), "config file → this run"]),
    ...Object.entries(p.changed ?? {}).map(([k, v]) => [k, text(v[0]), text(v[1]), `changed by the start at step ${p.step}`])]);
  return [changes.length > 0 && table(["Key", "Before", "Used", "Where"], changes, "Config differences"),
    Object.keys(run.config).length > 0 && el("details", {}, el("summary", {}, "All keys"), el("div", { class: "config" }, Object.entries(run.config).map(([name, values]) => el("div", {}, el("h3", {}, name), table(["Key", "Value"], flat(values), name)))))];
}

const record = (run) => run.processes.length > 0 && table(["Process", "Ended", "Host", "Devices", "Versions", "Git", "Command"], run.processes.map((p) => [
  `${duration(p.from_s)} to ${duration(p.to_s)}, from step ${p.step}`, p.end, `${p.host ?? "unknown"}, pid ${p.pid ?? "unknown"}`, `${p.devices ?? ""} × ${p.device_kind ?? "unknown"}`,
  Object.entries(p.versions ?? {}).map((pair) => pair.join(" ")).join(", "), p.git ? `${p.git.commit?.slice(0, 12)}${p.git.modified ? ", modified" : ""}` : "no checkout", el("code", {}, (p.command ?? []).join(" "))]), "Processes", "stack wrap");

const checkpoints = (run) => run.checkpoints.length > 0 && table(["Step", "Time", "Training waited", "State"], [...run.checkpoints].reverse().map((c) => [c.step.toLocaleString("en-US"), duration(c.at_s), duration(c.wait_s), c.error ? `failed: ${c.error}` : c.kept === null ? "complete" : c.kept ? "kept" : "removed since"]), "Checkpoints");

const profile = (run) => Object.keys(run.profile).length > 0 && table(["", ""], flat(run.profile), "Profile");

function comparison() {
  const names = [...new Set(DATA.runs.flatMap((run) => figures(run).map((row) => row[0])))];
  const head = ["", ...DATA.runs.map((run) => run.name)];
  const configs = DATA.runs.map((run) => new Map(flat(run.config)));
  const differ = [...new Set(configs.flatMap((c) => [...c.keys()]))].filter((key) => new Set(configs.map((c) => c.get(key))).size > 1);
  return [card("Beside each other", table(head, names.map((name) => [name, ...DATA.runs.map((run) => figures(run).find((row) => row[0] === name)?.[1] ?? "")]), "Runs")),
    card("Config differences", differ.length ? table(head, differ.map((key) => [key, ...configs.map((c) => c.get(key) ?? "")]), "Config differences") : el("p", { class: "soft" }, "none")),
    DATA.runs.map((run) => card(`Where the time of ${run.name} went`, waterfall(run)))];
}

const single = (run) => [card("Where the time went", waterfall(run), timeline(run)), card("Events", events(run)), card("Planned and measured", planned(run)), card("Where a step's time went", profile(run)),
  card("Mesh", mesh(run)), card("Samples", samples(run)), card("Checkpoints", checkpoints(run)), card("Config", config(run)), card("Record", record(run))];

const main = el("main", {}, header(), MANY ? null : tiles(), toolbar(), charts(), MANY ? comparison() : single(RUN));
document.getElementById("page").append(main);
view.prepare();
new ResizeObserver(() => view.charts.forEach((chart) => chart.draw())).observe(main);

// `report --serve` answers with the time of the newest page.
if (location.protocol === "http:") {
  setInterval(async () => {
    const answer = await fetch("version").catch(() => null);
    if (answer?.ok && (await answer.text()) !== String(DATA.version)) location.reload();
  }, 3000);
}
