"use strict";
/* The panel of one token.  Everything from data goes through textContent: nothing of it ever becomes markup.
   Log-probabilities are whole thousandths of a nat, null for minus infinity; kept entries of a row lie one after
   the other, so many for each position as `counts` says; a token is a number into `ids` and `names`. */

const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
const places = new Map(); // span -> { row, t }
const rows = data.rows.map((row, number) => {
  const block = document.querySelectorAll(".text")[number];
  const spans = Array.from(block.children);
  spans.forEach((span, t) => { places.set(span, { row: number, t }); span.removeAttribute("title"); });
  return { ...row, spans, positionAt: new Map(row.supervised.map((t, position) => [t, position])), ...derived(row) };
});
let chosen = null; // { row, t }
let pinned = false;

function derived(row) {
  if (!row.teacher) return { begins: [], bySurprise: [] };
  const begins = [0];
  for (const count of row.teacher.counts) begins.push(begins[begins.length - 1] + count);
  const nats = (position) => row.teacher.realised[position] ?? -Infinity;
  const bySurprise = row.supervised.map((_, position) => position).sort((a, b) => nats(a) - nats(b));
  return { begins, bySurprise };
}

function make(kind, text, className) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function spelled(number) {
  const name = data.names[number].replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return name.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "(empty)";
}

function nats(thousandths) { return thousandths === null ? "−∞" : (thousandths / 1000).toFixed(3).replace("-", "−"); }
function mass(thousandths) { return thousandths === null ? 0 : Math.exp(thousandths / 1000); }
function share(p) { return p === 0 ? "0" : p >= 0.001 ? p.toFixed(3) : p.toExponential(0); }

function line(name, p, logp, id, className) {
  const tr = make("tr", undefined, className);
  const first = make("td", undefined, "token");
  const bar = make("span", undefined, "bar");
  bar.style.width = Math.min(100, 100 * p) + "%";
  first.append(bar, document.createTextNode(name));
  tr.append(first, make("td", share(p)), make("td", logp), make("td", id));
  return tr;
}

function note(text, value) {
  const tr = make("tr", undefined, "rest");
  const first = make("td", text);
  first.colSpan = 2;
  tr.append(first, make("td", value), make("td"));
  return tr;
}

function keptTable(row, position, realised) {
  const teacher = row.teacher;
  const p = teacher.weighted ? "weight" : "p";
  const table = make("table");
  const head = make("tr");
  head.append(make("th", "kept"), make("th", p), make("th", teacher.weighted ? "log w" : "log p"), make("th", "id"));
  table.append(head);
  let sum = 0;
  for (let entry = row.begins[position]; entry < row.begins[position + 1]; entry++) {
    const token = teacher.kept[entry];
    sum += mass(teacher.logp[entry]);
    const name = token === realised ? spelled(token) + " ◀" : spelled(token);
    table.append(line(name, mass(teacher.logp[entry]), nats(teacher.logp[entry]), data.ids[token],
      token === realised ? "realised" : ""));
  }
  const left = teacher.all[position] - teacher.counts[position];
  if (left > 0) table.append(note(left + " more kept, not on this page", ""));
  else if (teacher.weighted) table.append(note("a sample, no tail: Σ weight", sum.toFixed(3)));
  teacher.tail[position].forEach((logsum, j) => {
    const T = data.temperatures[j];
    if (j === 0) table.append(line("tail (not kept)", mass(logsum), nats(logsum), "", "rest"));
    else table.append(note("tail: log Σ p^(1/T) at T = " + T, nats(logsum)));
  });
  return table;
}

/* Of the token that came among the kept on the page, from 0; -1 where it is none of them. */
function rank(row, position, token) {
  return row.teacher.kept.slice(row.begins[position], row.begins[position + 1]).indexOf(token);
}

function button(text, label, act) {
  const element = make("button", text);
  element.type = "button";
  element.setAttribute("aria-label", label);
  element.addEventListener("click", act);
  return element;
}

function fill(row, t) {
  const token = row.tokens[t];
  const position = row.positionAt.get(t);
  const bar = make("nav");
  bar.append(
    button("‹", "previous supervised token", () => step(-1)),
    button("›", "next supervised token", () => step(1)),
  );
  if (row.teacher) bar.append(button("next most surprising", "next most surprising token", nextSurprise));
  bar.append(button("×", "close", letGo));
  const parts = [make("h3", spelled(token), "token"), bar];
  const facts = "t " + t + " · id " + data.ids[token];
  if (position === undefined) parts.push(make("p", facts + " · not supervised", "o"));
  else if (!row.teacher) parts.push(make("p", facts + " · supervised", "o"));
  else {
    const teacher = row.teacher;
    const logp = teacher.realised[position];
    const place = row.bySurprise.indexOf(position) + 1;
    parts.push(make("p", facts + " · " + place + ". most surprising of " + row.supervised.length, "o"));
    parts.push(make("p", "p " + share(mass(logp)) + " · log p " + nats(logp) + " · entropy " +
      nats(teacher.entropy[position]) + " nats"));
    const number = rank(row, position, token) + 1;
    const cut = teacher.all[position] > teacher.counts[position];
    parts.push(make("p", number ? "It came as number " + number + " of " + teacher.all[position] + " kept." :
      cut ? "It is not among the most probable ones." : teacher.weighted ? "It is not kept." :
      "It is not kept: part of the tail."));
    parts.push(keptTable(row, position, token));
  }
  panel.replaceChildren(...parts);
  panel.classList.remove("idle");
}

function idle() {
  const keys = data.rows.some((row) => row.teacher) ? " n goes to the next most surprising, Esc lets go." : " Esc lets go.";
  panel.replaceChildren(make("p", "Point at a token to see what is known of it. A click holds it, ← and → move on." + keys, "o"));
  panel.classList.add("idle");
}

function choose(place, { pin, scroll }) {
  if (chosen) rows[chosen.row].spans[chosen.t].classList.remove("chosen");
  chosen = place;
  pinned = pinned || pin;
  const span = rows[place.row].spans[place.t];
  span.classList.add("chosen");
  fill(rows[place.row], place.t);
  if (scroll) span.scrollIntoView({ block: "nearest" });
}

function letGo() {
  if (chosen) rows[chosen.row].spans[chosen.t].classList.remove("chosen");
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

function nextSurprise() {
  const number = currentRow();
  const row = rows[number];
  if (!row.bySurprise.length) return;
  const position = chosen ? row.positionAt.get(chosen.t) : undefined;
  const place = position === undefined ? 0 : (row.bySurprise.indexOf(position) + 1) % row.bySurprise.length;
  choose({ row: number, t: row.supervised[row.bySurprise[place]] }, { pin: true, scroll: true });
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
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const acts = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), n: nextSurprise, Escape: letGo };
  const act = Object.hasOwn(acts, event.key) ? acts[event.key] : null;
  if (act) { event.preventDefault(); act(); }
});
document.body.classList.add("live");
if (matchMedia("(max-width: 61.99rem)").matches) for (const list of document.querySelectorAll("details")) list.open = false;
panel.hidden = false;
idle();
