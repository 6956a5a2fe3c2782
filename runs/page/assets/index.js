// All runs on one page (runs/page/index.py): its charts, and a table to filter, sort and leaf through, two runs paired.
"use strict";
(() => {
  const LEAF = 100;  // rows at a time
  const get = id => document.getElementById(id);
  const data = JSON.parse(get("runs-data").textContent);
  const total = data.count, all = Array.from(Array(total).keys());
  const whole = column => Array.isArray(column) ? column : all.map(() => column.all);  // of equal values one is sent
  const rows = Object.fromEntries(Object.entries(data.rows).map(([key, column]) => [key, whole(column)]));
  const others = whole(data.own);  // settings that are not the commonest
  const verdicts = new Map(Object.entries(data.verdicts)), metrics = new Map(Object.entries(data.metrics));
  const counted = new Set(data.best), failed = new Set(data.failed), ranked = new Set(data.ranked);
  const said = new Map(Object.entries(data.saes.said).map(([sae, one]) => [Number(sae), one]));
  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  function labelled(label, made) {
    made.setAttribute("aria-label", label);
    return made;
  }
  function scrolling(label, table) {  // as shell.py's
    const place = labelled(label, make("div", {className: "scroll", tabIndex: 0}, table));
    place.setAttribute("role", "region");
    return place;
  }
  const word = verdict => verdicts.get(verdict)?.[0] ?? (verdict || "unknown");
  const sign = verdict => `${verdicts.get(verdict)?.[1] ?? ""} ${word(verdict)}`.trim();
  function kind(verdict) {
    if (counted.has(verdict)) return "comparable";
    if (failed.has(verdict)) return "failed";
    return verdict === "suspect" ? "suspect" : "not comparable";
  }
  const address = (i, file) => `${rows.at[i]}/${data.files[file]}`;
  const leads = i => rows.files[i].length ? address(i, rows.files[i][0]) : "";
  const fill = (select, names) => select.replaceChildren(...names.map((name, i) => new Option(name, i)));

  // ---------------------------------------------------------------------------------------------- what charts show

  let inside = new Set(all);  // rows that the filters leave

  // places of the values that are better than all before them
  function runningBest(values, way) {
    const found = [];
    values.forEach((value, i) => {
      if (value === null || !way) return;
      const best = found.length ? values[found[found.length - 1]] : null;
      if (best === null || (way === "higher" ? value > best : value < best)) found.push(i);
    });
    return found;
  }

  // places of the points that none beats in one without losing in the other
  function pareto(points, way) {
    const sign = way === "higher" ? -1 : 1;
    const order = points.map((point, i) => i);
    order.sort((a, b) => points[a][0] - points[b][0] || sign * (points[a][1] - points[b][1]) || a - b);
    return runningBest(order.map(i => points[i][1]), way).map(place => order[place]);
  }

  const ofSetting = new Map();  // runs that differ in the seed alone
  rows.group.forEach((group, i) => {
    if (!ofSetting.has(group)) ofSetting.set(group, []);
    ofSetting.get(group).push(i);
  });
  const short = value => Math.abs(value) >= 10 ? Math.round(value).toLocaleString("en") : Pages.number(value);
  const between = i => `${short(rows.l0[i])}–${short(rows.l0_high[i])}`;
  const cut = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;

  function label(i, sae) {
    const of = sae === undefined ? "" : ` ${data.saes.name[sae]}`;
    const lines = [cut(`${rows.run[i]}${of}${rows.best[i] ? " ★" : ""}`, 60)];
    const verdict = said.get(sae)?.verdict ?? rows.verdict[i];
    lines.push(cut([rows.variant[i], rows.hyper[i], word(verdict)].filter(Boolean).join(" · "), 60));
    if (sae === undefined && rows.saes[i] > 1) lines.push(`mean of ${rows.saes[i]} SAEs, L0 ${between(i)}`);
    if (rows.note[i]) lines.push(cut(rows.note[i], 60));
    const seeds = ofSetting.get(rows.group[i]);
    if (rows.seeds[i] > 1 && rows.seed[i] !== null) {
      const told = seeds.filter(j => j !== i).slice(0, 3).map(j => `${cut(rows.run[j], 20)} (seed ${rows.seed[j]})`);
      const more = seeds.length > 4 ? ` and ${seeds.length - 4} more` : "";
      lines.push(cut(`seed ${rows.seed[i]}; also ${told.join(", ")}${more}`, 90));
    }
    return lines.join("\n");
  }

  const firstOf = new Map();  // {metric: {row: [value, error] of its first SAE}}
  function ofRuns(name) {
    if (!firstOf.has(name)) {
      const metric = metrics.get(name), found = new Map();
      metric.v.forEach((value, n) => {
        const run = data.saes.run[metric.i ? metric.i[n] : n];
        if (!found.has(run)) found.set(run, [value, metric.e?.[n] ?? 0]);
      });
      firstOf.set(name, found);
    }
    return firstOf.get(name);
  }

  function spec(title, x, y, series, log) {
    const shown = series.filter(one => one.points.length || one.always);
    const count = shown.reduce((sum, one) => sum + (one.line ? 0 : one.points.length), 0);
    const role = count > data.many ? "seed" : "run";  // points of all kinds have one size
    return {title, kind: "points", x: {label: x, log, whole: !log}, y: {label: y, log: false},
      series: shown.map(one => one.line ? one : {...one, role})};
  }

  // what: "difference", "value" or a metric
  function progress(number, what, alone) {
    const {where, metric} = data.groups[number];
    const own = all.filter(i => rows.of[i] === number);
    const figure = i => {
      if (what === "difference") return [rows.difference[i], rows.difference_stderr[i]];
      if (what === "value") return [rows.value[i], rows.stderr[i]];
      return ofRuns(what).get(i) || [null, null];
    };
    const way = metrics.has(what) ? metrics.get(what).way : data.directions[metric] || "";
    const values = own.map(i => inside.has(i) && counted.has(rows.verdict[i]) ? figure(i)[0] : null);
    const line = [];
    for (const n of runningBest(values, way)) {
      const point = [label(own[n]), leads(own[n])];
      if (line.length) line.push([n + 1, line[line.length - 1][1], 0, ...line[line.length - 1].slice(3)]);
      line.push([n + 1, values[n], 0, ...point]);
    }
    const end = line[line.length - 1];
    if (end && end[0] < own.length) line.push([own.length, ...end.slice(1)]);
    const series = new Map();
    own.forEach((i, n) => {
      const [value, error] = figure(i);
      const verdict = rows.verdict[i];
      if (value === null || !inside.has(i) || (alone && !counted.has(verdict))) return;
      const [name, , colour, mark] = verdicts.get(verdict) ?? [word(verdict), "", 3, "rect"];
      if (!series.has(name)) series.set(name, {name, colour, mark, role: "run", line: false, points: []});
      series.get(name).points.push([n + 1, value, error || 0, label(i), leads(i)]);
    });
    const name = metrics.has(what) ? what : metric;
    const y = what === "difference" ? "difference to the baseline" : name;
    const order = [...verdicts.values()].map(([one]) => one);  // of the legend
    const points = [...series.values()].sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name));
    const best = {name: "best so far", role: "seed", colour: data.colours.step, line: true, points: line,
      always: points.length > 0};
    return spec(`${name}, ${where}`, "runs, in the order of their end", y, [best, ...points], false);
  }

  function frontier(place, name, alone) {
    const metric = metrics.get(name), sweeps = new Map();
    const points = new Map(Object.keys(data.kinds).map(each => [each, []]));
    metric.v.forEach((value, n) => {
      const sae = metric.i ? metric.i[n] : n, run = data.saes.run[sae], l0 = data.saes.l0[sae];
      if (data.saes.place[sae] !== place || !(l0 > 0) || !inside.has(run) || failed.has(rows.verdict[run])) return;
      const several = rows.saes[run] > 1;
      const told = label(run, several ? sae : undefined);
      const own = kind((said.get(sae) ?? {verdict: rows.verdict[run]}).verdict);
      if (alone && own !== "comparable") return;
      points.get(own).push([l0, value, metric.e?.[n] ?? 0, told, leads(run)]);
      if (!several) return;
      if (!sweeps.has(run)) sweeps.set(run, []);
      sweeps.get(run).push([l0, value, 0]);
    });
    const stored = data.places[place].lines.map(line => ({...line, line: true, points: line.metrics[name] || []}));
    const comparable = points.get("comparable"), any = comparable.length > 0;
    const over = any ? comparable : points.get("not comparable");
    const front = pareto(over, metric.way).map(i => [...over[i].slice(0, 2), 0, ...over[i].slice(3)]);
    const joined = [...sweeps.values()].filter(own => own.length > 1)
      .map(own => own.sort((a, b) => a[0] - b[0] || a[1] - b[1]));
    const kinds = Object.entries(data.kinds).map(([each, [colour, mark]]) =>
      ({name: each, role: "run", mark, colour, line: false, points: points.get(each), always: over.length > 0}));
    return spec(data.places[place].name, "L0", name, [
      {name: any ? "best of the comparable" : "best of the runs, none comparable", role: "seed",
        colour: data.colours.front, line: true, points: front}, ...stored,
      {name: data.joined, role: "seed", colour: data.colours.runs, line: true, points: joined.flat(),
        parts: joined.flatMap((own, part) => own.map(() => part))}, ...kinds], true);
  }

  function show(place, chart) {
    const plots = place.querySelector(".plots");
    plots.className = "plots";
    const before = plots.querySelector("canvas");
    if (before) Chart.getChart(before)?.destroy();
    if (chart.series.some(one => one.points.length)) Pages.chart(plots, chart);
    else plots.replaceChildren(make("p", {className: "mut", textContent: "nothing here to draw: choose others"}));
  }

  const drawers = [];
  function prepare(id, menus, draw) {
    const section = get(id);
    if (!section) return;
    const selects = menus.map(([name, options, chosen]) => {
      const select = section.querySelector(`select.${name}`);
      fill(select, options);
      select.value = chosen;
      return select;
    });
    const alone = section.querySelector(".alone");
    alone.parentNode.hidden = !all.some(i => !counted.has(rows.verdict[i]) && rows.value[i] !== null);
    const again = () => show(section, draw(...selects.map(select => Number(select.value)), alone.checked));
    [...selects, alone].forEach(choice => choice.addEventListener("change", again));
    section.querySelector(".choices").hidden = false;
    drawers.push(again);
    again();
  }

  const names = [...metrics.keys()];
  const kinds = ["difference", "value", ...names];
  const asked = Math.max(0, names.indexOf(data.by));
  const amount = (count, what) => `${count.toLocaleString("en")} ${count === 1 ? what : what + "s"}`;
  const options = data.groups.map(({where, metric, runs, comparable}) =>
    `${comparable.toLocaleString("en")} comparable of ${amount(runs, "run")}: ${where}, ${metric}`);
  const first = data.by && !data.judged ? asked + 2 : data.groups[0]?.comparable ? 0 : 1;

  // ---------------------------------------------------------------------------------------------- the table

  const table = get("runs"), body = table.tBodies[0];
  const lines = [];  // of each run its row
  [...body.rows].forEach((line, n) => { lines[data.order[n]] = line; });
  let order = data.order, leaf = 0, chosen = [];
  let group = null;  // of one setting, if its runs alone are shown
  const words = [];

  const headings = [...table.tHead.rows[0].cells];
  for (const th of headings) {
    const button = make("button", {type: "button"}, ...th.childNodes);
    button.addEventListener("click", () => sort(th));
    th.append(button);
  }
  table.tHead.rows[0].prepend(make("td", {className: "pick"}));
  const behind = {comparable: 0, failed: 2};
  const apart = i => behind[kind(rows.verdict[i])] ?? 1;

  function sort(th) {
    const key = th.dataset.key, values = rows[key], text = th.classList.contains("l") && key !== "time";
    const up = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && text);
    headings.forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const empty = i => values[i] === null || values[i] === "";
    const by_name = new Intl.Collator(undefined, {numeric: true}).compare;
    const compare = th.classList.contains("l") ? by_name : (a, b) => a - b;
    const known = (a, b) => empty(a) ? 0 : (up ? 1 : -1) * compare(values[a], values[b]);
    const by_rank = ranked.has(key);  // what does not count comes behind, whatever the direction
    table.classList.toggle("ranked", by_rank);
    order = [...all].sort((a, b) => (by_rank && apart(a) - apart(b)) || empty(a) - empty(b) || known(a, b) || a - b);
    leaf = 0;
    lay();
  }

  function pick(i, box) {
    chosen = box.checked ? [...chosen, i] : chosen.filter(other => other !== i);
    if (chosen.length > 2) lines[chosen[0]].querySelector("input").checked = false;
    chosen = chosen.slice(-2);
    pair();
  }

  function ready(i) {  // a row gets its box and its button when it is first seen
    const line = lines[i];
    if (line.cells[0].className !== "pick") {
      const box = labelled(`compare ${rows.run[i]}`, make("input", {type: "checkbox"}));
      box.addEventListener("change", () => pick(i, box));
      const button = labelled(`more of ${rows.run[i]}`, make("button", {type: "button", textContent: "▸"}));
      button.setAttribute("aria-expanded", "false");
      button.addEventListener("click", () => open(i, button));
      line.prepend(make("td", {className: "pick"}, box, button));
    }
    return line;
  }

  function open(i, button) {
    const shown = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!shown));
    button.textContent = shown ? "▸" : "▾";
    if (shown) lines[i].nextElementSibling.remove();
    else lines[i].after(inner(i));
  }

  const opened = i => lines[i].cells[0].querySelector("button")?.getAttribute("aria-expanded") === "true";
  const inner = i => make("tr", {className: "inner"}, make("td", {colSpan: headings.length + 1}, more(i)));

  // what a row has no room for: why, of which settings, its SAEs, its seeds, its files
  function more(i) {
    const parts = [], line = (name, ...content) => {
      parts.push(make("p", {}, make("span", {className: "mut", textContent: `${name}: `}), ...content));
    };
    const verdict = rows.verdict[i];
    if (rows.why[i]) line(failed.has(verdict) && rows.phase[i] ? `${word(verdict)} in ${rows.phase[i]}` : sign(verdict),
      rows.why[i]);
    if (rows.advice[i]) line("to do", rows.advice[i]);
    if (rows.note[i]) line("note", rows.note[i]);
    const own = Object.entries(others[i] ?? {}).filter(([key, value]) => value !== null && key !== "seed")
      .map(([key, value]) => `${key} = ${value}`);
    if (own.length) line("set otherwise than in most runs", own.join(", "));
    const seeds = ofSetting.get(rows.group[i]).filter(j => j !== i && !failed.has(rows.verdict[j]));
    if (seeds.length && rows.seeds[i] > 1) {
      const told = seeds.slice(0, 20).map(j => `${rows.run[j]} (seed ${rows.seed[j]}, ${sign(rows.verdict[j])})`);
      const alone = make("button", {type: "button", textContent: "show these alone"});
      alone.addEventListener("click", () => {
        group = rows.group[i];
        filter();
      });
      line("the same setting", told.join(", ") + (seeds.length > 20 ? ` and ${seeds.length - 20} more ` : " "), alone);
    }
    if (rows.saes[i] > 1) parts.push(saesOf(i));
    const links = rows.files[i].flatMap((file, n) => [n ? ", " : "",
      make("a", {href: address(i, file), textContent: data.files[file]})]);
    if (links.length) line("files", ...links);
    else line("files", "none beside this page");
    return make("div", {className: "more"}, ...parts);
  }

  function saesOf(i) {
    const heads = ["SAE", "verdict", "L0", "value", "±", "difference", "±", "why"];
    const sides = ["l", "l", "", "", "", "", "", "l w"];
    const cells = (texts, tag) =>
      make("tr", {}, ...texts.map((textContent, n) => make(tag, {className: sides[n], textContent})));
    const number = value => value === null || value === undefined ? "" : Pages.number(value);
    const own = all_saes.get(i).map(sae => {
      const one = said.get(sae) ?? {};
      return cells([data.saes.name[sae] ?? "", one.verdict ? sign(one.verdict) : "", number(data.saes.l0[sae]),
        number(one.value), number(one.stderr), number(one.difference), number(one.difference_stderr),
        one.why ?? ""], "td");
    });
    const table_of = make("table", {}, make("thead", {}, cells(heads, "th")), make("tbody", {}, ...own));
    return scrolling(`SAEs of ${rows.run[i]}`, table_of);
  }

  const all_saes = new Map();  // {run: its SAEs}
  data.saes.run.forEach((run, sae) => all_saes.set(run, [...(all_saes.get(run) || []), sae]));

  function lay() {
    const left = order.filter(i => inside.has(i)), last = Math.max(0, Math.ceil(left.length / LEAF) - 1);
    leaf = Math.min(leaf, last);
    const seen = left.slice(leaf * LEAF, (leaf + 1) * LEAF);
    body.replaceChildren(...seen.flatMap(i => opened(i) ? [ready(i), inner(i)] : [ready(i)]));
    const from = left.length ? leaf * LEAF + 1 : 0, to = Math.min(left.length, (leaf + 1) * LEAF);
    const of = left.length < total ? `${left.length.toLocaleString("en")} of ${total.toLocaleString("en")} runs`
      : `${total.toLocaleString("en")} ${total === 1 ? "run" : "runs"}`;
    get("count").textContent = last ? `${from} to ${to} of ${of}` : of;
    get("back").disabled = leaf === 0;
    get("on").disabled = leaf === last;
    get("back").hidden = get("on").hidden = last === 0;
  }

  // ---------------------------------------------------------------------------------------------- filters

  const filters = [...get("filters").querySelectorAll("select")].map(select => {
    const values = [...new Set(rows[select.dataset.key])];
    values.sort((a, b) => (a === null) - (b === null) || (a < b ? -1 : 1));
    const name = value => {
      if (value === null) return "none";
      return select.dataset.key === "verdict" ? word(value) : value;
    };
    fill(select, ["all", ...values.map(name)]);
    select.parentNode.hidden = values.length < 2;
    select.addEventListener("change", filter);
    return {select, values, of: rows[select.dataset.key]};
  });

  let waiting = null;
  function filter() {
    const sought = get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const asked_of = filters.filter(({select}) => select.value !== "0");
    const text = i => words[i] ?? (words[i] = [lines[i].textContent, rows.why[i]].join(" ").toLowerCase());
    inside = new Set(all.filter(i => (group === null || rows.group[i] === group)
      && asked_of.every(({select, values, of}) => of[i] === values[select.value - 1])
      && sought.every(one => text(i).includes(one))));
    leaf = 0;
    lay();
    clearTimeout(waiting);
    waiting = setTimeout(() => drawers.forEach(draw => draw()), 200);
  }

  get("search").addEventListener("input", filter);
  get("clear").addEventListener("click", () => {
    get("search").value = "";
    group = null;
    filters.forEach(({select}) => { select.value = "0"; });
    filter();
  });
  get("back").addEventListener("click", () => { leaf -= 1; lay(); });
  get("on").addEventListener("click", () => { leaf += 1; lay(); });

  // ---------------------------------------------------------------------------------------------- two runs

  function command(pair_of) {
    const places = pair_of.map(i => rows.shell[i]);  // null where a name holds what is not to be pasted
    return places.includes(null) ? "" : `python -m runs.compare ${places.join(" ")}`;
  }

  // rows of [name, a, b] as a table, those that differ with a sign
  function beside(title, [a, b], entries, marked = "") {
    const inner = make("tbody");
    for (const [name, x, y] of entries) {
      const differs = x !== y;
      inner.append(make("tr", {className: differs ? "differs" : ""}, make("th", {className: "l", scope: "row",
        textContent: name}), make("td", {className: "l", textContent: differs ? "≠" : ""}),
      make("td", {className: "l w", textContent: x}), make("td", {className: "l w", textContent: y})));
    }
    const head = make("tr", {}, make("th", {className: "l", textContent: title}), make("td"),
      make("th", {className: "l", textContent: rows.run[a], scope: "col"}),
      make("th", {className: "l", textContent: rows.run[b], scope: "col"}));
    return scrolling(`${title} of both runs`,
      make("table", {className: `beside ${marked}`}, make("thead", {}, head), inner));
  }

  const setting = (i, key) => {
    const own = others[i];
    if (own === null) return "not known";
    return Object.prototype.hasOwnProperty.call(own, key) ? own[key] ?? "–" : data.common[key];
  };
  const told = value => value === undefined || value === null ? "–" : Pages.number(value);

  function pair() {
    const place = get("pair");
    place.hidden = chosen.length === 0;
    if (chosen.length === 1) {
      const said = `${rows.run[chosen[0]]}: choose a second run to see both side by side`;
      place.replaceChildren(make("p", {textContent: said}));
      place.scrollIntoView({block: "nearest"});
    }
    if (chosen.length < 2) return;
    const [a, b] = chosen;
    const cell = (i, n) => headings[n].dataset.key === "verdict" ? sign(rows.verdict[i])
      : lines[i].cells[n + 1].textContent.trim();
    const keys = Object.keys(data.common).sort();
    const settings = keys.map(key => [key, setting(a, key), setting(b, key)]);
    const differing = settings.filter(([, x, y]) => x !== y), same = settings.filter(([, x, y]) => x === y);
    const measured = names.filter(name => ofRuns(name).has(a) || ofRuns(name).has(b))
      .map(name => [name, told(ofRuns(name).get(a)?.[0]), told(ofRuns(name).get(b)?.[0])]);
    const folded = (summary, ...content) => make("details", {}, make("summary", {textContent: summary}), ...content);
    const line = command(chosen);
    const close = make("button", {type: "button", textContent: "close"});
    close.addEventListener("click", () => {
      chosen.forEach(i => { lines[i].querySelector("input").checked = false; });
      chosen = [];
      pair();
    });
    const parts = [make("h3", {textContent: `${rows.run[a]} and ${rows.run[b]}`})];
    if (line) {
      const copy = make("button", {type: "button", textContent: "copy"}), code = make("code", {textContent: line});
      copy.addEventListener("click", () => {
        getSelection().selectAllChildren(code);
        navigator.clipboard?.writeText(line).then(() => { copy.textContent = "copied"; }, () => {});
      });
      parts.push(make("p", {className: "command"}, code, " ", copy));
    }
    const figures = headings.slice(1).map((th, n) => [th.textContent, cell(a, n + 1), cell(b, n + 1)]);
    parts.push(beside("figures", chosen, figures));
    parts.push(differing.length ? beside("settings that differ", chosen, differing, "marked")
      : make("p", {className: "mut", textContent: "no setting differs"}));
    if (measured.length) parts.push(folded(`${measured.length} metrics`, beside("metrics", chosen, measured)));
    if (same.length) parts.push(folded(`${same.length} settings that both have`, beside("settings", chosen, same)));
    place.replaceChildren(...parts, close);
  }

  get("filters").hidden = get("leaf").hidden = false;
  lay();
  // charts measure the page, which is quicker when a leaf of the table is left
  prepare("progress", [["group", options, 0],
    ["what", ["difference to the baseline", "value", ...names], first]],
  (group, what, alone) => progress(group, kinds[what], alone));
  const places = data.places.map(place => place.name);
  prepare("frontier", [["metric", names, asked], ["place", places, Math.max(0, places.indexOf(data.groups[0]?.where))]],
    (metric, place, alone) => frontier(place, names[metric], alone));
})();
