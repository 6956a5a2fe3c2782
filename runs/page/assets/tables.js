// Tables of a page: table.sortable is sorted by a click on a heading, and searched by the input beside it.
"use strict";
(() => {
  // a figure, whatever stands behind it: "~0.93", "9.5%", "0.93 ± 0.002", "1,000"
  const figure = /^[~≈]?([-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?)\s*(?:%|±.*)?$/i;
  function value(cell) {
    const text = cell.dataset.value ?? cell.textContent.trim();
    const found = figure.exec(text);
    return found ? Number(found[1].replace(/,/g, "")) : text;
  }
  const empty = one => one === "" || one === "–";
  function compare(a, b, sign) {  // cells without a value come last, either way
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    if (typeof a === typeof b) return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
    return typeof a === "number" ? -1 : 1;
  }
  function sort(table, th) {
    const column = [...th.parentNode.children].indexOf(th);
    const before = th.getAttribute("aria-sort");
    const down = before === "descending" || (before === null && th.classList.contains("l"));
    table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map(row => [row.cells[column] ? value(row.cells[column]) : "", row]);
    rows.sort((a, b) => compare(a[0], b[0], down ? 1 : -1));
    body.replaceChildren(...rows.map(([, row]) => row));
  }
  document.querySelectorAll("table.sortable").forEach(table => {
    table.tHead.querySelectorAll("th").forEach(th => {
      const button = Object.assign(document.createElement("button"), {type: "button"});
      button.append(...th.childNodes);
      button.addEventListener("click", () => sort(table, th));
      th.append(button);
    });
    const search = table.id && document.querySelector(`input[data-table="${CSS.escape(table.id)}"]`);
    if (!search) return;
    search.closest("label").hidden = false;
    search.addEventListener("input", () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every(word => text.includes(word));
      }
    });
  });
})();
