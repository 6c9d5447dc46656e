// A card for each node: state, layers, memory, speed, and the link to the next one.

import { isAway, loadedShare, toneOf, weightBytes, wordOf } from "./cluster.js";
import { h } from "./dom.js";
import { bytes, count, ms, percent, rate, share } from "./format.js";

export function nodeList({ stages, beside }, rates, logs) {
  return [
    h("ol", { class: "nodes", "aria-label": "Stages of the ring, in order" }, stages.map((stage) => stageItem(stage, rates, logs))),
    beside.length
      ? h("ul", { class: stages.length ? "nodes beside" : "nodes alone", "aria-label": "Nodes without layers" }, beside.map((node) => item(node, { rates, logs, hasPlan: stages.length > 0 })))
      : null,
  ];
}

function stageItem({ node, part, next }, rates, logs) {
  return item(node, { part, next, rates, logs });
}

function item(node, { part, next, rates, logs, hasPlan }) {
  const tone = toneOf(node.state);
  return h(
    "li",
    { class: `node ${tone}`, "data-key": `node-${node.rank}` },
    h(
      "div",
      { class: "row" },
      h("h3", {}, node.name, node.rank === 0 ? h("span", { class: "tag" }, "head") : null),
      h("span", { class: `state ${tone}` }, stateText(node)),
    ),
    part || hasPlan ? h("p", { class: "row soft" }, h("span", {}, layersText(node, part)), part ? speed(node.rank, rates) : null) : null,
    node.state === "loading" ? loading(node) : null,
    memory(node),
    node.reason && node.state !== "waiting" ? h("p", { class: tone === "bad" ? "error" : "soft" }, node.reason) : null,
    node.node.certificate_warning ? h("p", { class: "warn" }, node.node.certificate_warning) : null,
    next && !next.isSelf ? link(next) : h("p", { class: "link" }),
    logs.section(node, tone === "bad"),
  );
}

function stateText(node) {
  if (node.state === "loading" && node.node.load_total_bytes) return `loading ${percent(loadedShare(node))}`;
  if (isAway(node) && node.age_s > 1) return `${wordOf(node.state)} for ${Math.round(node.age_s)} s`;
  return wordOf(node.state);
}

function layersText(node, part) {
  if (!part) return node.rank === 0 ? "no layers; it serves clients and draws up the plan" : "no layers in this plan";
  const number = part.stop - part.start;
  const more = [part.embed ? "embedding" : "", part.head ? "head" : ""].filter(Boolean).join(", ");
  return `${number === 1 ? "layer" : "layers"} ${part.start}:${part.stop}${more ? `, ${more}` : ""}`;
}

function speed(rank, rates) {
  const [tokens, busy] = [rates.tokens(rank), rates.busy(rank)];
  if (tokens === null || busy === null) return null;
  return h("span", { class: "speed" }, `${rate(tokens)} tok/s, ${percent(busy)} busy`);
}

function loading({ node }) {
  const total = node.load_total_bytes;
  if (!total) return node.activity ? h("p", { class: "soft" }, node.activity) : null;
  return [
    h("progress", { max: total, value: node.loaded_bytes, "aria-label": "Loading" }),
    h("p", { class: "soft" }, `${share(node.loaded_bytes, total)} loaded`),
  ];
}

// The machine's memory: our weights, our KV, what else is in use, what is free.
function memory({ node, state }) {
  const { total_bytes: total, available_bytes: free } = node.memory;
  if (!total || state === "waiting") return null;
  const weights = weightBytes(node.footprint);
  const kv = node.kv_bytes;
  const other = Math.max(0, total - free - weights - kv);
  const segments = [["weights", weights], ["kv", kv], ["used", other]];
  const text = [weights ? `weights ${bytes(weights)}` : "", kv ? `KV ${bytes(kv)}` : "", `${share(free, total)} free`];
  const pressure = node.memory_pressure;
  return [
    h("div", { class: "bar", "aria-hidden": "true" }, segments.map(([name, value]) => segment(name, value / total))),
    h(
      "p",
      { class: "soft figures" },
      text.filter(Boolean).join(" · "),
      pressure && pressure !== "normal" ? h("strong", { class: pressure === "critical" ? "error" : "warn" }, ` memory pressure: ${pressure}`) : null,
    ),
  ];
}

function segment(name, part) {
  return h("span", { class: name, style: { width: `${(100 * Math.min(1, part)).toFixed(2)}%` }, hidden: part <= 0 });
}

function link(next) {
  const place = next.isReturn ? `back to ${next.name}` : `to ${next.name}`;
  const broken = next.isUp === false;
  const shown = [next.ms === null ? "" : ms(next.ms), next.kind].filter(Boolean).join(" ");
  return h(
    "p",
    { class: `link${broken ? " error" : ""}` },
    h("span", { "aria-hidden": "true" }, next.isReturn ? "↺ " : "→ "),
    place,
    broken ? ": no connection" : shown ? `: ${shown}` : "",
    next.isWifi ? h("span", { class: "warn" }, " a cable would be faster") : null,
  );
}

export function totals(cluster, predicted) {
  const rows = [["Running", `${cluster.num_active ?? 0} of ${cluster.max_active || "…"}`]];
  if (cluster.num_queued) rows.push(["Waiting", count(cluster.num_queued)]);
  rows.push(["Answered", `${count(cluster.num_completion_tokens ?? 0)} tokens`]);
  if (cluster.context) rows.push(["Context", `${count(cluster.context)} tokens`]);
  if (predicted) rows.push(["Expected for one user", `${rate(predicted.decode_tok_s)} tok/s`]);
  return h("dl", { class: "totals" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
