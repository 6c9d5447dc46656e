// What /v1/cluster says, in the shape that the page shows. Pure.

import { median } from "./format.js";

const AWAY = ["waiting", "unreachable", "frozen"];
const STATE_WORDS = {
  waiting: "not there yet",
  unreachable: "gone",
  frozen: "silent",
  idle: "idle",
  loading: "loading",
  connecting: "connecting",
  ready: "ready",
  failed: "failed",
  draining: "stopping",
};
const KIND_WORDS = {
  thunderbolt: "over Thunderbolt",
  ethernet: "over Ethernet",
  wifi: "over Wi-Fi",
  loopback: "on this machine",
  virtual: "over a virtual interface",
};
const PARTS = ["layers", "embed", "norm", "head", "other"];

export const wordOf = (state) => STATE_WORDS[state] ?? state;

// good, busy (on its way), bad (somebody has to look), or idle
export function toneOf(state) {
  if (state === "ready" || state === "ok") return "good";
  if (state === "loading" || state === "connecting" || state === "starting" || state === "waiting") return "busy";
  return state === "idle" ? "idle" : "bad";
}

export const isAway = (node) => AWAY.includes(node.state);
export const weightBytes = (footprint) => PARTS.reduce((sum, part) => sum + footprint[`${part}_bytes`], 0);

// Stages in ring order, each {node, part, next: {rank, name, ms, kind}}; and the nodes beside the ring.
export function ringOf(cluster) {
  const byRank = new Map(cluster.nodes.map((node) => [node.rank, node]));
  const parts = cluster.plan?.assignments ?? [];
  const stages = parts.filter((part) => byRank.has(part.rank)).map((part) => ({ part, node: byRank.get(part.rank) }));
  const head = byRank.get(0);
  stages.forEach((stage, index) => {
    const next = stages[index + 1]?.node ?? head ?? stages[0].node;
    stage.next = linkTo(stage.node, next, index === stages.length - 1);
  });
  const inRing = new Set(stages.map(({ node }) => node.rank));
  const beside = cluster.nodes.filter((node) => !inRing.has(node.rank));
  return { stages, beside };
}

function linkTo(node, next, isReturn) {
  const { recent_hop_ms: times, recent_hop_rank: ranks } = node.node.stats;
  const edge = (node.node.edges ?? []).find((one) => one.to_rank === next.rank);
  return {
    rank: next.rank,
    name: next.name,
    isReturn,
    isSelf: next.rank === node.rank,
    isUp: edge ? edge.is_up : null,
    ms: median(times.filter((_, index) => ranks[index] === next.rank)),
    kind: edge?.kind && edge.kind !== "unknown" ? (KIND_WORDS[edge.kind] ?? edge.kind) : "",
    isWifi: edge?.kind === "wifi",
  };
}

// How much of its weights a node has, 0 to 1.
export function loadedShare({ state, node }) {
  if (state === "ready" || state === "connecting") return 1;
  if (state !== "loading") return 0;
  return node.load_total_bytes ? Math.min(1, node.loaded_bytes / node.load_total_bytes) : 0;
}
