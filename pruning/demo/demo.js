// The page: turns drawings into pixels and shows what the networks predict. program.js, which is included
// before this file and sets strict mode, runs the networks.

const page = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const [channels, height, width] = page.input.shape;
const colored = channels === 3;
const networks = page.networks.map((each) => ({
  ...each,
  ...makeNetwork(each.program, new Float32Array(bytes(each.weights).buffer)),
}));
const examples = page.examples.map((each) => ({ ...each, pixels: bytes(each.pixels) }));

/** What is on the paper: strokes, lists of points in units of the paper's width, or a picture. */
const drawing = { strokes: [], picture: null };
const PAPER = 640; // pixels across, of the canvas to draw on
const PEN = 0.08; // of the paper's width
const LEAST = 0.15; // drawings smaller than this part of the paper are not enlarged to full size
const MOST_ROWS = 20; // with more classes, only the ten most likely are shown

function bytes(base64) {
  const text = atob(base64), found = new Uint8Array(text.length);
  for (let i = 0; i < found.length; i++) found[i] = text.charCodeAt(i);
  return found;
}

function made(name, content = "", attributes = {}) {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...[content].flat());
  return element;
}

/** A probability as text; what rounds to 0 or 100 % has no decimals. */
const percent = (share) => `${share > 0.9995 ? 100 : share < 0.0005 ? 0 : (100 * share).toFixed(1)} %`;
const pause = () => new Promise((resolve) => setTimeout(resolve));

// --- pixels -------------------------------------------------------------------------

/** Normalize pixels (channels, height, width) from 0 to 255 as in training. */
function normalized(pixels) {
  const area = height * width, { mean, std } = page.input;
  return Float32Array.from(pixels, (pixel, i) => {
    const channel = Math.floor(i / area);
    return (pixel / 255 - mean[channel]) / std[channel];
  });
}

function canvasOf(wide, high) {
  const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: high });
  return canvas.getContext("2d", { willReadFrequently: true });
}

function drawStrokes(context, scale, left, top, pen, ink) {
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = pen;
  for (const { points, color } of drawing.strokes) {
    context.strokeStyle = ink ?? color;
    context.beginPath();
    points.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](left + x * scale, top + y * scale));
    if (points.length === 1) context.lineTo(left + points[0][0] * scale + 0.01, top + points[0][1] * scale);
    context.stroke();
  }
}

/** The drawing as MNIST prepares digits: scaled to 20 of 28 pixels, its center of mass in the middle. */
function digit() {
  const points = drawing.strokes.flatMap((stroke) => stroke.points);
  const bounds = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    return [Math.min(...values), Math.max(...values)];
  });
  const side = Math.min(width, height), pen = (page.pen * side) / 28;
  const extent = Math.max(LEAST, ...bounds.map(([low, high]) => high - low));
  const scale = ((20 / 28) * side - pen) / extent;
  let [left, top] = bounds.map(([low, high], axis) => ([width, height][axis] - (low + high) * scale) / 2);
  const [x, y] = center(covered(scale, left, top, pen));
  // MNIST's centers of mass lie in the middle of the pixel right of and below the middle.
  left += width / 2 + 0.5 - x;
  top += height / 2 + 0.5 - y;
  return Uint8Array.from(covered(scale, left, top, pen), (share) => Math.round(255 * share));
}

/** The share of each pixel that the strokes cover, by drawing them enlarged. */
function covered(scale, left, top, pen) {
  const times = Math.max(1, Math.round(224 / Math.max(width, height)));
  const context = canvasOf(width * times, height * times);
  drawStrokes(context, scale * times, left * times, top * times, pen * times, "#000");
  const { data } = context.getImageData(0, 0, width * times, height * times);
  const shares = new Float64Array(width * height);
  for (let i = 3, at = 0; i < data.length; i += 4, at++) {
    const column = Math.floor((at % (width * times)) / times);
    const row = Math.floor(at / (width * times) / times);
    shares[row * width + column] += data[i] / 255 / times ** 2;
  }
  return shares;
}

function center(shares) {
  let sum = 0, x = 0, y = 0;
  shares.forEach((share, i) => {
    sum += share;
    x += share * ((i % width) + 0.5);
    y += share * (Math.floor(i / width) + 0.5);
  });
  return [x / sum, y / sum];
}

