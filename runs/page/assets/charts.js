// Charts of a page: every figure.chart that holds a chart's data (runs/page/charts.py) becomes an interactive one.
"use strict";
const Pages = (() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = value => value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3
    ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  const tick = value => Math.abs(value) >= 1e9 ? number(value / 1e9) + "B" : Math.abs(value) >= 1e6 ? number(value / 1e6) + "M"
    : Math.abs(value) >= 1e3 ? number(value / 1e3) + "k" : number(value);
  const shapes = {run: "circle", baseline: "rectRot", random: "triangle", seed: "circle", other: "rect"};

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
        ctx.moveTo(x, scales.y.getPixelForValue(point.y - point.e));
        ctx.lineTo(x, scales.y.getPixelForValue(point.y + point.e));
      }
      ctx.stroke();
      ctx.restore();
    });
  }};

  // a relative address or a place in the page; never one with a scheme, and no other machine's
  const address = text => text && !/^[a-z][a-z0-9+.-]*:|^[\\/]{2}/i.test(text.replace(/[\u0000-\u0020]/g, "")) ? text : null;

  function dataset(spec, one, i) {
    const colour = css("--c" + (one.colour ?? i) % 8);
    if (spec.kind === "bars") {
      return {type: "bar", label: one.name, data: one.counts.map((y, n) => ({x: (one.edges[n] + one.edges[n + 1]) / 2, y})),
        edges: one.edges, backgroundColor: colour + "aa", borderColor: colour, barPercentage: 1, categoryPercentage: 1,
        grouped: false};
    }
    const many = one.points.length > 60;
    return {type: "line", label: one.name, data: one.points.map(([x, y, e, label, href]) => ({x, y, e, label, href})),
      errors: one.points.some(point => point[2]), showLine: Boolean(one.line), borderColor: colour, backgroundColor: colour,
      borderWidth: 1.8, borderDash: one.role === "random" ? [6, 4] : [], pointStyle: shapes[one.role] || "circle",
      clip: 8, pointRadius: one.line && many ? 0 : one.role === "seed" || many ? 2 : 4, pointHoverRadius: 6, pointHitRadius: 6};
  }

  function range(spec, axis) {  // with the errors inside
    if (spec.kind === "bars" || axis === "x") return {};
    const ends = spec.series.flatMap(one => one.points.flatMap(([, y, e]) => [y - (e || 0), y + (e || 0)]));
    const shown = ends.filter(y => !spec.y.log || y > 0);
    return {suggestedMin: Math.min(...shown), suggestedMax: Math.max(...shown)};
  }

  function scale(spec, axis) {
    const mut = css("--mut");
    return {type: spec[axis].log ? "logarithmic" : "linear", title: {display: true, text: spec[axis].label, color: mut},
      grid: {color: css("--line"), display: axis === "y"}, border: {color: mut}, ...range(spec, axis),
      ticks: {color: mut, maxTicksLimit: 7, callback: value => tick(value)}};
  }

  function hover(spec) {
    return {title: items => items[0] ? items[0].dataset.label : "", label(item) {
      const {raw, dataset: {edges}, dataIndex} = item;
      if (edges) return `${number(edges[dataIndex])} to ${number(edges[dataIndex + 1])}: ${number(raw.y)}`;
      const y = `${number(raw.y)}${raw.e ? " ± " + number(raw.e) : ""}`;
      return [...(raw.label ? raw.label.split("\n") : []), `${spec.y.label}: ${y}`, `${spec.x.label}: ${number(raw.x)}`];
    }};
  }

  const drawn = new Map();  // canvas: [its chart, its data]

  function draw(canvas, spec) {
    drawn.get(canvas)?.[0].destroy();
    const few = spec.kind !== "bars";
    const chart = new Chart(canvas, {
      data: {datasets: spec.series.map((one, i) => dataset(spec, one, i))}, plugins: [errorBars],
      options: {animation: false, responsive: true, maintainAspectRatio: false, parsing: false, normalized: true,
        interaction: {mode: "nearest", intersect: few, axis: few ? "xy" : "x"},
        scales: {x: {...scale(spec, "x"), offset: false}, y: {...scale(spec, "y"), beginAtZero: !few}},
        onHover: (event, found) => { canvas.style.cursor = address(found[0]?.element.$context.raw.href) ? "pointer" : ""; },
        onClick: (event, found) => {
          const to = address(found[0]?.element.$context.raw.href);
          if (to) location.assign(to);
        },
        plugins: {title: {display: true, text: spec.title, align: "start", color: css("--fg")},
          legend: {display: spec.series.length > 1, labels: {color: css("--fg"), usePointStyle: few, boxHeight: 7}},
          tooltip: {callbacks: hover(spec)}}}});
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${spec.title}: ${spec.y.label} against ${spec.x.label}; the numbers are in the table below`);
    drawn.set(canvas, [chart, spec]);
    return chart;
  }

  // the numbers of a chart, for a keyboard and for copying; made when they are asked for
  function numbers(spec) {
    const details = document.createElement("details");
    details.append(Object.assign(document.createElement("summary"), {textContent: "the numbers"}));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const table = document.createElement("table");
      const row = (cells, tag) => {
        const line = table.insertRow();
        cells.forEach((cell, i) => {
          const place = document.createElement(tag);
          if (!i) place.className = "l";
          cell instanceof Node ? place.append(cell) : place.textContent = cell;
          line.append(place);
        });
      };
      const bars = spec.kind === "bars";
      row(bars ? ["", "from", "to", spec.y.label] : ["", spec.x.label, spec.y.label, "standard error"], "th");
      for (const one of spec.series) {
        if (bars) one.counts.forEach((y, n) => row([one.name, number(one.edges[n]), number(one.edges[n + 1]), number(y)], "td"));
        for (const [x, y, e, label, href] of one.points || []) {
          const name = label ? `${one.name}: ${label}` : one.name;
          const to = address(href);
          const link = to ? Object.assign(document.createElement("a"), {href: to, textContent: name}) : name;
          row([link, number(x), number(y), e ? number(e) : ""], "td");
        }
      }
      const scroll = Object.assign(document.createElement("div"), {className: "scroll", tabIndex: 0});
      scroll.setAttribute("role", "region");
      scroll.setAttribute("aria-label", `the numbers of ${spec.title}`);
      scroll.append(table);
      details.append(scroll);
    });
    return details;
  }

  // a chart in `place`, an element, in place of what it holds
  function chart(place, spec) {
    const plot = Object.assign(document.createElement("div"), {className: "plot"});
    const canvas = document.createElement("canvas");
    plot.append(canvas);
    place.replaceChildren(plot, numbers(spec));
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
      chart(figure.querySelector(".still"), JSON.parse(figure.querySelector("script.spec").textContent));
      return;
    }
    const all = JSON.parse(specs.textContent);
    const [choice, stills] = [figure.querySelector(".choice"), figure.querySelector(".stills")];
    const select = choice.querySelector("select");
    const show = () => chart(stills, all[select.value]);
    stills.className = "stills";
    choice.hidden = false;
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
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      drawn.forEach(([, spec], canvas) => { if (canvas.isConnected) draw(canvas, spec); }));
  }

  start();
  return {chart, number, tick, address};
})();
