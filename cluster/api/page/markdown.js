// The part of Markdown that models write, as elements: paragraphs, headings, lists, code, emphasis, links.
// Nothing is ever parsed as HTML.

import { h } from "./dom.js";

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?!\s)(.+?)\*\*|\*(?![\s*])([^*\n]+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

export function markdown(text) {
  const blocks = [];
  const lines = text.split("\n");
  for (let index = 0; index < lines.length; ) {
    const line = lines[index];
    const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
    const item = listItem(line);
    const title = /^(#{1,6})\s+(.*)$/.exec(line);
    if (fence) {
      const code = [];
      for (index++; index < lines.length && !lines[index].trim().startsWith(fence[1]); index++) code.push(lines[index]);
      index++;
      blocks.push(h("pre", { tabindex: "0" }, h("code", {}, code.join("\n"))));
    } else if (title) {
      blocks.push(h("p", { class: "title" }, inline(title[2])));
      index++;
    } else if (item) {
      const items = [];
      for (let one; (one = listItem(lines[index] ?? "")); index++) items.push(h("li", {}, inline(one.text)));
      blocks.push(h(item.tag, item.start > 1 ? { start: item.start } : {}, items));
    } else if (!line.trim()) {
      index++;
    } else {
      const words = [];
      for (; index < lines.length && isText(lines[index]); index++) words.push(lines[index]);
      blocks.push(h("p", { class: "asked" }, inline(words.join("\n")))); // which keeps lines and indentation
    }
  }
  return blocks;
}

function isText(line) {
  return line.trim() && !listItem(line) && !/^\s*(```|~~~)/.test(line) && !/^#{1,6}\s/.test(line);
}

function listItem(line) {
  const found = /^\s*(?:([-*+])|(\d{1,4})[.)])\s+(.*)$/.exec(line);
  if (!found) return null;
  return { tag: found[1] ? "ul" : "ol", start: Number(found[2] ?? 1), text: found[3] };
}

function inline(text) {
  const parts = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) return [...parts, rest];
    if (found.index) parts.push(rest.slice(0, found.index));
    const [, ticks, code, strong, emphasis, label, url] = found;
    if (ticks) parts.push(h("code", {}, code));
    else if (strong) parts.push(h("strong", {}, inline(strong)));
    else if (emphasis) parts.push(h("em", {}, inline(emphasis)));
    else parts.push(h("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, label));
    rest = rest.slice(found.index + found[0].length);
  }
  return parts;
}