/** The whole paper as pixels, for networks that take colors. */
function painting() {
  const context = canvasOf(width, height);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  drawStrokes(context, width, 0, 0, PEN * width);
  return planes(context);
}

/** The pixels of a canvas as networks take them: all red values, then green, then blue. */
function planes(context) {
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8Array.from({ length: 3 * width * height }, (_, i) => {
    const area = width * height;
    return data[4 * (i % area) + Math.floor(i / area)];
  });
}

const blank = () => !drawing.picture && !drawing.strokes.length;

/** The pixels that the networks get, or null if nothing is drawn. */
function input() {
  if (blank()) return null;
  return drawing.picture ?? (colored ? painting() : digit());
}

/** Show pixels on a canvas; a gray pixel lies between the colors for 0 and for 255. */
function show(canvas, pixels, [low, high] = [[0, 0, 0], [255, 255, 255]]) {
  const area = width * height;
  const image = new ImageData(width, height);
  const value = (i, c) =>
    colored ? pixels[c * area + i] : low[c] + ((high[c] - low[c]) * pixels[i]) / 255;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels ? value(i, c) : 0;
    image.data[4 * i + 3] = pixels ? 255 : 0;
  }
  Object.assign(canvas, { width, height }).getContext("2d").putImageData(image, 0, 0);
}

/** The largest central part of an image file with the networks' aspect ratio, in the networks' size. */
async function opened(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(bitmap.width / width, bitmap.height / height);
  const [wide, high] = [width * scale, height * scale];
  const context = canvasOf(width, height);
  context.fillStyle = "#fff"; // shows through transparent pixels
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [left, top] = [(bitmap.width - wide) / 2, (bitmap.height - high) / 2];
  context.drawImage(bitmap, left, top, wide, high, 0, 0, width, height);
  return planes(context);
}

// --- answers ------------------------------------------------------------------------

const probabilities = (network, output) => (network.probabilities ? Array.from(output) : softmax(output));
const best = (values) => values.reduce((at, value, i) => (value > values[at] ? i : at), 0);
let milliseconds = 0; // how long the last answer took
let said = []; // name, predicted class and probability of each network

function answer() {
  const start = performance.now(), pixels = input();
  showSeen(pixels);
  if (!pixels) return showAnswers(null);
  const ready = normalized(pixels);
  showAnswers(networks.map((network) => probabilities(network, network.run(ready))));
  milliseconds = performance.now() - start;
}

/** Show what the networks see: strokes in the colors of the paper, pictures as they are. */
function showSeen(pixels) {
  show(find("seen"), pixels, drawing.picture ? undefined : [tone("--soft"), tone("--ink")]);
}

function showAnswers(found) {
  const tops = found && found.map(best);
  said = networks.map(({ name }, n) => {
    return found ? [name, page.classes[tops[n]], `, ${percent(found[n][tops[n]])}`] : [name, "–", ""];
  });
  const cards = said.map(([name, says, share]) => {
    const className = says.length > 3 ? "card long" : "card";
    return made("div", [made("b", says), made("span", name + share)], { className });
  });
  find("answers").replaceChildren(...cards);
  const rows = find("bars").tBodies[0].rows;
  const order = found && page.classes.length > MOST_ROWS ? ranked(found.at(-1)) : [...page.classes.keys()];
  for (let row = 0; row < rows.length; row++) {
    const [label, ...cells] = rows[row].cells;
    label.textContent = page.classes[order[row]];
    cells.forEach((cell, n) => {
      const share = found ? found[n][order[row]] : 0;
      cell.classList.toggle("best", found !== null && tops[n] === order[row]);
      cell.querySelector("i").style.width = `${100 * share}%`;
      cell.querySelector("span").textContent = found ? percent(share) : "";
    });
  }
}

const ranked = (values) => [...values.keys()].sort((a, b) => values[b] - values[a]);

/** Tell screen readers the answer; called at the end of a stroke, not at every move of the pen. */
function say() {
  const sentences = said.map(([name, says, share]) => `${name}: ${says}${share}`);
  find("said").textContent = blank() ? "" : sentences.join("; ");
}

