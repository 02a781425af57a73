"use strict";
// Runs what pruning/demo/program.py writes: operations on flat Float32Arrays whose sizes are known.
// (ONNX Runtime's build for browsers would be more than ten megabytes in every page.)

/** Prepare a program with its weights. `run(input)` returns the output, which the next run overwrites. */
function makeNetwork(program, weights) {
  let offset = 0;
  const constants = program.constants.map((length) => weights.subarray(offset, (offset += length)));
  const arrays = [new Float32Array(program.input), ...program.ops.map((op) => new Float32Array(op.length))];
  const at = (number) => (number < 0 ? constants[-1 - number] : arrays[number]);
  const steps = program.ops.map((op, i) => LOOPS[op.kind](op, arrays[i + 1], ...op.in.map(at)));
  return {
    run(input) {
      arrays[0].set(input);
      for (const step of steps) step();
      return at(program.output);
    },
  };
}

/** Each takes an operation, the array it writes and those it reads, and returns a function that runs it. */
const LOOPS = {
  // Every output is a sum over the same taps, shifted: offsets from the window's first element.
  conv(op, y, x, weight, bias) {
    const [inputs, outputs] = op.channels.map((count) => count / op.groups);
    const [height, width] = op.size, [rows, columns] = op.out, [down, right] = op.stride;
    const plane = height * width, area = rows * columns;
    const taps = [];
    for (let c = 0; c < inputs; c++)
      for (let i = 0; i < op.kernel[0]; i++)
        for (let j = 0; j < op.kernel[1]; j++)
          taps.push(c * plane + i * op.dilation[0] * width + j * op.dilation[1]);
    const offsets = Int32Array.from(taps), count = offsets.length;

    // Four channels at a time, so that each input is read once for four products.
    function four(channel, from, to) {
      const w0 = channel * count, w1 = w0 + count, w2 = w1 + count, w3 = w2 + count;
      const [b0, b1, b2, b3] = bias ? bias.subarray(channel, channel + 4) : [0, 0, 0, 0];
      for (let i = 0; i < rows; i++)
        for (let j = 0; j < columns; j++, to++) {
          const start = from + i * down * width + j * right;
          let s0 = b0, s1 = b1, s2 = b2, s3 = b3;
          for (let t = 0; t < count; t++) {
            const value = x[start + offsets[t]];
            s0 += value * weight[w0 + t];
            s1 += value * weight[w1 + t];
            s2 += value * weight[w2 + t];
            s3 += value * weight[w3 + t];
          }
          y[to] = s0;
          y[to + area] = s1;
          y[to + 2 * area] = s2;
          y[to + 3 * area] = s3;
        }
    }

    function one(channel, from, to) {
      const w = channel * count, b = bias ? bias[channel] : 0;
      for (let i = 0; i < rows; i++)
        for (let j = 0; j < columns; j++, to++) {
          const start = from + i * down * width + j * right;
          let sum = b;
          for (let t = 0; t < count; t++) sum += x[start + offsets[t]] * weight[w + t];
          y[to] = sum;
        }
    }

    return () => {
      for (let image = 0; image < op.images; image++)
        for (let group = 0; group < op.groups; group++) {
          const from = (image * op.groups + group) * inputs * plane;
          let channel = group * outputs;
          const last = channel + outputs, to = image * op.groups * outputs * area;
          for (; channel + 4 <= last; channel += 4) four(channel, from, to + channel * area);
          for (; channel < last; channel++) one(channel, from, to + channel * area);
        }
    };
  },

  matmul({ batch, rows, inner, columns }, y, a, b) {
    return () => {
      for (let n = 0, to = 0; n < batch; n++)
        for (let i = 0; i < rows; i++)
          for (let j = 0; j < columns; j++, to++) {
            let sum = 0, left = (n * rows + i) * inner, right = n * inner * columns + j;
            for (let k = 0; k < inner; k++, left++, right += columns) sum += a[left] * b[right];
            y[to] = sum;
          }
    };
  },

  map(op, y, x) {
    if (op.name === "clamp") {
      const low = op.values[0] ?? -Infinity, high = op.values[1] ?? Infinity;
      return () => {
        for (let i = 0; i < y.length; i++) y[i] = x[i] < low ? low : x[i] > high ? high : x[i];
      };
    }
    const change = MAPS[op.name](...op.values);
    return () => {
      for (let i = 0; i < y.length; i++) y[i] = change(x[i]);
    };
  },

  zip(op, y, a, b, c = a) {
    const combine = ZIPS[op.name], last = op.dims.length - 1, size = op.dims[last];
    const [one, two, three = op.strides[0]] = op.strides;
    return () => {
      let to = 0;
      walk(op.dims.slice(0, last), [one, two, three], ([i, j, k]) => {
        for (let n = 0; n < size; n++, i += one[last], j += two[last], k += three[last])
          y[to++] = combine(a[i], b[j], c[k]);
      });
    };
  },

  // An input without a piece fills what the pieces leave.
  place({ pieces }, y, ...inputs) {
    const fill = inputs[pieces.length];
    return () => {
      if (fill) y.fill(fill[0]);
      pieces.forEach((piece, n) => {
        const { dims, read_strides: from, write_strides: to } = piece;
        const x = inputs[n], last = dims.length - 1;
        walk(dims.slice(0, last), [from, to], ([i, j]) => {
          i += piece.read_offset;
          j += piece.write_offset;
          for (let n = 0; n < dims[last]; n++, i += from[last], j += to[last]) y[j] = x[i];
        });
      });
    };
  },

  pool({ name, planes, size: [height, width], windows: [down, across], step }, y, x) {
    const largest = name === "max";
    return () => {
      for (let plane = 0, to = 0; plane < planes; plane++)
        for (const [top, bottom, tall] of down)
          for (const [left, right, wide] of across) {
            let found = largest ? -Infinity : 0;
            for (let i = top; i < bottom; i += step[0])
              for (let j = left; j < right; j += step[1]) {
                const value = x[(plane * height + i) * width + j];
                if (!largest) found += value;
                else if (!(value <= found)) found = value; // `value > found` would lose NaN
              }
            y[to++] = largest ? found : found / (tall * wide);
          }
    };
  },

  rows(op, y, x) {
    const work = ROWS[op.name], count = x.length / op.size, wide = y.length / count;
    return () => {
      for (let i = 0; i < count; i++)
        work(x.subarray(i * op.size, (i + 1) * op.size), y.subarray(i * wide, (i + 1) * wide), op);
    };
  },
};

