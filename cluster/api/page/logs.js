// The newest log lines of a node, which the head keeps also of one that died; nothing where a server has none.

import { getIfThere } from "./api.js";
import { at, h, show } from "./dom.js";
import { clock } from "./format.js";

const LINES = 200;
const AGAIN_MS = 3000;

export class Logs {
  #isThere = true;
  #fetchedAt = new Map(); // rank -> ms
  #opened = new Set(); // ranks that were opened for the user, once each time they fail

  // Where a node's lines will be; opened by itself when the node fails.
  section(node, isBad) {
    if (!this.#isThere || node.state === "waiting") return null;
    const opens = isBad && !this.#opened.has(node.rank);
    if (isBad) this.#opened.add(node.rank);
    else this.#opened.delete(node.rank);
    if (opens) queueMicrotask(() => at(`log-${node.rank}`)?.setAttribute("open", ""));
    return h(
      "details",
      { class: "log", id: `log-${node.rank}`, "data-rank": node.rank, "data-key": "log" },
      h("summary", {}, "Log"),
      h("div", { class: "lines", id: `lines-${node.rank}`, "data-keep": true, tabindex: "0", role: "region", "aria-label": `Log of ${node.name}` }),
    );
  }

  // Fetches what is open and not fresh.
  async refresh() {
    for (const details of document.querySelectorAll("details.log[open]")) {
      const rank = Number(details.dataset.rank);
      if (performance.now() - (this.#fetchedAt.get(rank) ?? -Infinity) < AGAIN_MS) continue;
      this.#fetchedAt.set(rank, performance.now());
      const told = await getIfThere(`v1/cluster/logs?rank=${rank}&lines=${LINES}`);
      if (told === null) {
        this.#isThere = false;
        return;
      }
      this.#show(rank, told.logs.find((log) => log.rank === rank)?.lines ?? []);
    }
  }

  // Whether this server keeps logs at all.
  async probe() {
    this.#isThere = (await getIfThere("v1/cluster/logs?rank=0&lines=1")) !== null;
  }

  #show(rank, lines) {
    const box = at(`lines-${rank}`);
    if (!box) return;
    const isAtEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
    show(box, lines.length ? lines.map(row) : h("p", { class: "soft" }, "It has said nothing yet."));
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }
}

function row(line) {
  const level = line.level.toLowerCase();
  const tone = level.startsWith("err") || level.startsWith("crit") ? "error" : level.startsWith("warn") ? "warn" : "";
  return h(
    "p",
    { class: tone },
    h("time", { class: "soft" }, clock(line.time_s)),
    " ",
    tone ? `${level}: ` : "",
    line.message,
    line.request_id ? h("span", { class: "soft" }, ` ${line.request_id}`) : null,
  );
}
