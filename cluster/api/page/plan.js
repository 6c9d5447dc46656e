// The plan: what each stage should take and takes, and why it is so, in the server's words.

import { ringOf, weightBytes } from "./cluster.js";
import { h } from "./dom.js";
import { bytes, count, median, ms } from "./format.js";

export function planBody(cluster) {
  const { plan } = cluster;
  if (!plan) return h("p", { class: "soft" }, "There is no plan yet: it is made as soon as every node is known.");
  const users = plan.concurrency === 1 ? "1 request" : `${plan.concurrency} requests`;
  const facts = `${plan.strategy.replaceAll("_", " ")} plan for ${plan.objective}, ${count(plan.context)} tokens of context, ${users} at once`;
  return [
    h("p", { class: "soft" }, capitalised(facts), "."),
    (cluster.warnings ?? []).map((warning) => h("p", { class: "warn" }, warning)),
    h("table", {}, head(), h("tbody", {}, ringOf(cluster).stages.map(row))),
  ];
}

const COLUMNS = ["Node", "Layers", "Weights", "KV cache", "Scratch", "Budget", "Step, expected", "Step, measured"];
const SHORT = ["Layers", "Weights", "KV cache", "Scratch", "Budget", "Expected", "Measured"]; // beside each value on a phone

function head() {
  return h("thead", {}, h("tr", {}, COLUMNS.map((name, index) => h("th", { scope: "col", class: index > 1 ? "number" : "" }, name))));
}

function row({ part, node }) {
  const now = median(node.node.stats.decode_ms);
  const cells = [
    `${part.start}:${part.stop}`,
    weightBytes(node.node.footprint) ? bytes(weightBytes(node.node.footprint)) : bytes(part.weight_bytes),
    bytes(part.kv_bytes),
    bytes(part.activation_bytes),
    bytes(part.budget_bytes),
    ms(part.decode_ms),
    now === null ? "–" : ms(now),
  ];
  return h(
    "tr",
    { "data-key": `part-${part.rank}` },
    h("th", { scope: "row" }, part.node),
    cells.map((text, index) => h("td", { class: index ? "number" : "", "data-name": SHORT[index] }, text)),
  );
}

export function whyBody(why) {
  if (!why) return [];
  const unused = why.unused.map(({ nodes, text }) => [nodes.map(({ node }) => node).join(", "), `unused: ${text}`]);
  const reasons = [...why.nodes.map(({ node, text }) => [node, text]), ...unused];
  return [
    h("h3", {}, "Why it is so"),
    h("dl", { class: "why" }, reasons.map(([node, text]) => h("div", {}, h("dt", {}, node), h("dd", {}, text)))),
    why.help.length ? [h("h3", {}, "What would help"), h("ul", { class: "help" }, why.help.map((text) => h("li", {}, text)))] : null,
    why.note ? h("p", { class: "soft" }, capitalised(why.note), ".") : null,
    h("details", {}, h("summary", {}, "All that was tried"), h("pre", { class: "all", tabindex: "0" }, why.lines.join("\n"))),
  ];
}

const capitalised = (text) => text.charAt(0).toUpperCase() + text.slice(1);
