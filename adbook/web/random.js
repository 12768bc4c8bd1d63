// Random numbers from a seed: the same seed gives the same run in every browser.

// Numbers in [0, 1) with 32 random bits each, by Mulberry32 (Tommy Ettinger, public domain).
export function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Normal numbers from uniform ones, by Box and Muller.
export const normal = (draw) => () => Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
