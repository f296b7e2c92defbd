// The sections below the curves, each made from one part of a run's data; and the page as a whole.

// What takes time off the steps, in this order: [key of time_breakdown, name, color].
const PARTS = [
  ["start_s", "Starting and importing", "start"],
  ["init_s", "Initializing weights", "restore"],
  ["import_s", "Importing weights", "restore"],
  ["restore_s", "Restoring checkpoints", "restore"],
  ["compile_s", "Compiling", "compile"],
  ["data_wait_s", "Waiting for data", "data"],
  ["evaluation_s", "Evaluating", "evaluation"],
  ["checkpoint_s", "Waiting for checkpoints", "save"],
  ["canary_s", "Checking devices", "canary"],
  ["export_s", "Exporting weights", "canary"],
  ["profile_s", "Tracing", "canary"],
  ["redone_s", "Steps done twice", "redone"],
  ["rolled_back_s", "Steps rolled back", "rollback"],
  ["down_s", "No process", "down"],
  ["other_s", "Everything else", "other"],
];
const DRAWN = { init: "restore", import: "restore", export: "canary", profile: "canary" }; // events in the color of a part
const QUIET = ["save", "evaluation", "compile", "restore", "canary", "export"];

// A bar over a part of a whole.
function bar(color, from, to, all, title) {
  const style = `--c: var(--${color}); left: ${(100 * from) / all}%; width: ${(100 * (to - from)) / all}%`;
  return el("i", { style, title });
}

const note = (...words) => el("p", { class: "soft" }, words);

// Each part takes its share off the wall clock; what stays are the steps that count.
function waterfall(run) {
  const time = run.facts.time_breakdown ?? {};
  if (!(time.wall_s > 0)) return null;
  const others = Object.keys(time).filter((key) => key.endsWith("_s") && !PARTS.some(([known]) => known === key))
    .filter((key) => !["wall_s", "steps_s"].includes(key)).map((key) => [key, label(key.slice(0, -2)), "other"]);
  let end = time.wall_s;
  const lost = [...PARTS, ...others].filter(([key]) => time[key] > 0)
    .map(([key, name, color]) => [name, color, end -= time[key], time[key]]);
  const bars = [
    ["Wall clock", "wall", 0, time.wall_s], ...lost, ["Steps that count (goodput)", "steps", 0, time.steps_s],
  ];
  const rows = bars.map(([name, color, from, s]) => [
    name, el("div", { class: "track" }, bar(color, from, from + s, time.wall_s)), duration(s), percent(s / time.wall_s),
    ...(DATA.price_per_hour ? [money((s * run.devices) / HOUR)] : []),
  ]);
  const off = (end - time.steps_s) / time.wall_s;
  const changed = new Set(run.processes.map((process) => process.devices)).size > 1;
  return el("div", { class: "waterfall" },
    table(["Part", "", "Time", "Share", ...(DATA.price_per_hour ? ["Cost"] : [])], rows, "Where the time went"),
    Math.abs(off) > 0.01 && note(`The parts add up to ${percent(1 - off)} of the wall clock.`),
    DATA.price_per_hour && note(`Cost at ${DATA.price_per_hour} an hour for each of ${plural(run.devices, "device")}, `,
      "time without a process included.", changed && " The number of devices changed: this is its mean over time."));
}

