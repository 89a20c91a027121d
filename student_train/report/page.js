/* One cursor in all charts, and the panel of one token.
   `first` and `last` say which steps of its `stage` a bucket holds.  Of a chart's lines one of the steps has its values
   by bucket: `smooth`, and `raw` or else `low` and `high`; one of the held-out rows has `held`: [stage, step, value]. */

function placeOfStep(stage, step) { return (data.offsets[stage] + step) / data.total; }

const middles = data.first.map((first, bucket) => placeOfStep(data.stage[bucket], (first + data.last[bucket]) / 2));
const svgNamespace = "http://www.w3.org/2000/svg";

function grouped(number) { return Math.round(number).toLocaleString("en-GB"); }

function signed(text) { return text.replace("-", "−"); }

function short(value) {
  if (value === 0) return "0";
  const exponent = Math.floor(Math.log10(Math.abs(value)));
  if (exponent >= 6 || exponent < -4) return signed(value.toExponential(3).replace("e+", "e"));
  return signed(value.toFixed(Math.max(3 - exponent, 0)));
}

function size(bytes) {
  for (const unit of ["bytes", "KiB", "MiB", "GiB"]) {
    if (bytes < 1024) return bytes.toFixed(unit === "bytes" ? 0 : 1) + " " + unit;
    bytes /= 1024;
  }
  return bytes.toFixed(1) + " TiB";
}

function said(value, unit) {
  if (value === null) return "–";
  if (unit === "bytes") return size(value);
  if (unit === "share") return (100 * value).toFixed(Math.abs(value) < 0.0995 || (value >= 0.995 && value < 1) ? 2 : 1) + " %";
  if (unit === "rate") return Math.abs(value) >= 100 ? grouped(value) : signed(value.toPrecision(3));
  return short(value);
}

function nearest(places, place) {
  let low = 0;
  let high = places.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (places[middle] < place) low = middle; else high = middle;
  }
  return Math.abs(places[low] - place) <= Math.abs(places[high] - place) ? low : high;
}

function valueAt(line, place, bucket, unit) {
  if (line.held) {
    const [, step, value] = line.held[nearest(line.places, place)];
    return [said(value, unit), "at " + grouped(step)];
  }
  const value = line.smooth[bucket];
  if (line.raw) {
    const raw = line.raw[bucket];
    return [said(value, unit), raw === value ? "" : "(" + said(raw, unit) + ")"];
  }
  if (line.low[bucket] === null) return [said(value, unit), ""];
  return [said(value, unit), "(" + said(line.low[bucket], unit) + " to " + said(line.high[bucket], unit) + ")"];
}

const charts = data.charts.map((chart, number) => {
  const figure = document.getElementById("chart" + number);
  const plot = figure.querySelector(".plot");
  const curves = figure.querySelector(".curves");
  const cursor = document.createElementNS(svgNamespace, "path");
  cursor.setAttribute("class", "cursor");
  curves.append(cursor);
  const label = make("div", undefined, "at");
  label.hidden = true;
  plot.append(label);
  const keys = Array.from(figure.querySelectorAll(".keys > span"), (key) => {
    const value = key.querySelector("b");
    const range = make("small");
    key.append(" ", range);
    return { value, range, usual: value.textContent };
  });
  for (const line of chart.lines) if (line.held) line.places = line.held.map(([stage, step]) => placeOfStep(stage, step));
  return { ...chart, figure, plot, curves, cursor, label, keys };
});
const lookPlaces = charts.flatMap((chart) => chart.lines.flatMap((line) => line.places ?? [])).sort((a, b) => a - b);
let bucketNow = null;

