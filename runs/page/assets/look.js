// A text: a token under the pointer or with the focus shows its features; a feature that is picked shades the text.
"use strict";
(() => {
  const {tokens, sides} = JSON.parse(document.getElementById("look").textContent);
  const text = document.querySelector(".look .text");
  const spans = [...text.querySelectorAll(".tok")];
  const make = (tag, about = {}, ...inside) => {
    const made = Object.assign(document.createElement(tag), about);
    made.append(...inside);
    return made;
  };
  const short = value => String(Number(value.toPrecision(4)));
  const whole = token => token.replace(/^ /, "\u00a0");  // no line ends behind the “
  const largest = values => values.reduce((most, [, value]) => Math.abs(value) > Math.abs(most) ? value : most, 0);

  let selected = -1;  // the token that was clicked or has the focus
  let shown = -1;  // the token whose features are listed
  let picked = null;  // [side, feature] by which the text is shaded; null: each token by its strongest

  const shaded = make("div", {className: "shaded"});
  const word = make("span", {className: "mut"});
  const back = make("button", {type: "button", textContent: "shade by the strongest"});
  const panel = make("div", {className: "sides"});
  const title = make("h2");
  const here = make("span", {className: "mut"});
  const lists = sides.map(side => {
    const body = make("tbody");
    const heads = ["feature", "activation", "known by", ...(side.page ? [""] : [])];
    const head = make("tr", {}, ...heads.map(text => make(text ? "th" : "td", {textContent: text})));
    const table = make("table", {}, make("thead", {}, head), body);
    table.setAttribute("aria-label", `features of ${side.name}`);
    panel.append(make("section", {}, make("h3", {textContent: side.name}), table));
    return body;
  });
  panel.prepend(make("div", {className: "head"}, title, here));
  shaded.append(word, back);
  text.before(shaded);
  text.after(panel);
  const rows = Math.max(1, ...sides.flatMap(side => side.tokens.map(pairs => pairs.length)));
  panel.style.setProperty("--rows", `${rows * 34 + 64}px`);  // no jumps from token to token

  function shade() {
    const values = new Map();
    const of = picked ? picked[0].values[picked[1]]
      : sides[0].tokens.flatMap((pairs, place) => pairs.length ? [[place, pairs[0][1]]] : []);
    of.forEach(([place, value]) => values.set(place, value));
    const most = Math.abs(largest(of)) || 1;
    spans.forEach((span, place) => {
      const value = values.get(place) || 0;
      span.classList.toggle("neg", value < 0);
      span.style.setProperty("--a", value ? (.08 + .42 * Math.abs(value) / most).toFixed(2) : "0");
    });
    word.textContent = picked
      ? `shaded by feature ${picked[1]} of ${picked[0].name}: ${where(of)}`
      : `Each token is shaded by its strongest activation under ${sides[0].name}. Point at one, or go there by Tab ` +
        "and the arrow keys; a feature’s number shades the text by that feature alone.";
    strength(shown);
    back.hidden = !picked;
    panel.querySelectorAll("button").forEach(button => press(button));
  }

  const WHERE = 4;  // tokens named
  // where a picked feature fires, the strongest first
  function where(values) {
    const first = [...values].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, WHERE);
    const named = first.map(([place, value]) => `“${whole(tokens[place])}” ${short(value)}`).join(", ");
    const more = values.length > WHERE ? `, and ${values.length - WHERE} more` : "";
    return `it fires on ${values.length} of ${tokens.length} tokens, ${named}${more}`;
  }

  // the activation of the picked feature on the token that is shown
  function strength(place) {
    here.textContent = "";
    if (!picked || place < 0) return;
    const found = picked[0].values[picked[1]].find(([at]) => at === place);
    here.textContent = `feature ${picked[1]} ${found ? `here: ${short(found[1])}` : "does not fire here"}`;
  }

  function press(button) {
    const same = picked && button.side === picked[0] && button.feature === picked[1];
    button.setAttribute("aria-pressed", String(Boolean(same)));
  }

  function row(side, [feature, value]) {
    const button = make("button", {type: "button", textContent: feature, side, feature});
    button.setAttribute("aria-label", `shade the text by feature ${feature} of ${side.name}`);
    button.addEventListener("click", () => {
      const again = picked && picked[0] === side && picked[1] === feature;
      picked = again ? null : [side, feature];
      shade();
    });
    press(button);
    const [kind, text] = side.says[feature];
    const kindly = make("span", {className: "mut", textContent: kind});
    const cells = [make("td", {}, button), make("td", {textContent: short(value)}),
      make("td", {title: `${kind} ${text}`}, kindly, ` ${text}`)];
    if (side.page) {
      const link = make("a", {href: `${side.page}#${feature}`, textContent: "open", title: "its dashboard"});
      link.setAttribute("aria-label", `dashboard of feature ${feature}`);
      cells.push(make("td", {}, link));
    }
    return make("tr", {}, ...cells);
  }

  function show(place) {
    if (place === shown) return;
    shown = place;
    title.textContent = place < 0 ? "no token is chosen" : `token ${place} of ${tokens.length}: ${tokens[place]}`;
    strength(place);
    sides.forEach((side, i) => {
      const pairs = place < 0 ? [] : side.tokens[place];
      const none = make("tr", {}, make("td", {colSpan: 3, className: "mut",
        textContent: place < 0 ? "" : "no feature fires here"}));
      lists[i].replaceChildren(...(pairs.length ? pairs.map(pair => row(side, pair)) : [none]));
    });
  }

  function select(place, focus) {
    if (selected >= 0) {
      spans[selected].setAttribute("aria-selected", "false");
      spans[selected].tabIndex = -1;
    } else spans[0].tabIndex = -1;
    selected = place;
    spans[place].setAttribute("aria-selected", "true");
    spans[place].tabIndex = 0;
    if (focus) spans[place].focus();
    show(place);
  }

  // the token of the line above or below that is nearest
  function vertical(place, way) {
    const here = spans[place].getBoundingClientRect();
    let best = place, distance = Infinity, line = null;
    for (let i = place + way; i >= 0 && i < spans.length; i += way) {
      const box = spans[i].getBoundingClientRect();
      if (way * (box.top - here.top) < here.height / 2) continue;
      if (line !== null && Math.abs(box.top - line) > here.height / 2) break;
      line = box.top;
      const off = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
      if (off < distance) [best, distance] = [i, off];
    }
    return best;
  }

  const moves = {ArrowLeft: i => i - 1, ArrowRight: i => i + 1, Home: () => 0, End: () => spans.length - 1,
    ArrowUp: i => vertical(i, -1), ArrowDown: i => vertical(i, 1)};

  text.setAttribute("role", "listbox");
  text.setAttribute("aria-label", "the tokens of the text");
  spans.forEach((span, place) => {
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.tabIndex = place ? -1 : 0;
    if (!tokens[place].trim()) span.setAttribute("aria-label", "space");
    span.addEventListener("pointerenter", () => show(place));
    span.addEventListener("focus", () => { if (selected !== place) select(place, false); });
    span.addEventListener("click", () => select(place, true));
  });
  text.addEventListener("pointerleave", () => show(selected));
  text.addEventListener("keydown", event => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(Math.min(Math.max(move(Math.max(selected, 0)), 0), spans.length - 1), true);
  });
  back.addEventListener("click", () => { picked = null; shade(); });

  document.querySelector("details.table").open = false;
  const strong = sides[0].tokens.findIndex(pairs => pairs.length);
  shade();
  if (strong >= 0) select(strong, false);
  else show(-1);
})();
