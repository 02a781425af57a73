"use strict";
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const { stops } = data;
const curve = find("curve"), slider = find("slider");
const margin = { left: 58, right: 26, top: 14, bottom: 42 };
let places = [];

const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
const count = (value) => value.toLocaleString("en");
const isShare = ["accuracy", "agreement"].includes(data.metric);
const measure = (value) => (isShare ? percent(value) : value.toPrecision(3)).replace("-", "−");

function element(parent, name, attributes = {}, text = "") {
  const made = parent.namespaceURI.endsWith("svg")
    ? document.createElementNS(parent.namespaceURI, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return parent.appendChild(made);
}

/* Round numbers that divide a range into about as many parts. */
function ticks(low, high, parts) {
  const rough = (high - low) / parts, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) || 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
}

function draw() {
  const width = curve.clientWidth, height = curve.clientHeight;
  const judged = stops.filter((stop) => stop.estimate);
  const shares = stops.map((stop) => stop.share), ends = judged.flatMap((stop) => stop.estimate);
  const left = Math.min(...shares), right = Math.max(...shares);
  let low = data.metric === "error" ? 0 : Math.min(...ends), high = Math.max(...ends);
  const room = 0.06 * (high - low || 1);
  low = isShare || data.metric === "error" ? Math.max(0, low - room) : low - room;
  high = isShare ? Math.min(1, high + room) : high + room;
  const x = (share) => margin.left
    + (width - margin.left - margin.right) * (share - left) / (right - left || 1);
  const y = (value) => height - margin.bottom
    - (height - margin.top - margin.bottom) * (value - low) / (high - low || 1);
  curve.replaceChildren();
  curve.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const vertical = ticks(low, high, 5), few = vertical.some((value) => 100 * value % 1 > 1e-6);
  for (const value of vertical) {
    element(curve, "line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) });
    element(curve, "text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" },
      isShare ? percent(value, few ? 1 : 0) : `${+value.toPrecision(3)}`);
  }
  for (const share of ticks(left, right, Math.max(2, Math.floor(width / 110)))) {
    element(curve, "text", { x: x(share), y: height - margin.bottom + 18, "text-anchor": "middle" },
      percent(share, 0));
  }
  element(curve, "text", { x: width - margin.right, y: height - 6, "text-anchor": "end" },
    `${data.what}, share of the dense network`);
  if (data.reference !== null) {
    element(curve, "line", { class: "dense", x1: margin.left, x2: width - margin.right,
      y1: y(data.reference), y2: y(data.reference) });
  }
  const along = (end) => judged.map((stop) => `${x(stop.share)},${y(stop.estimate[end])}`);
  element(curve, "polygon", { class: "band", points: [...along(1), ...along(2).reverse()].join(" ") });
  element(curve, "polyline", { class: "line", points: along(0).join(" ") });
  places = stops.map((stop) => [x(stop.share), stop.estimate ? y(stop.estimate[0]) : y(low)]);
  for (const [cx, cy] of places) element(curve, "circle", { class: "dot", cx, cy, r: 4 });
  const [cx, cy] = places[+slider.value];
  element(curve, "line", { class: "guide", x1: cx, x2: cx, y1: margin.top, y2: height - margin.bottom });
  element(curve, "circle", { class: "here", cx, cy, r: 8 });
}

function card(value, label, detail = "") {
  const made = element(find("cards"), "div", { class: "card" });
  element(made, "b", {}, value);
  element(made, "span", {}, label);
  if (detail) element(made, "small", {}, detail);
}

function cards(stop) {
  const dense = stops.at(-1);
  find("cards").replaceChildren();
  const [value, low, high] = stop.estimate || [];
  card(stop.estimate ? measure(value) : "not finite", data.metric,
    stop.estimate && high > low ? `${measure(low)} to ${measure(high)}` : "");
  for (const [key, label] of [["macs", "MACs"], ["params", "parameters"]]) {
    card(percent(stop.cost[key] / dense.cost[key]), `of the ${label}`, count(stop.cost[key]));
  }
  if (stop.latency) {
    card(`${stop.latency.pruned.toPrecision(3)} ms`, "per example",
      `dense ${stop.latency.dense.toPrecision(3)} ms`);
  }
  if (stop.divergence !== null) card(stop.divergence.toPrecision(3), "KL divergence from dense, nats");
}

function rows(table, content) {
  const body = find(table).tBodies[0];
  body.replaceChildren();
  for (const cells of content) {
    const row = element(body, "tr");
    for (const cell of cells) {
      const made = element(row, "td", {}, typeof cell === "object" ? "" : cell);
      if (typeof cell === "object") {
        element(element(made, "div", { class: "bar" }), "i", { style: `width: ${100 * cell.share}%` });
      }
    }
  }
}

/* The file of `prune --plan`. */
function planText(stop) {
  const groups = Object.keys(data.widths);
  const keep = Object.fromEntries(groups.filter((name) => name in stop.keep).map((name) => [name, stop.keep[name]]));
  return JSON.stringify({ keep, removed: stop.removed, frontier: { ...data.made, budget: stop.budget,
    cost: stop.cost, [data.metric]: stop.estimate } });
}

function show() {
  const number = +slider.value, stop = stops[number], dense = stop.keep === null;
  find("budget").textContent = dense ? "The dense network" : `Budget: ${stop.budget} of the ${data.what}`;
  if (!dense && !/[%x]$/.test(stop.budget)) find("budget").textContent = `Budget: ${stop.budget} ${data.what}`;
  slider.setAttribute("aria-valuetext", `${find("budget").textContent}; ${data.metric} `
    + (stop.estimate ? measure(stop.estimate[0]) : "not finite"));
  cards(stop);
  find("save").hidden = dense;
  const link = find("plan");
  if (link.href) URL.revokeObjectURL(link.href);
  link.removeAttribute("href");
  if (!dense) {
    link.href = URL.createObjectURL(new Blob([planText(stop)], { type: "application/json" }));
    link.download = `plan-${stop.budget.replace("%", "-percent")}.json`;
    find("command").replaceChildren();
    for (const word of ["python -m pruning prune", "…", `--plan ${link.download}`, ...(data.made.refit ? ["--refit"] : [])]) {
      element(find("command"), "span", {}, word);
      find("command").append(" ");
    }
  }
  rows("widths", Object.entries(data.widths).map(([name, full]) => {
    const kept = dense || !(name in stop.keep) ? full : stop.keep[name].length;
    return [name, count(full), count(kept), { share: kept / full }];
  }));
  find("changes").textContent = stop.changes;
  find("classes").parentElement.hidden = !stop.lost.length;
  rows("classes", stop.lost.map(([name, before, now, total]) => [name, `${before} of ${total}`, `${now} of ${total}`]));
  draw();
}

function choose(event) {
  const x = (event.clientX - curve.getBoundingClientRect().left);
  const distances = places.map(([at]) => Math.abs(at - x));
  const nearest = distances.indexOf(Math.min(...distances));
  if (+slider.value !== nearest) {
    slider.value = nearest;
    show();
  }
}

curve.addEventListener("pointerdown", (event) => {
  curve.setPointerCapture(event.pointerId);
  choose(event);
});
curve.addEventListener("pointermove", (event) => {
  if (curve.hasPointerCapture(event.pointerId)) choose(event);
});
slider.addEventListener("input", show);
addEventListener("resize", draw);
show();
