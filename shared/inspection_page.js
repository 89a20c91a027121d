/* The panel of one token.  Log-probabilities are whole thousandths of a nat, null for minus infinity; kept entries of a
   row lie one after the other, so many for each position as `counts` says; a token is a number into `ids` and `names`. */

const rows = data.rows.map((row, number) => {
  const spans = new Map(Array.from(document.querySelectorAll(".text")[number].children).entries());
  for (const span of spans.values()) span.removeAttribute("title");
  const positionAt = new Map(row.supervised.map((t, position) => [t, position]));
  return { ...row, spans, positionAt, ...derived(row, positionAt) };
});

function derived(row, positionAt) {
  if (!row.teacher) return { begins: [], worst: [] };
  const begins = [0];
  for (const count of row.teacher.counts) begins.push(begins[begins.length - 1] + count);
  const nats = (t) => row.teacher.realised[positionAt.get(t)] ?? -Infinity;
  return { begins, worst: row.supervised.slice().sort((a, b) => nats(a) - nats(b)) };
}

function nats(thousandths) { return thousandths === null ? "−∞" : (thousandths / 1000).toFixed(3).replace("-", "−"); }
function mass(thousandths) { return thousandths === null ? 0 : Math.exp(thousandths / 1000); }

function line(name, p, logp, id, className) {
  const tr = make("tr", undefined, className);
  tr.append(barred(name, p), make("td", share(p)), make("td", logp), make("td", id));
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
    const name = spelled(data.names[token]) + (token === realised ? " ◀" : "");
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

function describe(row, t) {
  const token = row.tokens[t];
  const position = row.positionAt.get(t);
  const parts = [];
  const facts = "t " + t + " · id " + data.ids[token];
  if (position === undefined) parts.push(make("p", facts + " · not supervised", "o"));
  else if (!row.teacher) parts.push(make("p", facts + " · supervised", "o"));
  else {
    const teacher = row.teacher;
    const logp = teacher.realised[position];
    const place = row.worst.indexOf(t) + 1;
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
  return { title: spelled(data.names[token]), parts };
}

const keys = data.rows.some((row) => row.teacher) ? " n goes to the next most surprising, Esc lets go." : " Esc lets go.";
watchTokens(document.getElementById("panel"), rows, describe, {
  worst: "most surprising",
  idle: "Point at a token to see what is known of it. A click holds it, ← and → move on." + keys,
});