function timeline(run) {
  const all = Math.max(...run.processes.map((process) => process.to_s), 0);
  if (!all) return null;
  const level = (end) => (end === "finished" ? (run.verdict.level === "good" ? "good" : "warn") :
    { running: "info", stopped: "warn" }[end] ?? "bad");
  const lanes = run.processes.slice(-30).map(({ step, from_s, to_s, end, parts }) => el("div", { class: "lane" },
    el("span", {}, `from step ${whole(step)}`),
    el("div", { class: "track", role: "img", "aria-label": `${duration(from_s)} to ${duration(to_s)}, ${end}` },
      bar("steps", from_s, to_s, all, `steps and all else: ${duration(to_s - from_s)}`),
      parts.map(([kind, from, to]) => bar(DRAWN[kind] ?? kind, from, to, all, `${kind}: ${duration(to - from)}`))),
    el("span", { class: `end ${level(end)}`, title: end }, end)));
  const kinds = [["steps", "Steps"], ["start", "Start"], ["restore", "Weights"], ["compile", "Compilation"],
    ["evaluation", "Evaluation"], ["save", "Checkpoint"]];
  return [el("h3", {}, "Processes over time"), el("div", { class: "lanes" }, lanes),
    el("p", { class: "legend" }, kinds.map(([color, name]) =>
      el("span", { class: "key", style: `--c: var(--${color})` }, name)))];
}

function planned({ plan, facts, measured }) {
  const gib = (bytes) => `${digits(bytes / GIB)} GiB`;
  const rows = [
    ["Memory of a device", plan.peak_bytes ?? facts.program_bytes, measured.peak_memory_bytes, gib],
    ["Step time", plan.step_time_s, measured.step_time_s, duration],
    ["Tokens a second", plan.tokens_per_s, measured.tokens_per_s, count],
    ["MFU, full attention", plan.mfu_full, measured.mfu_full, percent],
    ["MFU, causal attention", plan.mfu_causal, measured.mfu_causal, percent],
  ].filter((row) => isNumber(row[1])).map(([name, before, after, format]) =>
    [name, format(before), ...(isNumber(after) ? [format(after), digits(after / before)] : ["unknown", ""])]);
  if (!rows.length) return null;
  const { links_s: links = {}, hidden_s: hidden, bubble, ...others } = plan.terms ?? {};
  const terms = [
    ...Object.entries(others).map(([key, s]) => [label(key.slice(0, -2)), duration(s)]),
    ...Object.entries(links).map(([axes, s]) => [`collectives along ${axes}`, duration(s)]),
    ...(hidden ? [["collectives hidden behind products", `−${duration(hidden)}`]] : []),
  ];
  const here = facts.platform && `; measured on ${facts.num_devices ?? ""} × ${facts.device_kind || facts.platform}`;
  return [table(["", "Planned", "Measured", "Ratio"], rows, "Planned and measured"),
    terms.length > 0 && [el("h3", {}, "Terms of the planned step"), table(["Term", "Time"], terms, "Terms")],
    plan.devices ? note(`Planned for ${plan.devices}`, here, ".")
      : note("Planned by the compiled program alone; `llamajax plan --json=WORKDIR/plan.json` adds the rest.")];
}

// The summary of traced steps (`monitoring.profile_steps`) beside the plan of the same program.
function profile({ profile: found }) {
  if (!Array.isArray(found.steps)) return null;
  const { links_s: links = {}, ...plan } = found.planned ?? {};
  const waited_s = Object.values(links).reduce((a, b) => a + b, 0) - plan.hidden_s;
  const rows = [
    ["products", found.products_s, plan.products_s],
    ["attention", found.attention_s, plan.attention_s],
    ["other operations", found.other_s, plan.memory_s],
    ["communication waited for", found.exposed_communication_s, waited_s],
    ...Object.entries(found.communication_s ?? {}).map(([axes, s]) => [`all along ${axes}`, s.total_s, links[axes]]),
    ["idle", found.idle_s, plan.bubble_s],
    ["of it waiting for data", found.data_wait_s],
    ["of no known operation", found.unknown_s],
    ["other programs", found.other_programs_s],
    ["step", found.step_s, plan.step_time_s],
  ].filter((row) => isNumber(row[1])).map(([name, measured, before]) => [
    name, isNumber(before) ? duration(before) : "", duration(measured),
    before > 0 ? digits(measured / before) : "", percent(measured / found.step_s),
  ]);
  return [table(["", "Planned", "Measured", "Ratio", "Share"], rows, "Where a step's time went"),
    note(`Mean of ${plural(found.devices, "device")} over steps ${found.steps.join(" to ")}.`)];
}