/** Call `visit` at every position of some dimensions, with an offset for each of several strides. */
function walk(dims, strides, visit) {
  const offsets = strides.map(() => 0);
  (function level(axis) {
    if (axis === dims.length) return visit(offsets);
    for (let i = 0; i < dims[axis]; i++) {
      level(axis + 1);
      for (let s = 0; s < strides.length; s++) offsets[s] += strides[s][axis];
    }
    for (let s = 0; s < strides.length; s++) offsets[s] -= dims[axis] * strides[s][axis];
  })(0);
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

/** The error function by a series whose terms have the same sign; beyond 4 it is 1 in float32. */
function erf(x) {
  if (Math.abs(x) > 4) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-10 * Math.abs(sum); n++) sum += term *= (2 * x * x) / (2 * n + 1);
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

const MAPS = {
  leaky_relu: (slope) => (x) => (x < 0 ? slope * x : x),
  elu: (alpha, scale, inner) => (x) => (x > 0 ? scale * x : alpha * scale * Math.expm1(inner * x)),
  gelu: () => (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_tanh: () => (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  sigmoid: () => sigmoid,
  tanh: () => Math.tanh,
  exp: () => Math.exp,
  log: () => Math.log,
  log1p: () => Math.log1p,
  sqrt: () => Math.sqrt,
  rsqrt: () => (x) => 1 / Math.sqrt(x),
  abs: () => Math.abs,
  neg: () => (x) => -x,
  reciprocal: () => (x) => 1 / x,
  erf: () => erf,
  logical_not: () => (x) => Number(x === 0),
};

const ZIPS = {
  add: (x, y) => x + y,
  subtract: (x, y) => x - y,
  multiply: (x, y) => x * y,
  divide: (x, y) => x / y,
  maximum: Math.max,
  minimum: Math.min,
  pow: (x, y) => x ** y,
  eq: (x, y) => Number(x === y),
  ne: (x, y) => Number(x !== y),
  gt: (x, y) => Number(x > y),
  ge: (x, y) => Number(x >= y),
  lt: (x, y) => Number(x < y),
  le: (x, y) => Number(x <= y),
  where: (choice, x, y) => (choice !== 0 ? x : y),
};

/** Each takes a row and the array that receives the result: one number, or a row. */
const ROWS = {
  sum: (x, y) => (y[0] = total(x)),
  mean: (x, y) => (y[0] = total(x) / x.length),
  max: (x, y) => (y[0] = x.reduce((a, b) => Math.max(a, b))),
  min: (x, y) => (y[0] = x.reduce((a, b) => Math.min(a, b))),
  softmax: (x, y) => y.set(softmax(x)),
  log_softmax(x, y) {
    const largest = Math.max(...x);
    const log = largest + Math.log(x.reduce((sum, value) => sum + Math.exp(value - largest), 0));
    for (let i = 0; i < x.length; i++) y[i] = x[i] - log;
  },
  normalize(x, y, { eps }) {
    const mean = total(x) / x.length;
    const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
    const factor = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < x.length; i++) y[i] = (x[i] - mean) * factor;
  },
};

function total(values) {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i];
  return sum;
}

/** Probabilities of logits. */
function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = total(powers);
  return powers.map((power) => power / sum);
}
