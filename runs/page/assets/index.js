// All runs on one page (runs/page/index.py): its charts, and a table to filter, sort and leaf through, two runs paired.
"use strict";
(() => {
  const LEAF = 100;  // rows at a time
  const get = id => document.getElementById(id);
  const data = JSON.parse(get("runs-data").textContent);
  const rows = data.rows, total = rows.run.length, all = Array.from(Array(total).keys());
  const verdicts = new Map(Object.entries(data.verdicts)), metrics = new Map(Object.entries(data.metrics));
  const counted = new Set(data.best), failed = new Set(data.failed);
  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const word = verdict => verdicts.get(verdict)?.[0] ?? (verdict || "unknown");
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
  rows.group.forEach((group, i) => ofSetting.set(group, [...(ofSetting.get(group) || []), i]));
  const cut = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;

  function label(i, sae) {
    const lines = [cut(rows.run[i] + (sae ? ` ${sae}` : "") + (rows.best[i] ? " ★" : ""), 60)];
    lines.push(cut([rows.variant[i], rows.hyper[i], word(rows.verdict[i])].filter(Boolean).join(" · "), 60));
    if (rows.note[i]) lines.push(cut(rows.note[i], 60));
    const others = ofSetting.get(rows.group[i]).filter(j => j !== i);
    if (rows.seed[i] !== null && others.length) {
      const told = others.slice(0, 3).map(j => `${cut(rows.run[j], 20)} (seed ${rows.seed[j]})`).join(", ");
      const more = others.length > 3 ? ` and ${others.length - 3} more` : "";
      lines.push(cut(`seed ${rows.seed[i]}; also ${told}${more}`, 90));
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

  const spec = (title, x, y, series, log) => ({title, kind: "points", x: {label: x, log}, y: {label: y, log: false},
    series: series.filter(one => one.points.length)});

  // what: "difference", "value" or a metric
  function progress([model, metric], what) {
    const own = all.filter(i => rows.model[i] === model && rows.metric[i] === metric);
    const figure = i => {
      if (what === "difference") return [rows.difference[i], rows.difference_stderr[i]];
      if (what === "value") return [rows.value[i], rows.stderr[i]];
      return ofRuns(what).get(i) || [null, null];
    };
    const way = metrics.has(what) ? metrics.get(what).way : data.directions[metric] || "";
    const values = own.map(i => inside.has(i) && counted.has(rows.verdict[i]) ? figure(i)[0] : null);
    const line = [];
    for (const n of runningBest(values, way)) {
      const point = [label(own[n]), rows.href[own[n]] || ""];
      if (line.length) line.push([n + 1, line[line.length - 1][1], 0, ...line[line.length - 1].slice(3)]);
      line.push([n + 1, values[n], 0, ...point]);
    }
    const end = line[line.length - 1];
    if (end && end[0] < own.length) line.push([own.length, ...end.slice(1)]);
    const series = new Map();
    own.forEach((i, n) => {
      const [value, error] = figure(i);
      if (value === null || !inside.has(i)) return;
      const verdict = rows.verdict[i];
      const [name, , colour, role] = verdicts.get(verdict) ?? [word(verdict), "", 3, "other"];
      if (!series.has(name)) series.set(name, {name, colour, role, line: false, points: []});
      series.get(name).points.push([n + 1, value, error || 0, label(i), rows.href[i] || ""]);
    });
    const name = metrics.has(what) ? what : metric;
    const y = what === "difference" ? "difference to the baseline" : name;
    const best = {name: "best so far", role: "seed", colour: data.colours.step, line: true, points: line};
    return spec(`${name}, ${model}`, "runs, in the order of their end", y, [best, ...series.values()], false);
  }

  function frontier(place, name) {
    const metric = metrics.get(name), sound = [], doubtful = [];
    metric.v.forEach((value, n) => {
      const sae = metric.i ? metric.i[n] : n, run = data.saes.run[sae], l0 = data.saes.l0[sae];
      if (data.saes.place[sae] !== place || !(l0 > 0) || !inside.has(run)) return;
      const several = data.saes.run[sae - 1] === run || data.saes.run[sae + 1] === run;
      const told = label(run, several ? data.saes.name[sae] : "");
      const point = [l0, value, metric.e?.[n] ?? 0, told, rows.href[run] || ""];
      (failed.has(rows.verdict[run]) ? doubtful : sound).push(point);
    });
    const stored = data.places[place].lines.map(line => ({...line, line: true, points: line.metrics[name] || []}));
    const front = pareto(sound, metric.way).map(i => [...sound[i].slice(0, 2), 0, ...sound[i].slice(3)]);
    return spec(data.places[place].name, "L0", name, [
      {name: "best of the runs", role: "seed", colour: data.colours.front, line: true, points: front}, ...stored,
      {name: "runs", role: "run", colour: data.colours.runs, line: false, points: sound},
      {name: "suspect or failed", role: "random", colour: 5, line: false, points: doubtful}], true);
  }

  function show(place, chart) {
    const plots = place.querySelector(".plots");
    plots.className = "plots";
    const before = plots.querySelector("canvas");
    if (before) Chart.getChart(before)?.destroy();
    if (chart.series.length) Pages.chart(plots, chart);
    else plots.replaceChildren(make("p", {className: "mut", textContent: "no run here has both figures"}));
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
    const again = () => show(section, draw(...selects.map(select => Number(select.value))));
    selects.forEach(select => select.addEventListener("change", again));
    section.querySelector(".choices").hidden = false;
    drawers.push(again);
    again();
  }

  const names = [...metrics.keys()];
  const kinds = ["difference", "value", ...names];
  const asked = Math.max(0, names.indexOf(data.by));
  const anyDifference = rows.difference.some(value => value !== null);
  prepare("progress", [
    ["group", data.groups.map(([model, metric]) => `${model}, ${metric}`), 0],
    ["what", ["difference to the baseline", "value", ...names], data.by ? asked + 2 : anyDifference ? 0 : 1]],
  (group, what) => progress(data.groups[group], kinds[what]));
  prepare("frontier", [["metric", names, asked], ["place", data.places.map(place => place.name), 0]],
    (metric, place) => frontier(place, names[metric]));

  // ---------------------------------------------------------------------------------------------- the table

  const table = get("runs"), body = table.tBodies[0];
  const lines = [];  // of each run its row
  [...body.rows].forEach((line, n) => { lines[data.order[n]] = line; });
  let order = data.order, leaf = 0, chosen = [];
  const words = [];

  const headings = [...table.tHead.rows[0].cells];
  for (const th of headings) {
    const button = make("button", {type: "button"}, ...th.childNodes);
    button.addEventListener("click", () => sort(th));
    th.append(button);
  }
  table.tHead.rows[0].prepend(make("td", {className: "pick"}));

  function sort(th) {
    const key = th.dataset.key, values = rows[key], text = th.classList.contains("l") && key !== "time";
    const up = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && text);
    headings.forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const empty = i => values[i] === null || values[i] === "";
    const by_name = new Intl.Collator(undefined, {numeric: true}).compare;
    const compare = th.classList.contains("l") ? by_name : (a, b) => a - b;
    const known = (a, b) => empty(a) ? 0 : (up ? 1 : -1) * compare(values[a], values[b]);
    order = [...all].sort((a, b) => empty(a) - empty(b) || known(a, b) || a - b);
    leaf = 0;
    lay();
  }

  function pick(i, box) {
    chosen = box.checked ? [...chosen, i] : chosen.filter(other => other !== i);
    if (chosen.length > 2) lines[chosen[0]].querySelector("input").checked = false;
    chosen = chosen.slice(-2);
    pair();
  }

  function ready(i) {  // a row gets its box when it is first seen
    const line = lines[i];
    if (line.cells[0].className !== "pick") {
      const box = make("input", {type: "checkbox", ariaLabel: `compare ${rows.run[i]}`});
      box.addEventListener("change", () => pick(i, box));
      line.prepend(make("td", {className: "pick"}, box));
    }
    return line;
  }

  function lay() {
    const left = order.filter(i => inside.has(i)), last = Math.max(0, Math.ceil(left.length / LEAF) - 1);
    leaf = Math.min(leaf, last);
    body.replaceChildren(...left.slice(leaf * LEAF, (leaf + 1) * LEAF).map(ready));
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
    const name = value => value === null ? "none" : select.dataset.key === "verdict" ? word(value) : value;
    fill(select, ["all", ...values.map(name)]);
    select.parentNode.hidden = values.length < 2;
    select.addEventListener("change", filter);
    return {select, values, of: rows[select.dataset.key]};
  });

  let waiting = null;
  function filter() {
    const sought = get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const asked_of = filters.filter(({select}) => select.value !== "0");
    const text = i => words[i] ?? (words[i] = lines[i].textContent.toLowerCase());
    inside = new Set(all.filter(i => asked_of.every(({select, values, of}) => of[i] === values[select.value - 1])
      && sought.every(one => text(i).includes(one))));
    leaf = 0;
    lay();
    clearTimeout(waiting);
    waiting = setTimeout(() => drawers.forEach(draw => draw()), 200);
  }

  get("search").addEventListener("input", filter);
  get("clear").addEventListener("click", () => {
    get("search").value = "";
    filters.forEach(({select}) => { select.value = "0"; });
    filter();
  });
  get("back").addEventListener("click", () => { leaf -= 1; lay(); });
  get("on").addEventListener("click", () => { leaf += 1; lay(); });

  // ---------------------------------------------------------------------------------------------- two runs

  const quoted = text => /^[\w./=+,@%-]+$/.test(text) ? text : `'${text.replace(/'/g, "'\\''")}'`;

  function command(pair_of) {
    const places = pair_of.map(i => rows.folder[i]);
    // a line to paste holds no control character, whatever a folder is called
    if (places.some(place => place === null || /[\u0000-\u001f\u007f-\u009f\u2028-\u202e]/.test(place))) return "";
    const before = data.folder === "." ? "" : data.folder.replace(/\/?$/, "/");
    const path = place => before + place;
    return "python -m runs.compare " + places.map(place => quoted(path(place).replace(/^-/, "./-"))).join(" ");
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
    const scroll = make("div", {className: "scroll", tabIndex: 0, ariaLabel: `${title} of both runs`},
      make("table", {className: `beside ${marked}`}, make("thead", {}, head), inner));
    scroll.setAttribute("role", "region");
    return scroll;
  }

  const setting = (i, key) => {
    const own = data.own[i];
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
    }
    if (chosen.length < 2) return;
    const [a, b] = chosen;
    const cell = (i, n) => lines[i].cells[n + 1].textContent.trim();
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
})();