function mesh(run) {
  const axes = run.facts.mesh;
  const { model = {}, data = {} } = run.config;
  if (!axes || !Object.values(axes).every(isNumber)) return null;
  const names = ["data", "stage", "fsdp", "sequence", "tensor"]; // outermost first
  const size = (...chosen) => chosen.reduce((product, name) => product * (axes[name] ?? 1), 1);
  const [devices, shards, batches] = [size(...names), size("stage", "fsdp", "tensor"), size("data", "fsdp")];
  const cells = Array.from({ length: Math.min(devices, 64) }, (_, device) => {
    const at = {};
    let rest = device;
    for (const name of [...names].reverse()) {
      at[name] = rest % size(name);
      rest = Math.floor(rest / size(name));
    }
    const weights = (at.stage * size("fsdp") + at.fsdp) * size("tensor") + at.tensor;
    const place = names.filter((name) => size(name) > 1).map((name) => `${name} ${at[name]}`).join(", ");
    return el("div", { class: "device", style: `--c: var(--${COLORS[weights % COLORS.length]})` },
      el("b", {}, `weights ${weights + 1}/${shards}`),
      el("span", {}, `batch ${at.data * size("fsdp") + at.fsdp + 1}/${batches}`), el("small", {}, place));
  });
  const share = (total, of, ...by) => (isNumber(total) ? `${digits(total / size(...by), 6)} of ${whole(total)} ${of}` : "");
  const rows = [
    ["data", "rows of the batch; weights are copied", share(data.global_batch_size, "rows", "data", "fsdp")],
    ["stage", "layers", share(model.num_layers, "layers", "stage")],
    ["fsdp", "rows of the batch; width of weights, gradients and moments", share(model.hidden_size, "in width", "fsdp")],
    ["sequence", "positions of each row", share(data.seq_len, "positions", "sequence")],
    ["tensor", "heads, feed-forward width, vocabulary", share(model.num_heads, "heads", "tensor")],
  ].filter(([name]) => size(name) > 1).map(([name, ...others]) => [name, String(size(name)), ...others]);
  const inner = size("sequence", "tensor") > 1 ? size("sequence", "tensor") : size("fsdp") > 1 ? size("fsdp") : devices;
  const { num_parameters: total } = run.facts;
  return [el("div", { class: "mesh", style: `--columns: ${Math.min(8, inner)}` }, cells),
    devices > 64 && note(`The first 64 of ${whole(devices)} devices.`),
    rows.length > 0 && table(["Axis", "Size", "What it splits", "On each device"], rows, "What each device holds"),
    isNumber(total) && note(`Each device keeps about ${count(total / shards)} of ${count(total)} parameters, and their moments.`)];
}

function samples(run) {
  if (run.facts.samples_problem) return note(run.facts.samples_problem);
  const steps = [...new Set(run.samples.map((sample) => sample.step))].reverse();
  const texts = (step) => run.samples.filter((sample) => sample.step === step)
    .map((sample) => el("p", {}, el("b", {}, sample.prompt), sample.text));
  return steps.length > 0 && el("div", { class: "samples" }, steps.map((step, i) =>
    el("details", { open: i < 2 ? "" : null }, el("summary", {}, `Step ${whole(step)}`), texts(step))));
}

// Where a fork comes from, and each key of its config that differs there.
const forked = ({ run, step, changed }) => [`fork of ${run} at step ${whole(step)}`,
  ...Object.entries(changed ?? {}).map(([key, pair]) => `${key}: ${pair.map(text).join(" -> ")}`)];

// The page of `prepare --inspect`, or the command that writes it.
const inspection = ({ path, page }) => (page ? el("a", { href: page }, `inspection of ${path}`)
  : el("code", {}, `python -m llamajax.prepare --inspect=${path}`));

