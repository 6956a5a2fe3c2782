// Charts of a page: every figure.chart that holds a chart's data (runs/page/charts.py) becomes an interactive one.
"use strict";
const Pages = (() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const make = (tag, fields = {}) => Object.assign(document.createElement(tag), fields);
  function number(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e4 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }
  function tick(value) {
    for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= size) return number(value / size) + unit;
    }
    return number(value);
  }
  const shapes = {run: "circle", baseline: "rectRot", random: "triangle", seed: "circle", other: "rect"};
  const signs = {circle: "●", rectRot: "◆", triangle: "▲", rect: "■", dash: "–", line: "─"};
  const LETTERS = 56;  // of a name that hovering shows in a line
  const SMALL = 16;  // points of a series above which they are small,
  const MANY = 60;  // and a line is without them

  // one standard error to either side, where it is known
  const errorBars = {id: "errorBars", afterDatasetsDraw(chart) {
    const {ctx, scales} = chart;
    chart.data.datasets.forEach((set, i) => {
      if (!chart.isDatasetVisible(i) || !set.errors) return;
      ctx.save();
      ctx.strokeStyle = set.borderColor;
      ctx.globalAlpha = .6;
      ctx.beginPath();
      for (const point of set.data) {
        if (!point.e) continue;
        const x = scales.x.getPixelForValue(point.x);
        const low = point.y - point.e;
        const bottom = scales.y.type === "logarithmic" && low <= 0 ? scales.y.bottom : scales.y.getPixelForValue(low);
        ctx.moveTo(x, bottom);
        ctx.lineTo(x, scales.y.getPixelForValue(point.y + point.e));
      }
      ctx.stroke();
      ctx.restore();
    });
  }};

  // a relative address or a place in the page; never one with a scheme, and no other machine's
  function address(text) {
    if (!text) return null;
    return /^[a-z][a-z0-9+.-]*:|^[\\/]{2}/i.test(text.replace(/[\u0000-\u0020]/g, "")) ? null : text;
  }

  // eight that stand out in light and dark; of more series a ramp
  function colour(spec, i) {
    const {length} = spec.series;
    const own = spec.series[i].colour;
    if (own !== undefined) return css("--c" + own % 8);
    return length <= 8 ? css("--c" + i) : `hsl(${Math.round(300 * i / length)} 65% 50%)`;
  }

  // of data as a page holds it (charts.py, packed and _shared) a chart
  function unpacked(spec, places) {
    const series = spec.series.map(one => {
      if (one.ends) {
        const [first, last] = one.ends;
        const n = one.counts.length;
        return {...one, edges: Array.from({length: n + 1}, (_, i) => first + (last - first) * i / n)};
      }
      if (!one.values) return one;
      const points = one.values.flatMap((value, i) => {
        if (value === null) return [];
        const [x, label, href] = places[one.at][i];
        const [y, e] = Array.isArray(value) ? value : [value, 0];
        return [[x, y, e, label, href]];
      });
      return {...one, points: points.sort((a, b) => a[0] - b[0] || a[1] - b[1])};
    });
    return {...spec, series};
  }

  const shape = (spec, one) => spec.kind === "bars" ? "rect" : shapes[one.role] || "circle";

  function dataset(spec, one, i) {
    const line = colour(spec, i);
    if (spec.kind === "bars") {
      const half = spec.x.whole ? .5 : 0;  // a bar stands around its number
      const edges = one.edges.map(edge => edge - half);
      const middle = n => spec.x.log ? Math.sqrt(edges[n] * edges[n + 1]) : (edges[n] + edges[n + 1]) / 2;
      return {type: "bar", label: one.name, data: one.counts.map((y, n) => ({x: middle(n), y})), edges,
        backgroundColor: line.startsWith("#") ? line + "99" : line, borderColor: line, barThickness: "flex",
        barPercentage: 1, categoryPercentage: 1};
    }
    const many = one.points.length > MANY;
    const small = one.role === "seed" || one.points.length > SMALL;
    let radius = small ? 2 : 4;
    if (one.line && many) radius = 0;
    return {type: "line", label: one.name, data: one.points.map(([x, y, e, label, href]) => ({x, y, e, label, href})),
      errors: one.points.some(point => point[2]), showLine: Boolean(one.line), borderColor: line,
      order: one.role === "seed" ? 0 : 1, backgroundColor: line, borderWidth: 1.8,
      borderDash: one.role === "random" ? [6, 4] : [], pointStyle: mark(spec, one), clip: 8,
      pointRadius: radius, pointHoverRadius: 6, pointHitRadius: 6, ...apart(one)};
  }

  const mark = (spec, one) => one.parts ? "line" : one.mark || shape(spec, one);

  // a line with `parts` is thin, has no points, and joins those of one part alone
  function apart({parts}) {
    if (!parts) return {};
    const colour = ({p0DataIndex: a, p1DataIndex: b}) => parts[a] === parts[b] ? undefined : "transparent";
    return {segment: {borderColor: colour}, borderWidth: .7, pointStyle: "line", pointRadius: 0, pointHitRadius: 0,
      pointHoverRadius: 0};
  }

  // the ends of an axis: errors inside, some room around points, and bars from the first edge to the last
  function range(spec, axis) {
    if (spec.kind === "bars") {
      if (axis === "y") return spec.y.log ? {min: .5} : {beginAtZero: true};
      const half = spec.x.whole ? .5 : 0;
      const edges = spec.series.flatMap(one => one.edges.map(edge => edge - half)).filter(x => !spec.x.log || x > 0);
      return {min: Math.min(...edges), max: Math.max(...edges)};
    }
    let [least, most] = [Infinity, -Infinity];
    for (const one of spec.series) {
      for (const [x, y, e] of one.points) {
        const ends = axis === "x" ? [x, x] : [y - (e || 0), y + (e || 0)];
        for (const end of ends) {
          if (spec[axis].log && end <= 0) continue;
          least = Math.min(least, end);
          most = Math.max(most, end);
        }
      }
    }
    if (spec[axis].log) return {suggestedMin: least / 1.08, suggestedMax: most * 1.08};
    if (axis === "x" && least < most) return {min: least >= 0 && least < .3 * most ? 0 : least, max: most};
    if (least === 0 && most === 0) return {min: 0, suggestedMax: 1};
    const room = (most - least) * .04;
    return {suggestedMin: least >= 0 ? Math.max(least - room, 0) : least - room, suggestedMax: most + room};
  }

  // of a logarithmic axis 1, 2 and 5 times powers of ten, the powers alone where there are many, all where few
  function label(value, index, ticks) {
    if (this.options.whole && !Number.isInteger(value)) return undefined;
    if (this.type !== "logarithmic") return tick(value);
    const decades = Math.log10(this.max / this.min);
    const mantissa = value / 10 ** Math.floor(Math.log10(value) + 1e-9);
    const leading = Math.round(mantissa);
    if (Math.abs(mantissa - leading) > 1e-6) return undefined;
    let shown = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    if (decades > .6) shown = [1, 2, 5];
    if (decades > 3) shown = [1];
    return shown.includes(leading) ? tick(value) : undefined;
  }

  function scale(spec, axis) {
    const mut = css("--mut");
    const whole = Boolean(spec[axis].whole);
    return {type: spec[axis].log ? "logarithmic" : "linear", whole,
      title: {display: true, text: spec[axis].label, color: mut},
      grid: {color: css("--line"), display: axis === "y"}, border: {color: mut}, offset: false, ...range(spec, axis),
      stacked: spec.kind === "bars" && axis === "x",  // bars of several series lie over each other
      ticks: {color: mut, includeBounds: spec.kind === "bars" && !whole,
        ...(whole ? {precision: 0} : {}), maxTicksLimit: spec[axis].log ? 30 : 7,
        maxRotation: 0, autoSkipPadding: 8, callback: label}};
  }

  const cut = text => text.length > LETTERS ? text.slice(0, LETTERS - 1) + "…" : text;

  // from where to where a bar counts
  function interval(spec, edges, i) {
    if (!spec.x.whole) return `${number(edges[i])} to ${number(edges[i + 1])}`;
    const [first, last] = [edges[i] + .5, edges[i + 1] - .5];
    return first === last ? number(first) : `${number(first)} to ${number(last)}`;
  }

  function hover(spec) {
    return {title: items => items[0] && spec.kind !== "bars" ? cut(items[0].dataset.label) : "", label(item) {
      const {raw, dataset: {edges, label}, dataIndex} = item;
      if (edges) {
        const of = spec.series.length > 1 ? `${cut(label)}, ` : "";
        return `${of}${interval(spec, edges, dataIndex)}: ${tick(raw.y)}`;
      }
      const y = `${number(raw.y)}${raw.e ? " ± " + number(raw.e) : ""}`;
      const lines = [`${spec.y.label}: ${y}`, `${spec.x.label}: ${tick(raw.x)}`].map(cut);
      return raw.label ? [...raw.label.split("\n").map(cut), ...lines] : lines;
    }};
  }

  const drawn = new Map();  // canvas: [its chart, its data]

  function draw(canvas, spec) {
    drawn.get(canvas)?.[0].destroy();
    const few = spec.kind !== "bars";
    // Chart.js gives elements that share their options no data of their own
    const leads = ([first]) => first ? address(spec.series[first.datasetIndex].points?.[first.index][4]) : null;
    const chart = new Chart(canvas, {
      data: {datasets: spec.series.map((one, i) => dataset(spec, one, i))}, plugins: [errorBars],
      options: {animation: false, responsive: true, maintainAspectRatio: false, parsing: false, normalized: true,
        interaction: {mode: "nearest", intersect: few, axis: few ? "xy" : "x"},
        layout: {padding: {top: 6, right: 10}}, scales: {x: scale(spec, "x"), y: scale(spec, "y")},
        onHover: (event, found) => { canvas.style.cursor = leads(found) ? "pointer" : ""; },
        onClick: (event, found) => {
          const to = leads(found);
          if (to) location.assign(to);
        },
        plugins: {legend: {display: false}, tooltip: {callbacks: hover(spec), boxPadding: 4, caretPadding: 8}}}});
    canvas.setAttribute("role", "img");
    const axes = `${spec.y.label} against ${spec.x.label}`;
    canvas.setAttribute("aria-label", `${spec.title}: ${axes}; the numbers are in the table below`);
    drawn.set(canvas, [chart, spec]);
    return chart;
  }

  // the names of the series, each a switch
  function legend(canvas, spec) {
    const list = make("div", {className: "legend"});
    if (spec.series.length < 2) return list;
    spec.series.forEach((one, i) => {
      const button = make("button", {type: "button"});
      const sign = make("span", {textContent: signs[mark(spec, one)]});
      sign.setAttribute("aria-hidden", "true");
      sign.style.color = spec.series.length <= 8 ? `var(--c${(one.colour ?? i) % 8})` : colour(spec, i);
      button.setAttribute("aria-pressed", "true");
      button.append(sign, cut(one.name));
      button.addEventListener("click", () => {
        const [chart] = drawn.get(canvas);
        const shown = !chart.isDatasetVisible(i);
        button.setAttribute("aria-pressed", String(shown));
        chart.setDatasetVisibility(i, shown);
        chart.update();
      });
      list.append(button);
    });
    return list;
  }

  // the numbers of a chart, for a keyboard and for copying; made when they are asked for
  function numbers(spec) {
    const details = make("details", {className: "numbers"});
    details.append(make("summary", {textContent: "the numbers"}));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const table = make("table");
      const row = (cells, tag) => {
        const line = table.insertRow();
        cells.forEach((cell, i) => {
          const place = make(tag, {className: i ? "" : "l"});
          if (cell instanceof Node) place.append(cell);
          else place.textContent = cell;
          line.append(place);
        });
      };
      const bars = spec.kind === "bars";
      row(bars ? ["", "from", "to", spec.y.label] : ["", spec.x.label, spec.y.label, "standard error"], "th");
      for (const one of spec.series) {
        if (bars) {
          const last = spec.x.whole ? 1 : 0;
          one.counts.forEach((y, n) => row([one.name, number(one.edges[n]), number(one.edges[n + 1] - last), tick(y)],
                                           "td"));
          continue;
        }
        for (const [x, y, e, label, href] of one.points) {
          const name = label ? `${one.name}: ${label}` : one.name;
          const to = address(href);
          row([to ? make("a", {href: to, textContent: name}) : name, tick(x), number(y), e ? number(e) : ""], "td");
        }
      }
      const scroll = make("div", {className: "scroll", tabIndex: 0});
      scroll.setAttribute("role", "region");
      scroll.setAttribute("aria-label", `the numbers of ${spec.title}`);
      scroll.append(table);
      details.append(scroll);
    });
    return details;
  }

  // a chart in `place`, an element, in place of what it holds
  function chart(place, spec) {
    const plot = make("div", {className: "plot"});
    const canvas = make("canvas");
    plot.append(canvas);
    place.replaceChildren(make("p", {className: "title", textContent: spec.title}), legend(canvas, spec), plot,
                          numbers(spec));
    drawn.forEach(([old], gone) => {  // of what the page has replaced
      if (gone.isConnected) return;
      old.destroy();
      drawn.delete(gone);
    });
    draw(canvas, spec);
  }

  function upgrade(figure) {
    const specs = figure.querySelector("script.specs");
    if (!specs) {
      const own = JSON.parse(figure.querySelector("script.spec").textContent);
      chart(figure.querySelector(".still"), unpacked(own, []));
      return;
    }
    const {places, charts} = JSON.parse(specs.textContent);
    const all = new Map(Object.entries(charts));
    const [choice, place] = [figure.querySelector(".choice"), figure.querySelector(".stills")];
    const select = choice.querySelector("select");
    const show = () => {
      const found = all.get(select.value);
      place.className = Array.isArray(found) ? "stills charts" : "stills";
      if (!Array.isArray(found)) {
        chart(place, unpacked(found, places));
        return;
      }
      place.replaceChildren(...found.map(() => make("div", {className: "panel"})));
      found.forEach((spec, i) => chart(place.children[i], unpacked(spec, places)));
    };
    choice.hidden = all.size < 2;
    select.addEventListener("change", show);
    show();
  }

  function start() {
    // a chart is made when it is about to be seen
    const watch = new IntersectionObserver(found => found.forEach(({target, isIntersecting}) => {
      if (!isIntersecting) return;
      watch.unobserve(target);
      upgrade(target);
    }), {rootMargin: "300px"});
    document.querySelectorAll("figure.chart").forEach(figure => watch.observe(figure));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(([, spec], canvas) => {
      if (canvas.isConnected) draw(canvas, spec);
      else drawn.delete(canvas);
    }));
  }

  start();
  return {chart, number, tick, address};
})();