function point(place, on) {
  const bucket = middles.length ? nearest(middles, place) : null;
  bucketNow = bucket;
  const at = bucket === null ? lookPlaces[nearest(lookPlaces, place)] : middles[bucket];
  for (const chart of charts) {
    chart.cursor.setAttribute("d", "M" + 1000 * at + " 0V190");
    chart.lines.forEach((line, n) => {
      const [value, range] = valueAt(line, at, bucket, chart.unit);
      chart.keys[n].value.textContent = value;
      chart.keys[n].range.textContent = range;
    });
    chart.label.hidden = chart !== on;
  }
  if (bucket === null) { on.label.hidden = true; return; }
  const [first, last] = [data.first[bucket], data.last[bucket]];
  const name = data.stages.length > 1 ? data.stages[data.stage[bucket]] + ", " : "";
  on.label.textContent = name + (first === last ? "step " : "steps ") + grouped(first) + (first === last ? "" : "–" + grouped(last));
  const left = on.curves.getBoundingClientRect().left - on.plot.getBoundingClientRect().left;
  const width = on.curves.getBoundingClientRect().width;
  const half = on.label.offsetWidth / 2;
  on.label.style.left = Math.min(Math.max(left + at * width, half), left + width - half) + "px";
}

function unpoint() {
  bucketNow = null;
  for (const chart of charts) {
    chart.cursor.removeAttribute("d");
    chart.label.hidden = true;
    for (const key of chart.keys) { key.value.textContent = key.usual; key.range.textContent = ""; }
  }
}

for (const chart of charts) {
  const follow = (event) => {
    const box = chart.curves.getBoundingClientRect();
    point(Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1), chart);
  };
  chart.plot.addEventListener("pointermove", follow);
  chart.plot.addEventListener("pointerdown", follow);
  chart.plot.addEventListener("pointerleave", unpoint);
  chart.figure.addEventListener("blur", unpoint);
  chart.figure.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey || !middles.length) return;
    event.preventDefault();
    const from = bucketNow === null ? (by > 0 ? -1 : middles.length) : bucketNow;
    point(middles[Math.min(Math.max(from + by, 0), middles.length - 1)], chart);
  });
}

const texts = document.querySelectorAll(".row .text");
const rows = data.rows.map((row, number) => {
  const elements = texts[number].querySelectorAll(":scope > span");
  const spans = new Map(row.supervised.map((t, position) => [t, elements[position]]));
  const positionAt = new Map(row.supervised.map((t, position) => [t, position]));
  return { ...row, spans, positionAt, worst: [] };
});

function order() {
  const byLabel = document.getElementById("by-ce")?.checked;
  for (const row of rows) {
    const values = byLabel || !row.kl ? row.ce : row.kl;
    row.worst = row.supervised.slice().sort((a, b) => values[row.positionAt.get(b)] - values[row.positionAt.get(a)]);
  }
}

function choice(who, name, p) {
  const tr = make("tr");
  tr.append(make("td", who), barred(spelled(name), p), make("td", share(p)));
  return tr;
}

function describe(row, t) {
  const position = row.positionAt.get(t);
  const label = row.spans.get(t).textContent;
  const place = row.worst.indexOf(t) + 1;
  const parts = [make("p", "token " + t + " · " + place + ". worst of " + row.supervised.length + " shown", "o")];
  const facts = "cross-entropy " + short(row.ce[position]);
  parts.push(make("p", facts + (row.kl ? " · KL " + short(row.kl[position]) : "") + " nats"));
  const table = make("table");
  const head = make("tr");
  head.append(make("th", ""), make("th", "token"), make("th", "p"));
  table.append(head);
  if (row.realised) table.append(choice("label, teacher", label, row.realised[position]));
  table.append(choice("label, student", label, Math.exp(-row.ce[position])));
  if (row.teacher) table.append(choice("teacher's top", data.names[row.teacher.name[position]], row.teacher.p[position]));
  table.append(choice("student's top", data.names[row.student.name[position]], row.student.p[position]));
  parts.push(table);
  return { title: spelled(label), parts };
}

order();
const panel = document.getElementById("panel");
if (panel) {
  const { refresh } = watchTokens(panel, rows, describe, {
    worst: "worst",
    idle: "Point at a coloured token to see what teacher and student make of it. A click holds it, ← and → move on, n goes to the next worst, Esc lets go.",
  });
  for (const button of document.querySelectorAll('input[name="by"]')) button.addEventListener("change", () => { order(); refresh(); });
}
