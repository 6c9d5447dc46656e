// Counters to rates per second, over a short window that begins when something happens after a silence.

const WINDOW_S = 4;

export class Rate {
  #samples = []; // [seconds, count]

  // Adds what a counter stands at, by its own clock; a counter or clock that fell begins anew.
  add(seconds, count) {
    const last = this.#samples.at(-1);
    if (last && (seconds < last[0] || count < last[1])) this.#samples = [];
    if (!last || seconds !== last[0]) this.#samples.push([seconds, count]);
    const samples = this.#samples;
    while (samples.length > 2 && (seconds - samples[0][0] > WINDOW_S || samples[0][1] === samples[1][1])) samples.shift();
    return this;
  }

  // Per second; null before there are two samples.
  get value() {
    if (this.#samples.length < 2) return null;
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    return (last[1] - first[1]) / (last[0] - first[0]);
  }
}

// What is known of the speed of the ring and of each node.
export class Rates {
  #answers = new Rate();
  #nodes = new Map(); // rank -> {tokens, busy}

  add(cluster, nowS) {
    if (cluster.num_completion_tokens !== undefined) this.#answers.add(nowS, cluster.num_completion_tokens);
    for (const { rank, node } of cluster.nodes) {
      const known = this.#nodes.get(rank) ?? { tokens: new Rate(), busy: new Rate() };
      const seconds = node.stats.uptime_ms / 1e3;
      known.tokens.add(seconds, node.stats.num_tokens);
      known.busy.add(seconds, node.stats.busy_ms / 1e3);
      this.#nodes.set(rank, known);
    }
  }

  get answers() {
    return this.#answers.value;
  }

  tokens(rank) {
    return this.#nodes.get(rank)?.tokens.value ?? null;
  }

  busy(rank) {
    return this.#nodes.get(rank)?.busy.value ?? null;
  }
}