// What the table says of an event besides its name and time.
function describe(event, run) {
  const replay = `python -m llamajax.replay --workdir=${run.workdir} --step=${event.step}`;
  if (event.event === "skipped_update") {
    const ids = event.samples ?? [];
    const more = ids.length > 8 ? ` and ${ids.length - 8} more` : "";
    return [event.reason, ids.length > 0 && `; samples ${ids.slice(0, 8).join(", ")}${more}`,
      event.box && ["; ", el("a", { href: event.box }, "black box")], "; its documents: ", el("code", {}, replay),
      run.data.map((data) => ["; ", inspection(data)])];
  }
  const started = (process) => Math.abs(process.from_s + (event.duration_s ?? 0) - event.at_s) < 0.1;
  const process = event.event === "start" && run.processes.find(started);
  const said = event.fork ? forked(event.fork) : [];
  if (process?.lost_s) {
    const lost = (process.lost_s * (process.devices ?? 1)) / HOUR;
    said.push(`${duration(process.lost_s)} without a new step: ${digits(lost, 3)} device hours lost` +
      (DATA.price_per_hour ? `, cost ${money(lost)}` : ""));
  }
  if (said.length) return said.join("; ");
  const hidden = /^(event|step|at_s|duration_s|last_seen_s|kept_.*|removed_.*)$/;
  return Object.entries(event).filter(([key, value]) => !hidden.test(key) && value !== null && value !== "")
    .map(([key, value]) => `${label(key)} ${text(value)}`).join(", ");
}

function events(run) {
  const holder = el("div", {});
  const fill = (kind) => {
    const isShown = (e) => kind === "all" || (kind === "notable" ? !QUIET.includes(e.event) || e.error : e.event === kind);
    const rows = run.events.filter(isShown).reverse().map((e) => [
      duration(e.at_s), whole(e.step), el("span", { class: `event ${e.error ? "rollback" : e.event}` }, label(e.event)),
      isNumber(e.duration_s) ? duration(e.duration_s) : "", describe(e, run),
    ]);
    holder.replaceChildren(table(["Time", "Step", "Event", "Took", "What"], rows, "Events, newest first", "stack"));
  };
  const kinds = ["notable", "all", ...new Set(run.events.map((e) => e.event))];
  const chosen = kinds.includes(view.events) ? view.events : "notable";
  const choose = (change) => {
    view.events = change.target.value;
    view.keep();
    fill(view.events);
  };
  fill(chosen);
  const options = kinds.map((kind) => el("option", { value: kind, selected: kind === chosen }, label(kind)));
  return run.events.length > 0 && [
    el("label", {}, "Show ", el("select", { change: choose }, options)),
    run.left_out_events > 0 && note(`${plural(run.left_out_events, "older event")} in events.jsonl alone.`), holder];
}

// Keys with dots and values as text.
function flat(value, path = "") {
  if (!value || typeof value !== "object" || Array.isArray(value)) return [[path, text(value)]];
  return Object.entries(value).flatMap(([key, inner]) => flat(inner, path ? `${path}.${key}` : key));
}

function config(run) {
  const changes = (values, where) => Object.entries(values ?? {}).map(([key, pair]) => [key, ...pair.map(text), where]);
  const rows = [...changes(last(run.processes)?.overrides, "config file → this run"),
    ...run.processes.flatMap((p) => changes(p.changed, `changed by the start at step ${whole(p.step)}`))];
  const all = Object.entries(run.config).map(([name, values]) =>
    el("div", {}, el("h3", {}, name), table(["Key", "Value"], flat(values), name)));
  return [...run.data.map((data) => el("p", {}, "Data: ", inspection(data))),
    rows.length > 0 && table(["Key", "Before", "Used", "Where"], rows, "Config differences", "stack"),
    all.length > 0 && el("details", {}, el("summary", {}, "All keys"), el("div", { class: "config" }, all))];
}

