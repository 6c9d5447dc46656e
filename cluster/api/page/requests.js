// What runs and what waits at the head.

import { h } from "./dom.js";
import { count, duration } from "./format.js";

const WORDS = { queued: "waiting", prefill: "reading", decode: "answering" };

export function requestsBody(cluster) {
  const requests = cluster.requests ?? [];
  if (!requests.length) return h("p", { class: "soft" }, "Nothing is running.");
  return h("ul", { class: "requests" }, requests.map((request) => row(request, cluster.model)));
}

function row(request, model) {
  const isReading = request.state === "prefill";
  const [done, all] = isReading
    ? [request.prefilled_tokens, request.prompt_tokens]
    : [request.completion_tokens, request.max_tokens];
  return h(
    "li",
    { "data-key": `request-${request.id}` },
    h("span", { class: `state ${request.state === "queued" ? "idle" : "good"}` }, WORDS[request.state] ?? request.state),
    h("code", { class: "id", title: request.id }, request.id),
    h("progress", { max: all || 1, value: request.state === "queued" ? 0 : done, "aria-label": isReading ? "Prompt read" : "Answer written" }),
    h("span", { class: "figures" }, `${count(request.prompt_tokens)} in, ${count(request.completion_tokens)} of ${count(request.max_tokens)} out`),
    h("span", { class: "age soft" }, duration(request.age_s)),
    request.model && request.model !== model ? h("span", { class: "tag" }, request.model) : null,
  );
}
