// Asks for the cluster once a second while the page is seen, and shows it. All data comes with the user's key.

import { ApiError, get, getIfThere, key } from "./api.js";
import { Chat } from "./chat.js";
import { loadedShare, ringOf, toneOf } from "./cluster.js";
import { at, h, show } from "./dom.js";
import { percent, rate } from "./format.js";
import { Logs } from "./logs.js";
import { nodeList, totals } from "./nodes.js";
import { planBody, whyBody } from "./plan.js";
import { Rates } from "./rates.js";
import { requestsBody } from "./requests.js";
import { ringPicture } from "./ring.js";

const EVERY_MS = 1000;
const MANY = 6; // nodes: more stand in two columns, below the ring
const STATE_WORDS = { ok: "serving", starting: "starting", loading: "loading", degraded: "not serving" };

const rates = new Rates();
const logs = new Logs();
const chat = new Chat();
let why = { digest: null, told: null };
let timer = 0;
let isIn = false;
let isPolling = false;

async function poll() {
  clearTimeout(timer);
  if (isPolling) return;
  isPolling = true;
  try {
    const cluster = await get("v1/cluster");
    if (!isIn) await enter();
    rates.add(cluster, performance.now() / 1e3);
    render(cluster);
    notice("");
    await Promise.all([logs.refresh(), explain(cluster)]);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) leave(key.get() ? "This is no key of this cluster." : "");
    else notice(error.status === 0 ? "The server cannot be reached; what you see is old. Trying again." : error.message);
  } finally {
    isPolling = false;
    if (!document.hidden && at("sign-in").hidden) timer = setTimeout(poll, EVERY_MS);
  }
}

async function enter() {
  isIn = true;
  at("sign-in").hidden = true;
  at("board").hidden = at("sections").hidden = false;
  at("sign-out").hidden = !key.get();
  if (key.get() && document.activeElement === document.body) at("question").focus({ preventScroll: true });
  await Promise.all([logs.probe(), chat.load()]);
}

function leave(reason) {
  isIn = false;
  key.clear();
  at("board").hidden = at("sections").hidden = at("sign-out").hidden = true;
  at("sign-in").hidden = false;
  at("key-error").textContent = reason;
  for (const id of ["state", "model", "reason", "ring", "nodes", "plan-body", "why-body", "requests-body"]) show(at(id));
  notice("");
  at("key").focus();
}

async function explain(cluster) {
  const digest = cluster.plan?.digest ?? null;
  if (digest !== why.digest && cluster.status === "ok") {
    why = { digest, told: digest && (await getIfThere("v1/cluster/why").catch(() => null)) };
  }
  show(at("why-body"), whyBody(why.digest === digest ? why.told : null));
}

function render(cluster) {
  const ring = ringOf(cluster);
  const word = STATE_WORDS[cluster.status] ?? cluster.status;
  document.title = cluster.status === "ok" ? "macrame" : `${word} – macrame`;
  show(at("model"), cluster.model);
  show(at("state"), h("span", { class: `state ${cluster.status === "degraded" ? "bad" : toneOf(cluster.status)}` }, word));
  show(at("reason"), reason(cluster));
  show(at("ring"), ringPicture(ring.stages, center(cluster, ring), rates), totals(cluster, cluster.plan?.predicted));
  at("picture").classList.toggle("many", cluster.nodes.length > MANY);
  show(at("nodes"), nodeList(ring, rates, logs));
  show(at("plan-body"), planBody(cluster));
  show(at("requests-body"), requestsBody(cluster));
}

function reason(cluster) {
  if (cluster.status === "ok" || !cluster.reason) return null;
  return h("p", { class: `notice ${cluster.status === "degraded" ? "bad" : ""}` }, cluster.reason);
}

function center(cluster, { stages }) {
  if (cluster.status === "degraded") return { big: "Down", tone: "bad" };
  if (cluster.status !== "ok") {
    const share = stages.length ? stages.reduce((sum, { node }) => sum + loadedShare(node), 0) / stages.length : 0;
    return share ? { big: percent(share), small: "loaded" } : { big: "Starting" };
  }
  return rates.answers ? { big: rate(rates.answers), small: "tok/s" } : { big: "Idle" };
}

function notice(text) {
  show(at("notices"), text ? h("p", { class: "notice bad" }, text) : null);
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  at("key-error").textContent = "";
  at("sign-in").hidden = true;
  poll();
});
at("sign-out").addEventListener("click", () => {
  chat.clear(); // the key may be another user's next
  leave("");
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
poll();
