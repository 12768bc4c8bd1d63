// A frozen policy in plain JavaScript: adbook.policy.ADPolicy with Mamba inside, one step at a time. `adbook.export` writes
// what it reads. The letters are those of adbook/mamba.py: E model width, D inner channels, N state size, K convolution,
// R rank of Δ. A test holds it against PyTorch.

const KIND = "adbook.export";
const SCHEMA = 1;

const silu = (x) => x / (1 + Math.exp(-x));
const softplus = (x) => (x > 20 ? x : Math.log1p(Math.exp(x)));
const within = (x, low, high) => Math.min(high, Math.max(low, x));

export class Policy {
  // header: the parsed JSON file; buffer: the ArrayBuffer of the weights' file. Throws an Error for people to read.
  constructor(header, buffer) {
    const weights = readTensors(header, buffer);
    const { head, shape } = header;
    this.header = header;
    this.embed = [linear(weights, "embed.0"), linear(weights, "embed.2")];
    this.layers = Array.from({ length: shape.n_layers }, (_, i) => readLayer(weights, `backbone.layers.${i}`));
    this.norm = weights["backbone.norm_f.weight"];
    this.head = linear(weights, "head");
    this.token = new Float32Array(2 * header.observation_size + header.action_size + 2);
    this.sampled = head === "gaussian";
  }

  // What it knows of a task before the first step: nothing. `act` writes into it; drop it to forget.
  initState() {
    const { d_inner: D, d_state: N, d_conv: K } = this.header.shape;
    return {
      observation: new Float32Array(this.header.observation_size), // of the step before, normalised
      action: new Float32Array(this.header.action_size), // of the step before, in units of the largest action
      known: 0, // 1 from the second step on
      layers: this.layers.map(() => ({ conv: new Float32Array(K * D), ssm: new Float32Array(N * D) })), // (K, D), (N, D)
    };
  }

  // The next action. reward: of the step before, or null to withhold it; start: whether this step opens an episode;
  // normal: gives standard normal numbers for the sampling, or null for the mean.
  act(observation, reward, start, state, normal) {
    const { normalisation: norm, action_scale: scale, action_size: A } = this.header;
    const s = observation.map((x, i) => (x - norm.observation_mean[i]) / norm.observation_std[i]);
    const r = reward === null ? 0 : (state.known * (reward - norm.reward_mean)) / norm.reward_std;
    this.token.set([...state.observation, ...state.action, r, ...s, start ? 1 : 0]);
    const out = this.head(this.backbone(this.token, state.layers));
    const action = Array.from({ length: A }, (_, i) => {
      const spread = this.sampled && normal ? Math.exp(this.logStd(out[A + i])) * normal() : 0;
      return within(out[i] + spread, -1, 1);
    });
    state.observation.set(s);
    state.action.set(action);
    state.known = 1;
    return action.map((a) => a * scale);
  }

  logStd(raw) {
    return within(raw - 0.5, this.header.log_std_min, this.header.log_std_max);
  }

  backbone(token, states) {
    const hidden = this.embed[0](token).map(gelu);
    const x = this.embed[1](hidden);
    this.layers.forEach((layer, i) => block(layer, x, states[i]));
    return rmsNorm(x, this.norm);
  }
}

// One Mamba block: adds to x (E) what it makes of it, and moves its state on by a step.
function block(layer, x, { conv, ssm }) {
  const { D, N, K, R } = layer;
  const xz = layer.inProj(rmsNorm(x, layer.norm)); // (2 D): x, then the gate z
  conv.copyWithin(0, D); // the last K inputs
  conv.set(xz.subarray(0, D), (K - 1) * D);
  const u = new Float32Array(D);
  for (let d = 0; d < D; d++) {
    let sum = layer.convBias[d];
    for (let k = 0; k < K; k++) sum += layer.conv[d * K + k] * conv[k * D + d];
    u[d] = silu(sum);
  }
  const dbc = layer.xProj(u); // (R + 2 N): Δ before its projection, B, C
  const delta = layer.dtProj(dbc.subarray(0, R)).map(softplus); // (D)
  const y = new Float32Array(D);
  for (let n = 0; n < N; n++) {
    const [B, C, at] = [dbc[R + n], dbc[R + N + n], n * D];
    for (let d = 0; d < D; d++) {
      const h = Math.exp(delta[d] * layer.A[d * N + n]) * ssm[at + d] + delta[d] * u[d] * B;
      ssm[at + d] = h;
      y[d] += h * C;
    }
  }
  for (let d = 0; d < D; d++) y[d] = (y[d] + layer.skip[d] * u[d]) * silu(xz[D + d]);
  const out = layer.outProj(y);
  for (let e = 0; e < x.length; e++) x[e] += out[e];
}

