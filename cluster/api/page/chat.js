// The chat: asks /v1/chat/completions, shows the answer as it comes, and stops it when told. Kept in memory only.

import { get, stream } from "./api.js";
import { at, h, show } from "./dom.js";
import { count, rate } from "./format.js";
import { markdown } from "./markdown.js";

const SHOW_EVERY_MS = 60;

export class Chat {
  #messages = []; // {role, content, thinking, error, stats, element}
  #running = null; // AbortController
  #isAtEnd = true; // the newest line is seen, and stays so

  constructor() {
    at("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.#running.abort();
      else this.#send();
    });
    at("question").addEventListener("keydown", (event) => this.#onKey(event));
    at("chat-clear").addEventListener("click", () => this.clear());
    at("messages").addEventListener("click", (event) => {
      const code = event.target.closest("[data-copy]")?.parentElement.querySelector("code");
      if (code) navigator.clipboard?.writeText(code.textContent);
      if (event.target.closest("[data-again]")) this.#again();
    });
    new ResizeObserver(() => this.#stick()).observe(at("messages"));
    at("messages").addEventListener("scroll", () => (this.#isAtEnd = isAtEnd(at("messages"))));
    this.#empty();
  }

  // Fills the choice of models, where there is one.
  async load() {
    const { data } = await get("v1/models");
    show(at("chat-model"), data.map(({ id }) => h("option", { value: id }, id)));
    at("model-field").hidden = data.length < 2;
  }

  clear() {
    this.#running?.abort();
    this.#messages = [];
    this.#empty();
    at("chat-clear").hidden = true;
    at("question").focus();
  }

  #onKey(event) {
    if (event.key === "Escape" && this.#running) this.#running.abort();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
    event.preventDefault();
    if (!this.#running) this.#send();
  }

  #send() {
    const content = at("question").value.trim();
    if (!content) return;
    at("question").value = "";
    this.#add({ role: "user", content });
    this.#answer();
  }

  #again() {
    if (this.#running) return;
    this.#messages.pop().element.remove();
    this.#answer();
  }

  #add(message) {
    if (!this.#messages.length) show(at("messages"));
    message.element = h("article", { class: `message ${message.role}` });
    this.#messages.push(message);
    at("messages").append(message.element);
    at("chat-clear").hidden = false;
    this.#render(message);
    this.#isAtEnd = true;
    this.#stick();
    return message;
  }

  #body() {
    const system = at("system").value.trim();
    const known = this.#messages.filter(({ error, content }) => !error && content);
    const body = {
      messages: known.map(({ role, content }) => ({ role, content })),
      stream: true,
      stream_options: { include_usage: true },
    };
    if (system) body.messages.unshift({ role: "system", content: system });
    if (at("chat-model").value) body.model = at("chat-model").value;
    if (at("temperature").value) body.temperature = Number(at("temperature").value);
    if (at("max-tokens").value) body.max_tokens = Number(at("max-tokens").value);
    return body;
  }

  async #answer() {
    const body = this.#body();
    const message = this.#add({ role: "assistant", content: "", thinking: "", isRunning: true });
    this.#running = new AbortController();
    this.#setRunning(true);
    const times = { begin: performance.now(), first: 0, last: 0 };
    let [raw, reasoning, finish, usage, shownAt] = ["", "", "", null, 0];
    try {
      for await (const event of stream("v1/chat/completions", body, this.#running.signal)) {
        const choice = event.choices?.[0];
        raw += choice?.delta?.content ?? "";
        reasoning += choice?.delta?.reasoning_content ?? "";
        finish = choice?.finish_reason ?? finish;
        usage = event.usage ?? usage;
        if (choice?.delta?.content || choice?.delta?.reasoning_content) {
          times.last = performance.now();
          times.first ||= times.last;
        }
        if (performance.now() - shownAt < SHOW_EVERY_MS) continue;
        shownAt = performance.now();
        Object.assign(message, split(raw, reasoning));
        this.#render(message);
      }
    } catch (error) {
      if (error.name === "AbortError") finish = "stopped";
      else message.error = error.message;
    }
    Object.assign(message, split(raw, reasoning), { isRunning: false, stats: stats(times, usage, finish) });
    this.#running = null;
    this.#render(message);
    this.#setRunning(false);
    at("chat-news").textContent = message.error || `Answer: ${message.content}`;
  }

  #setRunning(isRunning) {
    at("send").textContent = isRunning ? "Stop" : "Send";
    at("messages").setAttribute("aria-busy", isRunning);
    if (isRunning) at("chat-news").textContent = "The model is answering.";
  }

  #render(message) {
    const isUser = message.role === "user";
    show(
      message.element,
      h("h3", { class: "hidden" }, isUser ? "You" : "Answer"),
      message.thinking ? thinking(message) : null,
      h("div", { class: "text" }, isUser ? h("p", { class: "asked" }, message.content) : withCopy(markdown(message.content))),
      message.isRunning && !message.content && !message.thinking ? h("p", { class: "soft" }, "Waiting for the first token…") : null,
      message.error ? h("p", { class: "error" }, message.error, " ", h("button", { type: "button", class: "again", "data-again": true }, "Try again")) : null,
      message.stats ? h("p", { class: "soft stats" }, message.stats) : null,
    );
    this.#stick();
  }

  #stick() {
    if (this.#isAtEnd) at("messages").scrollTop = at("messages").scrollHeight;
  }

  #empty() {
    show(at("messages"), h("p", { class: "soft empty" }, "All nodes of the ring compute an answer together. Nothing of the chat is stored."));
  }
}

function isAtEnd(box) {
  return box.scrollTop + box.clientHeight >= box.scrollHeight - 24;
}

function thinking({ thinking: text, content, isRunning }) {
  const isOpen = isRunning && !content;
  return h("details", { class: "thinking", open: isOpen }, h("summary", {}, isOpen ? "Thinking" : "Thought"), h("p", { class: "asked" }, text));
}

// The reasoning of models that write it between think tags, apart from the answer.
function split(raw, reasoning) {
  const begin = raw.indexOf("<think>");
  const end = raw.indexOf("</think>");
  if (end >= 0) {
    const inside = raw.slice(begin >= 0 ? begin + 7 : 0, end);
    return { thinking: (reasoning + inside).trim(), content: raw.slice(end + 8).trimStart() };
  }
  if (begin >= 0) return { thinking: (reasoning + raw.slice(begin + 7)).trim(), content: raw.slice(0, begin).trim() };
  return { thinking: reasoning.trim(), content: raw };
}

function withCopy(blocks) {
  return blocks.map((block) =>
    block.nodeName === "PRE"
      ? h("div", { class: "code" }, block, navigator.clipboard ? h("button", { type: "button", class: "quiet", "data-copy": true, "aria-label": "Copy the code" }, "Copy") : null)
      : block,
  );
}

function stats({ begin, first, last }, usage, finish) {
  const parts = [];
  const tokens = usage?.completion_tokens ?? 0;
  if (tokens) parts.push(`${count(tokens)} tokens`);
  if (tokens > 1 && last > first) parts.push(`${rate(((tokens - 1) * 1000) / (last - first))} tok/s`);
  if (first) parts.push(`first token after ${((first - begin) / 1000).toFixed(2)} s`);
  if (finish === "length") parts.push("cut at its longest length");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}
