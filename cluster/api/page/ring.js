// The ring as a picture: a bead for each layer, in the order in which a token goes through them, clockwise.

import { loadedShare, toneOf } from "./cluster.js";
import { h, s } from "./dom.js";
import { ms, rate } from "./format.js";

const [WIDTH, HEIGHT] = [400, 326];
const [CX, CY] = [WIDTH / 2, 156];
const [INNER, OUTER] = [100, 122];
const MAX_NAMES = 12; // of stages: more have no room
const MAX_LATENCIES = 6;

export function ringPicture(stages, center, rates) {
  const total = stages.reduce((sum, { part }) => sum + part.stop - part.start, 0);
  const gap = stages.length > 12 ? 3 : stages.length > 6 ? 6 : 10; // degrees between two stages
  const perLayer = (360 - gap * stages.length) / Math.max(1, total);
  const shapes = [];
  let angle = -90 + gap / 2;
  for (const stage of stages) {
    const layers = stage.part.stop - stage.part.start;
    const sweep = layers * perLayer;
    shapes.push(...beads(stage, angle, perLayer, layers));
    if (stages.length <= MAX_NAMES) shapes.push(name(stage, angle + sweep / 2));
    angle += sweep;
    shapes.push(arrow(angle + gap / 2, gap));
    if (stages.length <= MAX_LATENCIES && stage.next.ms !== null && !stage.next.isSelf) {
      shapes.push(latency(stage.next.ms, angle + gap / 2));
    }
    angle += gap;
  }
  if (!stages.length) shapes.push(s("circle", { class: "track", cx: CX, cy: CY, r: (INNER + OUTER) / 2 }));
  const words = stages.map((stage) => spoken(stage, rates)).join("; ");
  const label = stages.length ? `Ring of ${stages.length}: ${words}` : "No plan yet";
  return h(
    "figure",
    { class: "ring" },
    s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, shapes, middle(center)),
    stages.length ? h("figcaption", { class: "soft" }, "Each bead is a layer. A token goes round clockwise.") : null,
  );
}

function middle({ big, small, tone }) {
  return s(
    "g",
    { class: `middle ${tone ?? ""}` },
    s("text", { class: "big", x: CX, y: small ? CY + 4 : CY + 12 }, big),
    small ? s("text", { class: "small", x: CX, y: CY + 27 }, small) : null,
  );
}

function beads({ node }, start, perLayer, layers) {
  const space = Math.min(0.9, perLayer * 0.22);
  const loaded = loadedShare(node) * layers;
  const tone = toneOf(node.state);
  return Array.from({ length: layers }, (_, index) => {
    const state = tone === "bad" ? "bad" : index + 1 <= loaded + 1e-9 ? "good" : "empty";
    const from = start + index * perLayer + space / 2;
    return s("path", { class: `bead ${state}`, d: sector(from, from + perLayer - space) });
  });
}

function sector(from, to) {
  const big = to - from > 180 ? 1 : 0;
  const [a, b, c, d] = [point(OUTER, from), point(OUTER, to), point(INNER, to), point(INNER, from)];
  return `M${a}A${OUTER} ${OUTER} 0 ${big} 1 ${b}L${c}A${INNER} ${INNER} 0 ${big} 0 ${d}Z`;
}

function name({ node, part }, angle) {
  const cos = Math.cos((angle * Math.PI) / 180);
  const anchor = cos > 0.35 ? "start" : cos < -0.35 ? "end" : "middle";
  const [x, y] = point(OUTER + 12, angle).split(" ").map(Number);
  const lift = Math.sin((angle * Math.PI) / 180) * 10; // above the ring upwards, below it downwards
  return s(
    "g",
    { class: "name", "text-anchor": anchor },
    s("text", { x, y: y + lift }, shortened(node.name)),
    s("text", { class: "soft", x, y: y + lift + 15 }, `${part.start}:${part.stop}`),
  );
}

function arrow(angle, gap) {
  const size = Math.min(4, gap * 0.5);
  const [x, y] = point((INNER + OUTER) / 2, angle).split(" ");
  const d = `M${-size / 2} ${-size}L${size / 2} 0L${-size / 2} ${size}`;
  return s("path", { class: "arrow", d, transform: `translate(${x} ${y}) rotate(${(angle + 90).toFixed(1)})` });
}

function latency(value, angle) {
  const cos = Math.cos((angle * Math.PI) / 180);
  const anchor = cos > 0.35 ? "end" : cos < -0.35 ? "start" : "middle";
  const [x, y] = point(INNER - (anchor === "middle" ? 16 : 8), angle).split(" ");
  return s("text", { class: "latency", x, y: Number(y) + 4, "text-anchor": anchor }, ms(value));
}

function point(radius, angle) {
  const radians = (angle * Math.PI) / 180;
  return `${(CX + radius * Math.cos(radians)).toFixed(2)} ${(CY + radius * Math.sin(radians)).toFixed(2)}`;
}

function spoken({ node, part }, rates) {
  const tokens = rates.tokens(node.rank);
  const speed = tokens ? `, ${rate(tokens)} tokens a second` : "";
  return `${node.name}, layers ${part.start} to ${part.stop - 1}, ${node.state}${speed}`;
}

const shortened = (text) => (text.length > 11 ? `${text.slice(0, 10)}…` : text);