function record(run) {
  const git = ({ commit, modified }) => `${String(commit).slice(0, 12)}${modified ? ", modified" : ""}`;
  const rows = run.processes.map((p) => [
    `${duration(p.from_s)} to ${duration(p.to_s)}, from step ${whole(p.step)}`, p.end, `${p.host}, pid ${p.pid}`,
    `${p.devices} × ${p.device_kind}`, Object.entries(p.versions ?? {}).map((pair) => pair.join(" ")).join(", "),
    p.git ? git(p.git) : "no checkout", el("code", {}, (p.command ?? []).join(" ")),
  ]);
  const head = ["Process", "Ended", "Host", "Devices", "Versions", "Git", "Command"];
  return rows.length > 0 && table(head, rows, "Processes", "stack wrap");
}

function checkpoints(run) {
  const kept = run.kept_checkpoints; // names; null where they are elsewhere
  const state = ({ error, step }) => (error ? `failed: ${error}` : !kept ? "complete" :
    kept.includes(String(step)) ? "kept" : "removed since");
  const rows = run.events.filter((e) => e.event === "save").reverse()
    .map((e) => [whole(e.step), duration(e.at_s), duration(e.duration_s), state(e)]);
  return rows.length > 0 && table(["Step", "Time", "Training waited", "State"], rows, "Checkpoints");
}

function comparison() {
  const head = ["", ...DATA.runs.map((run) => run.name)];
  const tables = DATA.runs.map((run) => new Map(figures(run).map(([name, value]) => [name, value])));
  const configs = DATA.runs.map((run) => new Map(flat(run.config)));
  const rows = (maps, isShown) => [...new Set(maps.flatMap((map) => [...map.keys()]))].filter(isShown)
    .map((key) => [key, ...maps.map((map) => map.get(key) ?? "")]);
  const differ = rows(configs, (key) => new Set(configs.map((map) => map.get(key))).size > 1);
  const paired = DATA.runs.slice(1).map((run) => note(run.paired));
  return [card("Loss on the same samples", paired),
    card("Beside each other", table(head, rows(tables, () => true), "Runs")),
    card("Config differences", differ.length ? table(head, differ, "Config differences") : note("none")),
    DATA.runs.map((run) => card(`Where the time of ${run.name} went`, waterfall(run)))];
}

function card(title, ...children) {
  return children.flat().some(Boolean) && el("section", { class: "card" }, el("h2", {}, title), children);
}

const sections = (run) => [
  card("Where the time went", waterfall(run), timeline(run)),
  card("Events", events(run)),
  card("Planned and measured", planned(run)),
  card("Where a step's time went", profile(run)),
  card("Mesh", mesh(run)),
  card("Samples", samples(run)),
  card("Checkpoints", checkpoints(run)),
  card("Config", config(run)),
  card("Record", record(run)),
];

if (new Set(DATA.runs.map((run) => run.name)).size < DATA.runs.length) {
  DATA.runs.forEach((run) => (run.name = run.workdir));
}
const main = el("div", {}, header(), !MANY && tiles(), toolbar(), charts(), MANY ? comparison() : sections(RUN));
document.querySelector("main").append(main);
// What can be opened, by where it is and what it says.
const keyOf = (details) => [details.closest("figure, section").querySelector(".title, h2"), details.firstChild]
  .map((node) => node.textContent).join(": ");
main.querySelectorAll("details").forEach((details) => (details.open = view.open[keyOf(details)] ?? details.open));
main.addEventListener("click", ({ target }) => {
  const details = target.closest("summary")?.parentNode;
  if (!details) return;
  view.open[keyOf(details)] = !details.open; // as it will be
  view.keep();
});
view.prepare();
new ResizeObserver(() => view.charts.forEach((chart) => chart.draw())).observe(main);

// `report --serve` says which version of the page is the newest.
if (location.protocol === "http:") {
  setInterval(async () => {
    const answer = await fetch("version").catch(() => null);
    if (answer?.ok && (await answer.text()) !== DATA.version) location.reload();
  }, 3000);
}
