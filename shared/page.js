"use strict";
/* What pages of coloured tokens have in common.  Everything from data goes through textContent: nothing of it ever
   becomes markup. */

const data = JSON.parse(document.getElementById("data").textContent);

function make(kind, text, className) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function spelled(name) {
  const marked = name.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return marked.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "(empty)";
}

function share(p) { return p === 0 ? "0" : p >= 0.001 ? p.toFixed(3) : p.toExponential(0); }

/* A cell with a bar behind its text, as long as p. */
function barred(text, p) {
  const cell = make("td", undefined, "token");
  const bar = make("span", undefined, "bar");
  bar.style.width = Math.min(100, 100 * p) + "%";
  cell.append(bar, document.createTextNode(text));
  return cell;
}

/* Tells in a panel of the token that is pointed at; a click holds it.
   Of `rows` each has `spans`, the elements of its tokens by t (a Map); `supervised`, every supervised t in order; and
   `worst`, the same ones with the worst first.  `describe` makes what the panel shows of token t of a row, between its
   title and its end; `words` says what the worst are called, and what an idle panel shows. */
function watchTokens(panel, rows, describe, words) {
  const places = new Map(); // span -> { row, t }
  rows.forEach((row, number) => row.spans.forEach((span, t) => places.set(span, { row: number, t })));
  let chosen = null; // { row, t }
  let pinned = false;

  function button(text, label, act) {
    const element = make("button", text);
    element.type = "button";
    element.setAttribute("aria-label", label);
    element.addEventListener("click", act);
    return element;
  }

  function fill(row, t) {
    const { title, parts } = describe(row, t);
    const bar = make("nav");
    bar.append(
      button("‹", "previous supervised token", () => step(-1)),
      button("›", "next supervised token", () => step(1)),
    );
    if (row.worst.length) bar.append(button("next " + words.worst, "next " + words.worst + " token", nextWorst));
    bar.append(button("×", "close", letGo));
    panel.replaceChildren(make("h3", title, "token"), bar, ...parts);
    panel.classList.remove("idle");
  }

  function idle() {
    panel.replaceChildren(make("p", words.idle, "o"));
    panel.classList.add("idle");
  }

  function choose(place, { pin, scroll }) {
    if (chosen) rows[chosen.row].spans.get(chosen.t).classList.remove("chosen");
    chosen = place;
    pinned = pinned || pin;
    const span = rows[place.row].spans.get(place.t);
    span.classList.add("chosen");
    fill(rows[place.row], place.t);
    if (scroll) span.scrollIntoView({ block: "nearest" });
  }

  function letGo() {
    if (chosen) rows[chosen.row].spans.get(chosen.t).classList.remove("chosen");
    chosen = null;
    pinned = false;
    idle();
  }

  /* The row that is chosen, or else the first on the page with something to choose. */
  function currentRow() { return chosen ? chosen.row : Math.max(0, rows.findIndex((row) => row.supervised.length)); }

  function step(by) {
    const number = currentRow();
    const ts = rows[number].supervised;
    if (!ts.length) return;
    const t = chosen ? chosen.t : by > 0 ? -1 : Infinity;
    const next = by > 0 ? ts.find((other) => other > t) : ts.findLast((other) => other < t);
    if (next !== undefined) choose({ row: number, t: next }, { pin: true, scroll: true });
  }

  function nextWorst() {
    const number = currentRow();
    const { worst } = rows[number];
    if (!worst.length) return;
    const place = chosen ? (worst.indexOf(chosen.t) + 1) % worst.length : 0;
    choose({ row: number, t: worst[place] }, { pin: true, scroll: true });
  }

  function placeOf(target) {
    const span = target instanceof Element ? target.closest(".text > span") : null;
    return span ? places.get(span) : undefined;
  }

  document.addEventListener("mouseover", (event) => {
    const place = placeOf(event.target);
    if (place && !pinned) choose(place, { pin: false, scroll: false });
  });
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("ol a") : null;
    const target = link ? document.getElementById(link.getAttribute("href").slice(1)) : event.target;
    const place = placeOf(target);
    if (!place) return;
    if (link) event.preventDefault();
    choose(place, { pin: true, scroll: Boolean(link) });
  });
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), n: nextWorst, Escape: letGo };
    const act = Object.hasOwn(acts, event.key) ? acts[event.key] : null;
    if (act) { event.preventDefault(); act(); }
  });
  document.body.classList.add("live");
  if (matchMedia("(max-width: 61.99rem)").matches) for (const list of document.querySelectorAll("details.worst")) list.open = false;
  panel.hidden = false;
  idle();
  const linked = placeOf(document.getElementById(location.hash.slice(1)));
  if (linked) choose(linked, { pin: true, scroll: true });
  return { refresh: () => { if (chosen) fill(rows[chosen.row], chosen.t); } };
}
