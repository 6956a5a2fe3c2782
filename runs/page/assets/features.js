// The feature page (runs/page/features.py): the list of all features, dashboards beside the baseline's, passages.
"use strict";
const Features = (() => {
  const get = id => document.getElementById(id);
  const ROW = 27, AHEAD = 12;  // px of a row, as in features.css; rows kept above and below the visible ones
  const SPREAD = 50;  // of counts, above which they are shown on a log axis
  const number = value => Pages.number(value);
  const comma = value => value.toLocaleString("en-US");
  // as shell.visible has it
  const visible = text => text.replace(/[\p{C}\p{Z}]/gu, c => ({"\n": "↵", "\t": "⇥", " ": " "})[c] ?? "·");

  function el(tag, set = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(set)) {
      if (value === null || value === undefined) continue;
      if (name === "text") made.textContent = value;
      else if (name === "on") Object.entries(value).forEach(([event, call]) => made.addEventListener(event, call));
      else made.setAttribute(name, value);
    }
    made.append(...inside.filter(one => one !== null && one !== ""));
    return made;
  }

  // ---------------------------------------------------------------------------------------------- what is known

  let board, lines, parsed, rowOf, size;  // the first line; {name: text of a dashboard}; those read; row of a feature

  async function unpack() {
    const text = atob(JSON.parse(get("board").textContent));
    const bytes = Uint8Array.from(text, c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const all = (await new Response(stream).text()).split("\n");
    board = JSON.parse(all[0]);
    lines = new Map();
    for (const line of all.slice(1)) {
      const tab = line.indexOf("\t");
      if (tab > 0) lines.set(line.slice(0, tab), line.slice(tab + 1));
    }
    parsed = new Map();
    size = board.rows ? board.rows.length : board.d_sae;
    rowOf = board.rows ? new Map(board.rows.map((feature, row) => [feature, row])) : null;
  }

  // a dashboard: of the run by its number, of the baseline by "b" and its number; null if there is none
  function dashboard(name) {
    name = String(name);
    if (!lines.has(name)) return null;
    if (!parsed.has(name)) parsed.set(name, JSON.parse(lines.get(name)));
    return parsed.get(name);
  }

  // the class of a column's cells
  function side(column) {
    if (column.words) return "l";
    return column.key === "feature" ? "first" : null;
  }

  const featureAt = row => board.rows ? board.rows[row] : row;
  function rowAt(feature) {  // -1: not in the list
    if (rowOf) return rowOf.get(feature) ?? -1;
    return feature >= 0 && feature < board.d_sae ? feature : -1;
  }
  const note = feature => Object.prototype.hasOwnProperty.call(board.notes, feature) ? board.notes[feature] : null;
  const column = (name, row) => board.columns[name] && row >= 0 ? board.columns[name][row] : null;
  const cosine = (name, row) => {
    const value = column(name, row);
    return value === null ? null : value / 1000;
  };
  const fires = row => Boolean(column("density", row));
  const has = feature => lines.has(String(feature));
  const percent = share => `${Number((100 * share).toPrecision(3))}%`;
  function rate(density) {  // as _share of features.py has it
    if (board.text === null) return percent(density);
    const {tokens} = board.text;
    return `${percent(density)} (${comma(Math.round(density * tokens))} of ${comma(tokens)} tokens)`;
  }
  const short = token => visible(token.trim() || token);
  // the tokens on which a feature is largest: at its peak, then at those of most of its strongest contexts
  function strongest(row) {
    const peak = column("peak", row), known = note(featureAt(row));
    const tokens = known ? known[5].map(short) : [];
    return [...new Set(peak === null || peak < 0 ? tokens : [short(board.vocab[peak]), ...tokens])];
  }
  const className = place => board.classes[place][1];
  const classes = places => places.map(className).join(", ");
  const words = feature => {  // what is said of a feature in short
    const known = note(feature), row = rowAt(feature);
    return known && known[3] || (row < 0 ? "" : strongest(row).join(" "));
  };

  // ---------------------------------------------------------------------------------------------- the list

  // sort: {key, down}, or null: the best hits, those with dashboards first; level: of each row 0 if it is not shown, or
  // how good a hit it is, 1 the best; best: rows with dashboards in the board's order
  const LEVELS = 4;
  const list = {columns: [], shown: null, sort: null, level: null, best: [], at: 0, rows: new Map()};
  let opened = null;  // the feature whose dashboard is shown

  function columnsOfList() {
    const notes = Object.values(board.notes), theirs = board.baseline ? visible(board.baseline.name) : "the baseline";
    const some = (key, made) => board.columns[key] ? [{key, value: row => column(key, row), ...made}] : [];
    const cosines = (key, made) => some(key, {value: row => cosine(key, row), say: value => value.toFixed(3), ...made});
    const noted = (key, place, made) => notes.some(one => one[place] !== null && one[place].length !== 0)
      ? [{key, words: true, value: row => note(featureAt(row)) ? made.of(note(featureAt(row))[place]) : "", ...made}]
      : [];
    const tokens = {key: "strongest", title: "strongest on", width: 176, words: true, rank: peakRanks(),
      chips: strongest, value: row => strongest(row).join("  "), about: "the token on which it is largest; where there "
        + "is a dashboard then those at the peaks of its strongest contexts, the most frequent first"};
    const below = board.baseline?.new?.threshold;
    const limit = below ? `; new, as the comparison counts, are those below ${below}` : "";
    const columns = [{key: "feature", title: "feature", width: 100, value: featureAt, say: String,
      about: "its number; one without a dashboard is gray"},
    ...board.columns.peak || notes.length ? [tokens] : [],
    ...noted("explanation", 3, {title: "explanation", width: 280, of: text => text || "",
      about: "what a language model says it fires on (autointerp)"}),
    ...noted("score", 4, {title: "score", width: 90, words: false, down: true, of: score => score,
      value: row => note(featureAt(row))?.[4] ?? null,
      about: "how often a language model told by the explanation where it fires"}),
    ...some("density", {title: "density", width: 106, down: true, say: shares(),
      about: "share of the tokens on which it fires"}),
    ...some("max", {title: "max", width: 80, down: true, say: alike(board.columns.max),
      about: "the largest activation"}),
    ...cosines("cosine", {title: "cosine to baseline", width: 186,
      about: `cosine of its decoder row with the one of ${theirs} that is most like it${limit}`}),
    ...some("nearest", {title: "its nearest", width: 122, say: String,
      about: `the feature of ${theirs} that is most like it`}),
    ...noted("why", 0, {title: "chosen as", width: 160, rank: dashboardRanks(), of: why => why.join(", "),
      value: row => has(featureAt(row)) ? note(featureAt(row))[0].join(", ") : "",
      about: "why it has a dashboard; the gray ones have none"}),
    ...noted("classes", 1, {title: "probe classes", width: 300, of: classes, titles: row => classTitles(featureAt(row)),
      about: "what sparse probes with few features read off it (sparse_probing, sae_probes)"}),
    ...noted("letters", 2, {title: "letters", width: 96, of: letters => letters.join(", "),
      about: "first letters of words whose probe it serves (absorption)"}),
    ...cosines("own_cosine", {title: "own nearest", width: 134, down: true,
      about: "the largest cosine of its decoder row with that of another feature here"}),
    ...cosines("encoder_cosine", {title: "encoder", width: 106, about: "cosine of its encoder with its decoder row"})];
    return columns.map(one => ({say: number, ...one}));
  }

  // shares as percentages with so many places that a single token shows
  function shares() {
    const places = board.text ? Math.max(1, Math.ceil(Math.log10(board.text.tokens)) - 2) : 3;
    return share => share ? `${(100 * share).toFixed(places)}%` : "0%";
  }

  // numbers of a column with the same places: three digits of the largest, and one place at least
  function alike(values) {
    let most = 0;
    for (const value of values) most = Math.max(most, Math.abs(value ?? 0));
    const places = most ? Math.max(1, 2 - Math.floor(Math.log10(most))) : 0;
    return most < 1e4 && places < 6 ? value => value.toFixed(places) : number;
  }

  const classTitles = feature => (note(feature)?.[1] ?? []).map(place => visible(board.classes[place][0])).join(", ");

  // row => its place by the alphabet of peaks, by dashboards; null: none
  function peakRanks() {
    if (!board.columns.peak) return null;
    const texts = board.vocab.map(token => short(token).toLowerCase());
    const rank = new Uint32Array(texts.length);
    [...texts.keys()].sort((a, b) => texts[a] < texts[b] ? -1 : Number(texts[a] > texts[b]))
      .forEach((token, place) => { rank[token] = place; });
    return row => column("peak", row) < 0 ? null : rank[column("peak", row)];
  }

  function dashboardRanks() {
    const place = new Map(list.best.map((row, i) => [row, i]));
    return row => place.get(row) ?? null;
  }

  function keys(of) {  // of all rows a number to sort by, NaN where there is nothing
    if (of.keys) return of.keys;
    of.keys = new Float64Array(size).fill(NaN);
    if (of.rank) {
      for (let row = 0; row < size; row++) of.keys[row] = of.rank(row) ?? NaN;
    } else if (of.words) {
      const told = [];
      for (const feature of Object.keys(board.notes)) {
        const row = rowAt(Number(feature));
        if (row >= 0 && of.value(row)) told.push([of.value(row), row]);
      }
      const order = [...new Set(told.map(([text]) => text))].sort();
      const rank = new Map(order.map((text, i) => [text, i]));
      told.forEach(([text, row]) => { of.keys[row] = rank.get(text); });
    } else {
      for (let row = 0; row < size; row++) of.keys[row] = of.value(row) ?? NaN;
    }
    return of.keys;
  }

  // the best hits first, of equally good ones those with dashboards, then by their number
  function byNeed(rows) {
    const all = new Uint32Array(rows.length);
    let to = 0;
    for (let level = 1; level <= LEVELS; level++) {
      const take = row => { if (list.level[row] === level) all[to++] = row; };
      list.best.forEach(take);
      rows.forEach(row => { if (!has(featureAt(row))) take(row); });
    }
    return all;
  }

  // rows by a column, those without a value last, equal ones by their number
  function sorted(rows) {
    if (!list.sort) return byNeed(rows);
    const {key, down} = list.sort;
    const by = keys(list.columns.find(one => one.key === key)), sign = down ? -1 : 1;
    const filled = rows.filter(row => !Number.isNaN(by[row]));
    filled.sort((a, b) => sign * (by[a] - by[b]) || a - b);
    const all = new Uint32Array(rows.length);
    all.set(filled);
    all.set(rows.filter(row => Number.isNaN(by[row])), filled.length);
    return all;
  }

  // the features that the search finds; null: all
  let index = null;  // of each feature with a dashboard what of its tokens can be searched

  function indexed() {
    if (index) return index;
    index = new Map();
    for (const name of lines.keys()) {
      if (name[0] === "b") continue;
      const one = dashboard(name), fired = new Set();
      for (const [, , , contexts] of one.groups)
        for (const [tokens, values] of contexts) values.forEach(([place]) => fired.add(tokens[place]));
      const promoted = one.logits ? [...one.logits.top, ...one.logits.bottom].map(([token]) => plainToken(token)) : [];
      index.set(Number(name), {fired, promoted});
    }
    return index;
  }
  const plainToken = text => text.trim().toLowerCase() || visible(text);

  // {feature: how good a hit, 1 the best}, and whether nothing but the text of contexts has it; null: all are
  function found(query, where) {
    const text = query.trim().toLowerCase();
    if (!text) return null;
    const hits = new Map(), by = new Map();  // by: a token that was found, where the list does not show it
    const hit = (feature, level, token) => {
      hits.set(feature, Math.min(level, hits.get(feature) ?? LEVELS));
      if (token !== undefined) by.set(feature, token);
    };
    if (where === "any" && /^#?\d+$/.test(text)) {
      const digits = text.replace("#", "");
      for (let row = 0; row < size; row++)
        if (String(featureAt(row)).startsWith(digits)) hit(featureAt(row), String(featureAt(row)) === digits ? 1 : 2);
    }
    if (where === "any" || where === "words") {
      for (const [feature, [, places, letters, explanation]] of Object.entries(board.notes)) {
        const said = [...places.flatMap(place => board.classes[place]), explanation || ""].join("\n").toLowerCase();
        if (said.includes(text) || letters.includes(text)) hit(Number(feature), 2);
      }
    }
    if (where === "any" || where === "tokens") byToken(text, hit);
    const last = where === "any" && !hits.size;
    if (where === "contexts" || last) {
      for (const feature of indexed().keys()) {
        const texts = dashboard(feature).groups.flatMap(group => group[3]);
        const said = ([tokens]) => tokens.map(token => board.vocab[token]).join("").toLowerCase().includes(text);
        if (texts.some(said)) hit(feature, 2);
      }
    }
    return {hits, by, last};
  }

  function byToken(text, hit) {
    const same = token => token === text || text.length > 2 && token.startsWith(text);
    const tokens = new Set();
    board.vocab.forEach((token, place) => { if (same(plainToken(token))) tokens.add(place); });
    for (let row = 0; board.columns.peak && row < size; row++)
      if (tokens.has(column("peak", row))) hit(featureAt(row), 2);
    for (const [feature, {fired, promoted}] of indexed()) {
      if (note(feature)[5].some(token => same(plainToken(token)))) hit(feature, 2);
      else if (promoted.some(same)) hit(feature, 3, `promotes ${promoted.find(same)}`);
      else {
        const token = [...tokens].find(one => fired.has(one));
        if (token !== undefined) hit(feature, 4, `fires on ${short(board.vocab[token])}`);
      }
    }
  }

  // what a search looks through, for it is not all of all features
  function scope(where) {
    if (board.text === null) return "";
    const all = board.rows ? `the ${comma(size)} features listed` : `all ${comma(size)} features`;
    const some = `the ${comma(list.best.length)} with a dashboard`;
    const peak = board.columns.peak ? " and strongest token" : "";
    return {any: `A search covers number${peak} of ${all}; explanation, classes, other tokens and contexts of ${some}.`,
      words: `A search covers explanation, classes and letters of ${some}.`,
      tokens: (peak ? `A search covers the strongest token of ${all}; ` : "A search covers ")
        + `all tokens that ${some} fire on or promote.`,
      contexts: `A search covers the text of all contexts of ${some}.`}[where];
  }

  function choose() {  // which rows are shown, in which order
    const where = get("where").value, search = found(get("query").value, where);
    const checked = name => get("only-" + name)?.checked;
    const why = get("why")?.value;
    const rows = [];
    list.level = new Uint8Array(size);
    list.by = search ? search.by : new Map();
    for (let row = 0; row < size; row++) {
      const feature = featureAt(row), level = search ? search.hits.get(feature) : 1;
      if (level === undefined) continue;
      if (checked("has") && !has(feature)) continue;
      if (checked("new") && !column("new", row)) continue;
      if (checked("dead") && fires(row)) continue;
      if (why && !note(feature)?.[0].includes(why)) continue;
      list.level[row] = level;
      rows.push(row);
    }
    list.shown = sorted(Uint32Array.from(rows));
    list.at = 0;
    list.said = rows.length ? `${comma(rows.length)} of ${comma(board.d_sae)} features` : "no feature is like that";
    if (rows.length && search?.last) list.said += ", by the text of contexts alone";
    get("scope").textContent = scope(where);
    list.grid.setAttribute("aria-rowcount", rows.length + 1);
    list.body.style.height = rows.length * ROW + "px";
    list.grid.scrollTop = 0;
    tellOrder();
    again();
  }

  function tellOrder() {
    const first = get("query").value.trim() ? "the best hits first" : "those with a dashboard first";
    const order = list.sort ? `by ${list.columns.find(one => one.key === list.sort.key).title}` : first;
    get("found").textContent = list.shown.length ? `${list.said}, ${order}.` : `${list.said}.`;
  }

  // after a search: what is shown below is a hit, if there is one
  function follows() {
    const {shown, level} = list, row = rowAt(opened);
    const number = get("where").value === "any" ? exact() : null;
    if (get("at")) get("at").textContent = amongShown(opened);
    if (!shown.length || number === opened || number === null && row >= 0 && level[row]) return;
    const first = number ?? featureAt(shown.find(one => has(featureAt(one))) ?? shown[0]);
    history.replaceState(null, "", "#" + first);
    open(first, false);
  }

  function again() {  // all rows anew
    list.rows.forEach(row => row.remove());
    list.rows.clear();
    paint();
  }

  function line(place) {
    const row = list.shown[place], feature = featureAt(row);
    const made = el("div", {role: "row", id: "row-" + place, "aria-rowindex": place + 2});
    made.style.top = place * ROW + "px";
    made.style.gridTemplateColumns = list.template;
    made.dataset.feature = feature;
    if (feature === opened) made.setAttribute("aria-selected", "true");
    if (!has(feature)) made.classList.add("bare");
    for (const one of list.columns) {
      const value = one.value(row);
      const cell = el("span", {role: "gridcell", class: side(one)});
      if (one.key === "feature") cell.append(el("a", {href: "#" + feature, tabindex: -1, text: feature}));
      else if (one.chips && list.by.has(feature)) cell.append(el("mark", {text: visible(list.by.get(feature))}));
      else if (one.chips) cell.append(...one.chips(row).map(text => el("code", {text})));
      else if (one.words) cell.textContent = visible(value);
      else if (value !== null) cell.textContent = one.say(value);
      if (one.words && value) cell.title = one.titles ? one.titles(row) : visible(value);
      made.append(cell);
    }
    return made;
  }

  // the rows that can be seen, and some beside them; no others are there
  function paint() {
    const {grid, body, rows, shown} = list;
    const first = Math.max(0, Math.floor(grid.scrollTop / ROW) - AHEAD);
    const last = Math.min(shown.length, Math.ceil((grid.scrollTop + grid.clientHeight) / ROW) + AHEAD);
    rows.forEach((row, place) => {
      if (place >= first && place < last) return;
      row.remove();
      rows.delete(place);
    });
    for (let place = first; place < last; place++) {
      if (rows.has(place)) continue;
      rows.set(place, line(place));
      body.append(rows.get(place));
    }
    rows.forEach((row, place) => row.classList.toggle("at", place === list.at));
    if (rows.has(list.at)) grid.setAttribute("aria-activedescendant", "row-" + list.at);
    else grid.removeAttribute("aria-activedescendant");
  }

  function moveTo(place) {
    const {grid, shown} = list;
    if (!shown.length) return;
    list.at = Math.min(shown.length - 1, Math.max(0, place));
    const top = list.at * ROW, room = grid.clientHeight - ROW - 2;  // under the head
    if (top < grid.scrollTop) grid.scrollTop = top;
    if (top + ROW > grid.scrollTop + room) grid.scrollTop = top + ROW - room;
    paint();
  }

  // the useful direction, then the other, then the order of before
  function sortBy(key) {
    const first = Boolean(list.columns.find(one => one.key === key).down);
    if (list.sort?.key !== key) list.sort = {key, down: first};
    else list.sort = list.sort.down === first ? {key, down: !first} : null;
    list.heads.forEach((head, name) => {
      if (name === list.sort?.key) head.setAttribute("aria-sort", list.sort.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    list.shown = sorted(list.shown.sort());
    list.at = 0;
    list.grid.scrollTop = 0;
    tellOrder();
    again();
  }

  function makeList() {
    list.best = board.order.filter(has).map(rowAt).filter(row => row >= 0);
    list.columns = columnsOfList();
    list.template = list.columns.map(one => one.width + "px").join(" ");
    list.heads = new Map();
    const head = el("div", {role: "row", "aria-rowindex": 1});
    head.style.gridTemplateColumns = list.template;
    for (const one of list.columns) {
      const button = el("button", {type: "button", text: one.title, title: one.about,
        on: {click: () => sortBy(one.key)}});
      const cell = el("span", {role: "columnheader", class: side(one)},
        button);
      list.heads.set(one.key, cell);
      head.append(cell);
    }
    list.body = el("div", {role: "rowgroup", class: "body"});
    list.grid = el("div", {role: "grid", tabindex: 0, class: "grid", "aria-label": "all features",
      "aria-colcount": list.columns.length}, el("div", {role: "rowgroup", class: "head"}, head), list.body);
    let due = false;
    list.grid.addEventListener("scroll", () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => { due = false; paint(); });
    }, {passive: true});
    list.body.addEventListener("click", event => {
      const row = event.target.closest("[role=row]");
      if (!row) return;
      list.at = Number(row.getAttribute("aria-rowindex")) - 2;
      if (!event.target.closest("a")) go(Number(row.dataset.feature));
    });
    list.grid.addEventListener("keydown", event => {
      if (event.target !== list.grid || event.ctrlKey || event.altKey || event.metaKey) return;
      const page = Math.max(1, Math.floor(list.grid.clientHeight / ROW) - 2);
      const to = {ArrowDown: list.at + 1, ArrowUp: list.at - 1, PageDown: list.at + page, PageUp: list.at - page,
        Home: 0, End: list.shown.length - 1}[event.key];
      if (to !== undefined) moveTo(to);
      else if (event.key === "Enter" && list.shown.length) go(featureAt(list.shown[list.at]));
      else return;
      event.preventDefault();
    });
    const columns = el("details", {class: "keys"}, el("summary", {text: "what the columns say"}),
      facts(list.columns.map(one => [one.title, one.about])));
    get("list").replaceChildren(list.grid, columns);
    let waiting = 0;
    const anew = () => {
      choose();
      follows();
    };
    get("query").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(anew, 120);
    });
    get("query").addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== "ArrowDown") return;
      event.preventDefault();
      clearTimeout(waiting);
      anew();
      if (event.key === "ArrowDown") list.grid.focus();
      else if (list.shown.length) go(exact() ?? featureAt(list.shown[0]));
    });
    for (const id of ["where", "why", "only-has", "only-new", "only-dead"]) get(id)?.addEventListener("change", anew);
    choose();
  }

  function exact() {  // the feature whose number is searched for, if it is shown
    const wanted = Number(get("query").value.trim().replace("#", "") || NaN);
    return Number.isInteger(wanted) && rowAt(wanted) >= 0 && list.level[rowAt(wanted)] ? wanted : null;
  }

  // ---------------------------------------------------------------------------------------------- tokens

  const told = new WeakMap();  // token's element: () => what is said of it

  function token(text, value, max, say, peak = false) {
    const made = el("span", {class: "t" + (value ? ` on ${value < 0 ? "neg" : "pos"}` : "") + (peak ? " peak" : ""),
      tabindex: -1, text: visible(text)});
    const share = Math.abs(value) / (Math.abs(max) || 1);
    if (value) made.style.setProperty("--a", Math.min(1, Math.max(.08, share)).toFixed(3));
    if (text.includes("\n")) made.append(el("span", {class: "lb", "aria-hidden": "true", text: "\n"}));
    told.set(made, say);
    return made;
  }

  function tell(target) {
    const tip = get("tip");
    document.querySelectorAll("[aria-describedby=tip]").forEach(one => one.removeAttribute("aria-describedby"));
    const one = target instanceof Element ? target.closest(".t") : null;
    tip.hidden = !one;
    if (!one) return;
    tip.textContent = told.get(one)();
    one.setAttribute("aria-describedby", "tip");
    const box = one.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 5 : box.bottom + 5) + "px";
  }

  // one token of a group can be reached by Tab, the others by arrows
  function reachable(tokens, first) {
    if (tokens[first]) tokens[first].tabIndex = 0;
    tokens.forEach((one, place) => one.addEventListener("keydown", event => {
      const to = {ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tokens.length - 1}[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      tokens.forEach(other => { other.tabIndex = -1; });
      tokens[to].tabIndex = 0;
      tokens[to].focus();
    }));
  }

  // ---------------------------------------------------------------------------------------------- a dashboard

  const look = {whole: false, breaks: false};

  function context([tokens, values, peak, row, before, after], max) {
    const at = new Map(values);
    const made = tokens.map((place, i) => {
      const text = board.vocab[place], value = at.get(i);
      const said = value ? `activation ${number(value)}` : "does not fire";
      const say = () => `“${visible(text)}”  ${said}\nposition ${i + 1} of ${tokens.length}, row ${row}`;
      return token(text, value, max, say, i === peak);
    });
    reachable(made, peak);
    const dots = cut => cut ? "…" : "";
    const line = el("div", {class: "line"}, el("span", {class: "before"}, dots(before), ...made.slice(0, peak)),
      ...made.slice(peak, peak + 1), el("span", {class: "after"}, ...made.slice(peak + 1), dots(after)));
    return el("div", {class: "ctx"}, el("span", {class: "v", text: number(at.get(peak) ?? 0)}), line);
  }

  const TOP = 5;
  function groups(one) {
    const all = [];
    for (const [name, from, to, contexts] of one.groups) {
      const made = these => these.map(each => context(each, one.max));
      if (name === "top") {
        const heading = el("h4", {text: `${contexts.length} strongest contexts`});
        const part = el("div", {}, heading, ...made(contexts.slice(0, TOP)));
        if (contexts.length > TOP) {
          const more = el("button", {type: "button", class: "plainbutton", text: `${contexts.length - TOP} more`});
          more.addEventListener("click", () => {
            const rest = made(contexts.slice(TOP));
            more.replaceWith(...rest);
            rest[0].querySelector("[tabindex='0']").focus();
          });
          part.append(more);
        }
        all.push(part);
        continue;
      }
      const fold = el("details", {}, el("summary", {text: `${name}: ${number(from)} to ${number(to)}`}));
      fold.addEventListener("toggle", () => { if (fold.childElementCount === 1) fold.append(...made(contexts)); });
      all.push(fold);
    }
    return all;
  }

  function edges({edges: ends, counts}) {
    if (ends.length !== 2) return ends;
    return Array.from({length: counts.length + 1}, (_, i) => ends[0] + (ends[1] - ends[0]) * i / counts.length);
  }

  // `other`: the one that it stands beside, which has the same scale
  function histogram(title, unit, bars, counted, name, other) {
    if (!bars.counts.some(Boolean)) return [];
    const filled = [...bars.counts, ...other?.counts ?? []].filter(Boolean);
    const log = Math.max(...filled) > SPREAD * Math.min(...filled);
    const label = log ? `${counted} (log)` : counted;
    const spec = {title, kind: "bars", x: {label: unit, log: false}, y: {label, log},
      series: [{name, role: name, colour: Number(name === "baseline"), edges: edges(bars), counts: bars.counts}]};
    return [[el("div"), spec]];
  }

  function logits({top, bottom}) {
    const side = (title, pairs) => el("table", {}, el("tr", {}, el("th", {class: "l", text: title}),
      el("th", {text: "logit"})), ...pairs.map(([text, value]) => el("tr", {}, el("td", {class: "l"},
      el("code", {text: visible(text), title: visible(text)})), el("td", {text: number(value)}))));
    return el("div", {class: "words"}, side("promotes", top), side("suppresses", bottom));
  }

  function shown(title, figures, one, name, charts, other) {
    const part = el("div", {}, title, el("p", {class: "mut", text: figures}));
    const drawn = [...histogram("Activations", "activation", one.histogram, "tokens", name, other?.histogram),
      ...one.logits ? histogram("Logits", "logit", one.logits, "vocabulary", name, other?.logits) : []];
    part.append(el("div", {class: "hist"}, ...drawn.map(([place]) => place)));
    charts.push(...drawn);
    if (one.logits) part.append(logits(one.logits));
    part.append(...groups(one));
    return part;
  }

  // [[feature, value]] as links to features of the run; `made` makes them something else
  const here = feature => el("a", {href: "#" + feature, text: feature});
  function links(pairs, made = here, say = words) {
    return el("dd", {class: "links"}, ...pairs.map(([feature, value]) => {
      const said = [...visible(say(feature))].slice(0, 32).join("");
      const more = said ? el("span", {class: "mut", text: ` ${said}`}) : "";
      return el("span", {}, made(feature), ` ${number(value)}`, more);
    }));
  }

  // features of the baseline: those with a dashboard as buttons that show it beside, `shown` first
  function theirs(pairs, shown, show) {
    const all = links(pairs, feature => {
      if (!lines.has("b" + feature)) return document.createTextNode(feature);
      const press = () => {
        all.querySelectorAll("button").forEach(other => {
          other.setAttribute("aria-pressed", String(other === button));
        });
        show(feature);
      };
      const button = el("button", {type: "button", class: "plainbutton", text: feature, on: {click: press},
        "aria-pressed": String(String(feature) === String(shown)), title: "show the baseline’s feature"});
      return button;
    }, () => "");
    return all;
  }

  // [[term, what]] without those of which nothing is known
  function facts(pairs) {
    const said = what => what instanceof Element ? what.textContent : what;
    const told = pairs.filter(([, what]) => said(what));
    return el("dl", {class: "facts"}, ...told.flatMap(([term, what]) =>
      [el("dt", {text: term}), what instanceof Element ? what : el("dd", {text: what})]));
  }

  const chips = texts => el("dd", {class: "links"}, ...texts.map(text => el("code", {text})));
  const TERMS = {own: "nearest here (cosine)", theirs: "nearest in the baseline (cosine)"};

  // whether no feature of the baseline is like it, as the comparison counts
  function newness(row) {
    const {baseline} = board;
    if (!board.columns.new || row < 0 || !baseline?.new) return null;
    const told = column("new", row), limit = `a cosine of ${baseline.new.threshold}`;
    if (told === null) return "not counted: it fires nowhere in the text of the eval core, by which they are counted";
    if (told) return `yes: no feature of ${visible(baseline.name)} has ${limit} with it`;
    return `no: its nearest there has ${limit} or more`;
  }

  // what is known of any feature; of one with a dashboard the rest is there
  function figures(row, show) {
    const known = (name, say) => column(name, row) === null ? null : say(column(name, row));
    const own = column("own_nearest", row), nearest = column("nearest", row);
    return [["density", known("density", rate)], ["largest activation", known("max", number)],
      [TERMS.own, own === null || own < 0 ? null : links([[own, cosine("own_cosine", row)]])],
      [TERMS.theirs, nearest === null ? null : theirs([[nearest, cosine("cosine", row)]], null, show)]];
  }

  function about(feature, one, row, beside, show) {
    const [why, places, letters, explanation, score] = note(feature) || [[], [], [], null, null, []];
    const scored = score === null ? "" : ` (score ${number(score)})`;
    const named = el("dd", {}, ...places.flatMap((place, i) => [i ? ", " : "",
      el("span", {text: visible(className(place)), title: visible(board.classes[place][0])})]));
    const near = one ? [[TERMS.own, links(one.own)], ["fires together with (φ)", links(one.cofiring)],
      [TERMS.theirs, theirs(one.theirs, beside, show)]] : figures(row, show);
    return facts([["explanation", explanation === null ? null : visible(explanation) + scored],
      ["strongest on", chips(strongest(row))], ["probe classes", named], ["first letters", letters.join(", ")],
      ["chosen as", why.join(", ")], ["new", newness(row)], ...near,
      ["encoder with decoder", column("encoder_cosine", row) === null ? null
        : `cosine ${number(cosine("encoder_cosine", row))}`]]);
  }

  // the baseline's feature `nearest` as it stands beside the run's
  function beside(nearest, near, charts, own = null) {
    const {baseline} = board;
    const named = ` ${visible(baseline.name)}${baseline.l0 === null ? "" : `, L0 ${number(baseline.l0)}`}`;
    const heading = el("h3", {text: `Baseline: feature ${nearest ?? "–"}`}, el("span", {class: "mut", text: named}));
    const other = nearest === null ? null : dashboard("b" + nearest);
    const like = near === null ? "" : `cosine ${number(near)}`;
    if (other) {
      const said = `${like}${like ? " · " : ""}density ${rate(other.density)} · max ${number(other.max)}`;
      return shown(heading, said, other, "baseline", charts, own);
    }
    const reason = baseline.problem ? visible(baseline.problem) : "There is no dashboard of it.";
    return el("div", {}, heading, el("p", {class: "mut", text: like}), el("p", {text: reason}));
  }

  const drawAll = charts => charts.forEach(([at, spec]) => Pages.chart(at, spec));

  // the run's feature and the baseline's beside it
  function pair(feature, one, row) {
    const charts = [], first = one.beside ?? one.theirs[0]?.[0] ?? column("nearest", row);
    const near = board.baseline === null || first === null ? null : dashboard("b" + first);
    const own = shown(el("h3", {text: `This run: feature ${feature}`}),
      `density ${rate(one.density)} · max ${number(one.max)}`, one, "run", charts, near);
    if (board.baseline === null) return [about(feature, one, row), el("div", {class: "pair alone"}, own), charts];
    const cosines = new Map(one.theirs.map(([name, value]) => [String(name), value]));
    const like = nearest => cosines.get(String(nearest)) ?? (nearest === first ? cosine("cosine", row) : null);
    const both = el("div", {class: "pair"}, own, beside(first, like(first), charts, one));
    const show = nearest => {
      const drawn = [], part = beside(nearest, like(nearest), drawn, one);
      both.lastChild.replaceWith(part);
      drawAll(drawn);
      if (part.getBoundingClientRect().top > innerHeight) part.scrollIntoView({block: "start"});
    };
    return [about(feature, one, row, first, show), both, charts];
  }

  // features with dashboards that name this one as near or firing together
  function mentions(feature) {
    const named = [];
    for (const other of indexed().keys()) {
      const {own, cofiring} = dashboard(other);
      const near = own.find(([name]) => name === feature), fired = cofiring.find(([name]) => name === feature);
      if (near) named.push([other, near[1], "cosine"]);
      else if (fired) named.push([other, fired[1], "φ"]);
    }
    named.sort((a, b) => b[1] - a[1]);
    return named.slice(0, 8);
  }

  // why there is no dashboard
  function reason(feature, row) {
    const {text} = board;
    if (row < 0 && feature >= board.d_sae) return `There is no feature ${feature}: they end at ${board.d_sae - 1}.`;
    if (row < 0) return "It is not in this page’s list, which would be too large with it.";
    if (text === null) return "The model reads no text, so that there are no dashboards.";
    if (note(feature)) return "Its dashboard was left out to keep this page under 3 MB.";
    if (!fires(row)) return `It never fired on the ${comma(text.tokens)} tokens looked at.`;
    const counts = new Map();
    Object.values(board.notes).forEach(([why]) => why.forEach(one => counts.set(one, (counts.get(one) ?? 0) + 1)));
    const chosen = [...counts].map(([why, n]) => `${n} ${why}`).join(", ");
    const many = comma(Object.keys(board.notes).length);
    return `It was not among the ${many} features chosen for one${chosen ? ` (${chosen})` : ""}.`;
  }

  function without(feature, row) {
    const near = row < 0 ? [] : mentions(feature);
    const dd = el("dd", {class: "links"}, ...near.map(([other, value, sign]) => el("span", {}, here(other),
      el("span", {class: "mut", text: ` ${sign} ${number(value)}`}))));
    const parts = [el("p", {text: `No dashboard. ${reason(feature, row)}`})];
    if (row < 0) return parts;
    const place = el("div", {class: "pair alone"});
    const show = nearest => {
      const charts = [];
      place.replaceChildren(beside(nearest, cosine("cosine", row), charts));
      drawAll(charts);
    };
    return [...parts, about(feature, null, row, null, show), facts([["dashboards that name it", dd]]), place];
  }

  // those with dashboards in the list's order
  function neighbours(feature) {
    const all = [];
    for (const row of list.shown) if (has(featureAt(row))) all.push(featureAt(row));
    return [all, all.indexOf(feature)];
  }

  function step(by) {
    const [all, at] = neighbours(opened);
    if (!all.length) return;
    const to = at < 0 ? 0 : (at + by + all.length) % all.length;
    history.replaceState(null, "", "#" + all[to]);
    const inside = get("one").contains(document.activeElement);
    open(all[to]);
    if (inside) get("which").focus({preventScroll: true});  // what had it is gone
  }

  function amongShown(feature) {
    const [all, at] = neighbours(feature);
    if (at >= 0) return `${comma(at + 1)} of ${comma(all.length)} dashboards in the list`;
    return has(feature) ? "not in the list as it is now" : "";
  }

  function bar(feature, one) {
    const heading = el("h2", {id: "which", tabindex: -1, text: `Feature ${feature}`});
    const button = (text, by, name) => el("button", {type: "button", class: "plainbutton", text, "aria-label": name,
      on: {click: () => { step(by); get("one").querySelector(`[aria-label="${name}"]`)?.focus(); }}});
    const turn = el("span", {}, button("‹", -1, "previous dashboard"), " ", button("›", 1, "next dashboard"));
    const parts = [heading, turn,
      el("span", {class: "mut", role: "status", id: "at", text: amongShown(feature)})];
    if (!one) return el("div", {class: "bar"}, ...parts);
    const signs = board.either_sign ? [el("span", {class: "mut"}, "shaded ",
      el("span", {class: "on pos full", text: "where positive"}), " ",
      el("span", {class: "on neg full", text: "where negative"}))] : [];
    const box = (text, name) => {
      const input = el("input", {type: "checkbox"});
      input.checked = look[name];
      input.dataset.look = name;
      input.addEventListener("change", () => {
        look[name] = input.checked;
        if (name === "breaks" && look.breaks) look.whole = true;
        if (name === "whole" && !look.whole) look.breaks = false;
        shape();
      });
      return el("label", {}, input, " " + text);
    };
    return el("div", {class: "bar"}, ...parts, box("whole contexts", "whole"), box("line breaks", "breaks"), ...signs);
  }

  function shape() {
    for (const [name, on] of Object.entries(look)) {
      get("one").classList.toggle(name, on);
      get("one").querySelectorAll(`[data-look=${name}]`).forEach(input => { input.checked = on; });
    }
  }

  function open(feature, reveal = true) {  // reveal: the list scrolls to it
    const before = opened;
    opened = feature;
    list.rows.forEach(row => {
      if (Number(row.dataset.feature) === feature) row.setAttribute("aria-selected", "true");
      else if (Number(row.dataset.feature) === before) row.removeAttribute("aria-selected");
    });
    const row = rowAt(feature), place = row < 0 ? -1 : list.shown.indexOf(row);
    if (place >= 0 && reveal) moveTo(place);
    const one = row < 0 ? null : dashboard(feature);
    const [facts, both, charts] = one ? pair(feature, one, row) : [];
    get("one").replaceChildren(bar(feature, one), ...one ? [facts, both] : without(feature, row));
    shape();
    tell(null);
    if (one) drawAll(charts);
  }

  // ---------------------------------------------------------------------------------------------- passages

  function passage(one) {
    const sides = one.baseline ? ["run", "baseline"] : ["run"];
    const names = {run: "this run", baseline: "baseline"};
    const view = {side: "run", feature: null, at: null};
    const flow = el("div", {class: "flow"}), panel = el("div"), head = el("div", {class: "bar"});
    const values = () => one[view.side].map(told => {
      const [, value] = (view.feature === null ? told[0] : told.find(([feature]) => feature === view.feature)) ?? [];
      return value ?? 0;
    });

    function press(text, attributes, click) {
      return el("button", {type: "button", class: "plainbutton", text, on: {click}, ...attributes});
    }

    function controls() {
      const buttons = sides.length < 2 ? [] : sides.map(name =>
        press(names[name], {"aria-pressed": String(view.side === name)}, () => {
          show(name, null);
          head.querySelectorAll("[aria-pressed]")[sides.indexOf(name)].focus();
        }));
      const what = view.feature === null ? "shaded by the strongest feature of each token"
        : `shaded by feature ${view.feature} of ${names[view.side]}, where it is among the five strongest`;
      const back = view.feature === null ? [] : [press("by the strongest", {}, () => {
        show(view.side, null);
        flow.querySelector("[tabindex='0']").focus();
      })];
      const title = el("h3", {text: visible(one.title)});
      head.replaceChildren(title, ...buttons, el("span", {class: "mut", text: what}), ...back);
    }

    function show(side, feature) {
      Object.assign(view, {side, feature});
      controls();
      const all = values(), max = Math.max(...all.map(Math.abs));
      const made = one.tokens.map((text, i) => token(text, all[i], max, () => {
        const strongest = one[view.side][i][0];
        const shown = view.feature === null ? strongest : [view.feature, all[i]];
        const said = shown && shown[1] ? `feature ${shown[0]}: ${number(shown[1])}` : "nothing fires";
        return `“${visible(text)}”  ${said}\nposition ${i + 1} of ${one.tokens.length}`;
      }));
      reachable(made, view.at ?? 0);
      made.forEach((each, i) => {
        each.addEventListener("focus", () => explain(i));
        each.addEventListener("mouseenter", () => explain(i));
      });
      flow.replaceChildren(...made);
    }

    function strongest(name, i) {
      const told = one[name][i].map(([feature, value]) => {
        const label = `${feature}: shade the passage by this feature of ${names[name]}`;
        const shade = press(feature, {"aria-label": label}, () => {
          show(name, feature);
          head.querySelector("button:last-child").focus();
        });
        const near = name === "run" ? feature : nearestHere(feature);
        const where = name === "run" ? "look" : `like ${near} here`;
        const link = near === undefined ? "" : el("a", {href: "#" + near, text: where});
        const said = name === "run" ? visible(words(feature)) : "";
        return el("p", {}, shade, el("span", {text: number(value)}), link, el("span", {class: "mut", text: said}));
      });
      const none = el("p", {class: "mut", text: "nothing fires"});
      return el("div", {}, el("h4", {text: names[name]}), ...told.length ? told : [none]);
    }

    function explain(i) {
      if (view.at === i) return;
      view.at = i;
      panel.replaceChildren(el("p", {}, el("code", {text: visible(one.tokens[i])}),
        el("span", {class: "mut", text: ` position ${i + 1} of ${one.tokens.length}, its strongest features`})),
      el("div", {class: "sides"}, ...sides.map(name => strongest(name, i))));
    }

    show("run", null);
    const first = one.run.findIndex(told => told.length);
    explain(Math.max(0, first));
    return el("div", {class: "passage"}, el("div", {}, head, flow), panel);
  }

  let reverse = null;  // {feature of the baseline: that of the run which is most like it}
  function nearestHere(theirs) {
    if (!reverse) {
      reverse = new Map();
      const best = new Map();
      for (let row = 0; row < size; row++) {
        const other = column("nearest", row), like = column("cosine", row);
        if (other === null || like === null || !fires(row) || like <= (best.get(other) ?? -Infinity)) continue;
        best.set(other, like);
        reverse.set(other, featureAt(row));
      }
    }
    return reverse.get(theirs);
  }

  // ---------------------------------------------------------------------------------------------- the page

  let arriving = false;  // by a link or Enter: the dashboard is then shown and focused

  function go(feature) {
    arriving = true;
    if (location.hash === "#" + feature) follow();
    else location.hash = "#" + feature;
  }

  function follow() {
    const asked = /^#(\d{1,9})$/.exec(location.hash);
    const start = list.best.length ? featureAt(list.best[0]) : undefined;
    const first = location.hash === "" || opened === null;  // a name that is no feature's leaves open what is
    if (asked) open(Number(asked[1]));
    else if (first && start !== undefined) open(start);
    else if (opened === null && size) open(featureAt(0));
    if (!arriving) return;
    arriving = false;
    get("which")?.focus({preventScroll: true});
    get("one").scrollIntoView({block: "start"});
  }

  function listen() {
    addEventListener("hashchange", () => {
      arriving = true;
      follow();
    });
    document.addEventListener("click", event => {
      const link = event.target instanceof Element ? event.target.closest("#app a[href^='#']") : null;
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      go(Number(link.getAttribute("href").slice(1)));
    });
    document.addEventListener("keydown", event => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key === "Escape") tell(null);
      // WCAG 2.1.4: keys of one letter act where the focus is on what they act on
      if (!(event.target instanceof Element && event.target.closest("#list, #one"))) return;
      if (event.key === "/") {
        event.preventDefault();
        get("query").focus();
      }
      if (event.key === "j") step(1);
      if (event.key === "k") step(-1);
    });
    get("app").addEventListener("mouseover", event => tell(event.target));
    get("app").addEventListener("mouseleave", () => tell(document.activeElement));
    get("app").addEventListener("focusin", event => tell(event.target));
    get("app").addEventListener("focusout", () => tell(null));
    addEventListener("scroll", () => tell(document.activeElement), {passive: true});
  }

  async function start() {
    const plain = get("plain-note");
    if (typeof DecompressionStream === "undefined") {
      plain.textContent = "This browser cannot unpack the page’s data, for it has no DecompressionStream; "
        + "a newer one shows all features.";
      return;
    }
    try {
      await unpack();
    } catch (error) {
      plain.textContent = `The page’s data is damaged: ${error.message}. `
        + "python -m runs.page.features writes it again.";
      return;
    }
    get("plain").hidden = true;
    get("app").hidden = false;
    makeList();
    board.passages.filter(one => one.tokens.length).forEach(one => get("passages").append(passage(one)));
    listen();
    arriving = location.hash !== "";
    follow();
  }

  // for tests: a promise of the page, and what the list shows
  return {ready: start(), shown: () => Array.from(list.shown, featureAt)};
})();