// --- paper --------------------------------------------------------------------------

const paper = find("paper");
const cursor = { x: 0.5, y: height / width / 2, down: false, seen: false };
let pointer = null, waiting = false;

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name);
}

/** A color of the page, given as #rrggbb, as red, green and blue. */
const tone = (name) => style(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));

function drawPaper() {
  const context = paper.getContext("2d");
  context.fillStyle = colored ? "#fff" : style("--soft");
  context.fillRect(0, 0, paper.width, paper.height);
  if (drawing.picture) {
    context.imageSmoothingEnabled = false;
    context.drawImage(find("seen"), 0, 0, paper.width, paper.height);
  }
  drawStrokes(context, PAPER, 0, 0, PEN * PAPER, colored ? null : style("--ink"));
  if (!cursor.seen) return;
  context.strokeStyle = style("--accent");
  context.lineWidth = cursor.down ? 8 : 3;
  context.beginPath();
  context.arc(cursor.x * PAPER, cursor.y * PAPER, (PEN / 2) * PAPER, 0, 2 * Math.PI);
  context.stroke();
}

/** Draw and answer before the next frame; slow networks answer only when the pen is lifted. */
function update() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (pointer === null || milliseconds < 50) answer();
    drawPaper();
  });
}

/** Replace the drawing by a picture, or clear it. */
function put(picture) {
  Object.assign(drawing, { strokes: [], picture });
  find("trouble").textContent = "";
  cursor.down = false;
  pointer = null;
  drawingChanged();
}

function startStroke(x, y) {
  drawing.picture = null;
  drawing.strokes.push({ points: [[x, y]], color: find("ink").value });
  update();
}

function goOn(x, y) {
  drawing.strokes.at(-1).points.push([x, y]);
  update();
}

/** Called when a stroke has ended or the picture has changed. */
function drawingChanged() {
  update();
  requestAnimationFrame(say);
}

function place(event) {
  const box = paper.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.width];
}

paper.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button) return;
  pointer = event.pointerId;
  cursor.seen = cursor.down = false;
  startStroke(...place(event));
});
addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const between = event.getCoalescedEvents?.() ?? [];
  for (const each of between.length ? between : [event]) goOn(...place(each));
});
for (const name of ["pointerup", "pointercancel"])
  addEventListener(name, (event) => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    drawingChanged();
  });

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
paper.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || pointer !== null) return;
  if (event.key in STEPS) {
    const [x, y] = STEPS[event.key].map((step, axis) => cursor["xy"[axis]] + step / 28);
    cursor.x = Math.min(1, Math.max(0, x));
    cursor.y = Math.min(height / width, Math.max(0, y));
    if (cursor.down) goOn(cursor.x, cursor.y);
  } else if (event.key === " ") {
    cursor.down = !cursor.down;
    if (cursor.down) startStroke(cursor.x, cursor.y);
    else drawingChanged();
  } else if (["Delete", "Backspace", "Escape"].includes(event.key)) put(null);
  else return;
  event.preventDefault();
  cursor.seen = true;
  update();
});
paper.addEventListener("blur", () => {
  if (cursor.down) drawingChanged();
  cursor.seen = cursor.down = false;
  update();
});

// --- check and time -----------------------------------------------------------------

/** Images of noise, always the same; Images.noise of pruning/demo/writer.py makes the same. */
function noise(count) {
  let state = 1;
  return Array.from({ length: count }, () =>
    Uint8Array.from({ length: channels * height * width }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state >>> 24;
    }),
  );
}

/** Check that the networks compute in this browser what they computed in PyTorch. */
async function check() {
  const inputs = [...noise(page.noise), ...examples.map((each) => each.pixels)].map(normalized);
  let worst = 0;
  for (const { run, expected } of networks)
    for (const [i, ready] of inputs.entries()) {
      await pause();
      const found = run(ready), largest = Math.max(...expected[i].map(Math.abs)) || 1;
      expected[i].forEach((value, at) => {
        const apart = Math.abs(found[at] - value) / largest;
        worst = apart <= worst ? worst : Number.isNaN(apart) ? Infinity : apart;
      });
    }
  const line = find("check"), agrees = worst <= page.tolerance;
  line.dataset.agrees = agrees;
  line.dataset.difference = worst;
  line.textContent = agrees
    ? `Checked in this browser: on ${inputs.length} images the outputs agree with PyTorch's to ` +
      `${worst.toExponential(0)} of the largest.`
    : `The outputs differ from PyTorch's by ${worst.toExponential(0)} of the largest: do not trust them.`;
  line.classList.toggle("wrong", !agrees);
}