function readLayer(weights, name) {
  const mixer = `${name}.mixer`;
  const A = weights[`${mixer}.A_log`].map((a) => -Math.exp(a)); // (D, N)
  const skip = weights[`${mixer}.D`];
  const conv = weights[`${mixer}.conv1d.weight`]; // (D, K)
  const [D, N] = [skip.length, A.length / skip.length];
  return {
    D, N, K: conv.length / D, R: weights[`${mixer}.dt_proj.weight`].length / D, A, skip, conv,
    convBias: weights[`${mixer}.conv1d.bias`], norm: weights[`${name}.norm.weight`],
    inProj: linear(weights, `${mixer}.in_proj`), xProj: linear(weights, `${mixer}.x_proj`),
    dtProj: linear(weights, `${mixer}.dt_proj`), outProj: linear(weights, `${mixer}.out_proj`),
  };
}

// A linear layer, with a bias where there is one: x (inputs) to a new array (outputs).
function linear(weights, name) {
  const W = weights[`${name}.weight`];
  const bias = weights[`${name}.bias`];
  return (x) => {
    const inputs = x.length;
    const y = new Float32Array(W.length / inputs);
    for (let i = 0, w = 0; i < y.length; i++) {
      let sum = bias ? bias[i] : 0;
      for (let j = 0; j < inputs; j++, w++) sum += W[w] * x[j];
      y[i] = sum;
    }
    return y;
  };
}

function rmsNorm(x, weight) {
  const scale = 1 / Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + 1e-5);
  return x.map((v, i) => v * scale * weight[i]);
}

// x Φ(x), with Φ from a series whose terms are all positive.
function gelu(x) {
  const z = Math.min(Math.abs(x) / Math.SQRT2, 6);
  let sum = 0;
  for (let term = z, n = 1; term > 1e-17 * sum; n++) {
    sum += term;
    term *= (2 * z * z) / (2 * n + 1);
  }
  const erf = (2 / Math.sqrt(Math.PI)) * Math.exp(-z * z) * sum;
  return 0.5 * x * (1 + Math.sign(x) * erf);
}

// ---------------------------------------------------------------------------------------------------------------
// the files

function readTensors(header, buffer) {
  const again = "Load the page again, or export the policy anew.";
  if (header?.kind !== KIND) throw new Error(`This is no policy that adbook.export wrote. ${again}`);
  if (header.schema !== SCHEMA) {
    throw new Error(`The policy has schema version ${header.schema}, this page reads ${SCHEMA}. Export the policy anew.`);
  }
  const { bytes, crc32: expected, bits } = header.weights;
  if (buffer.byteLength !== bytes || crc32(new Uint8Array(buffer)) !== expected) {
    const problem = buffer.byteLength === bytes ? "other bytes than it should" : `${buffer.byteLength} of ${bytes} bytes`;
    throw new Error(`The weights' file is damaged: it has ${problem}. ${again}`);
  }
  const values = bits === 16 ? Float32Array.from(new Uint16Array(buffer), half) : new Float32Array(buffer);
  let at = 0;
  return Object.fromEntries(header.tensors.map(([name, size]) => [name, values.subarray(at, (at += size))]));
}

// A 16-bit floating-point number (IEEE 754 binary16) from its bits.
function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
}

// The check sum of zlib and zip files.
function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
