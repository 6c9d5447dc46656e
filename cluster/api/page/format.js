// Numbers for people. 1 GB is 10^9 bytes.

export function bytes(value) {
  for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= factor) return `${digits(value / factor)} ${unit}`;
  }
  return `${value} B`;
}

// As "9.2 of 16.0 GB", one unit for both.
export function share(part, whole) {
  const unit = bytes(whole).split(" ")[1];
  const [value, own] = bytes(part).split(" ");
  return own === unit ? `${value} of ${bytes(whole)}` : `${bytes(part)} of ${bytes(whole)}`;
}

export const ms = (value) => `${value < 10 ? value.toFixed(2) : digits(value)} ms`;
export const rate = (value) => digits(value);
export const count = (value) => value.toLocaleString("en");
export const percent = (share) => `${Math.round(100 * Math.min(1, Math.max(0, share)))} %`;

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

export function median(values) {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
}

function digits(value) {
  return (value >= 100 ? value.toFixed(0) : value.toFixed(value >= 1 ? 1 : 2)).replace(/\.0+$/, "");
}