function timed(network, ready, passes) {
  const start = performance.now();
  for (let i = 0; i < passes; i++) network.run(ready);
  return (performance.now() - start) / passes;
}

/** Measure the time per image: the networks take turns of about 20 ms; the median of each is shown. */
async function measure() {
  const button = find("again"), ready = normalized(noise(1)[0]);
  button.disabled = true;
  const passes = [], times = networks.map(() => []);
  for (const network of networks) {
    let count = 1; // doubled until a turn is long enough; this also gives the compiler time to optimize
    while (timed(network, ready, count) * count < 20 && count < 1e5) count *= 2;
    passes.push(count);
    await pause();
  }
  const start = performance.now();
  for (let round = 0; round < 3 || (round < 15 && performance.now() - start < 2000); round++)
    for (const n of ranked(networks.map(Math.random))) {
      times[n].push(timed(networks[n], ready, passes[n]));
      await pause();
    }
  const medians = times.map((each) => each.sort((a, b) => a - b)[each.length >> 1]);
  showFact(3, medians, (value) => (value < 10 ? value.toPrecision(2) : value.toFixed(0)));
  button.disabled = false;
}

function showFact(row, values, text) {
  const [, ...cells] = find("facts").tBodies[0].rows[row].cells;
  values.forEach((value, n) => {
    cells[n].textContent = text(value);
    cells[n].dataset.value = value;
  });
  if (values.length > 1) cells.at(-1).textContent = `÷ ${(values[0] / values.at(-1)).toFixed(1)}`;
}

// --- building the page -------------------------------------------------------------

function build() {
  Object.assign(paper, { width: PAPER, height: Math.round((PAPER * height) / width) });
  paper.style.aspectRatio = `${width} / ${height}`;
  find("seen").style.aspectRatio = `${width} / ${height}`;
  for (const id of ["bars", "facts"]) {
    const ratio = id === "facts" && networks.length > 1 ? [""] : [];
    const names = [...networks.map(({ name }) => name), ...ratio];
    find(id).tHead.rows[0].append(...names.map((name) => made("th", name, { scope: "col" })));
  }
  const count = page.classes.length > MOST_ROWS ? 10 : page.classes.length;
  find("bars").classList.toggle("long", page.classes.some((name) => name.length > 2));
  find("bars").tBodies[0].append(
    ...Array.from({ length: count }, () => {
      const cells = networks.map(() =>
        made("td", made("div", [made("div", made("i"), { className: "bar" }), made("span")])),
      );
      return made("tr", [made("th", "", { scope: "row" }), ...cells]);
    }),
  );
  for (const row of find("facts").tBodies[0].rows)
    row.append(...networks.map(() => made("td", "…")), ...(networks.length > 1 ? [made("td")] : []));
  ["params", "macs", "bytes"].forEach((key, row) => {
    const values = networks.map((each) => each[key]);
    showFact(row, values, (value) => value.toLocaleString("en"));
  });
  for (const { pixels, truth } of examples) {
    const canvas = made("canvas"), label = `test image of ${page.classes[truth]}`;
    show(canvas, pixels);
    const button = made("button", canvas, { type: "button", title: label });
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => put(pixels));
    find("examples").append(button);
  }
  find("clear").addEventListener("click", () => put(null));
  find("again").addEventListener("click", measure);
  find("file").addEventListener("change", async ({ target }) => {
    if (!target.files.length) return;
    try {
      put(await opened(target.files[0]));
    } catch {
      find("trouble").textContent = "This file is not a picture that can be read.";
    }
    target.value = ""; // so that choosing the same file again is noticed
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  showAnswers(null);
  show(find("seen"), null);
  drawPaper();
}

build();
check().then(measure);
