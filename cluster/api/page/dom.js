// Elements from values, and the least change from what is shown to what should be. Text never becomes markup.

const SVG = "http://www.w3.org/2000/svg";

function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
export const s = (tag, attributes = {}, ...children) => make(document.createElementNS(SVG, tag), attributes, children);
export const at = (id) => document.getElementById(id);

// Makes `parent` show `next`, keeping the elements that stay: focus, selection and open details survive.
// data-key tells children apart; the children of an element with data-keep are left alone.
export function show(parent, ...next) {
  const nodes = next.flat(Infinity).filter(Boolean);
  patch(parent, nodes.map((node) => (typeof node === "string" ? document.createTextNode(node) : node)));
}

function patch(parent, next) {
  const keyed = new Map();
  const plain = [];
  for (const node of parent.childNodes) {
    if (node.dataset?.key) keyed.set(node.dataset.key, node);
    else plain.push(node);
  }
  let place = parent.firstChild;
  for (const node of next) {
    const same = take(keyed, plain, node);
    if (same && same === place) place = place.nextSibling;
    else parent.insertBefore(same ?? node, place);
    if (same) update(same, node);
  }
  for (const node of [...keyed.values(), ...plain]) node.remove();
}

function take(keyed, plain, node) {
  const key = node.dataset?.key;
  if (key) {
    const same = keyed.get(key);
    keyed.delete(key);
    return same;
  }
  const index = plain.findIndex((old) => old.nodeName === node.nodeName);
  return index < 0 ? undefined : plain.splice(index, 1)[0];
}

function update(old, node) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== node.data) old.data = node.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!node.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of [...node.attributes]) {
    if (old.getAttribute(name) === value) continue;
    if (name === "style") old.style.cssText = value; // as an attribute it would be inline style, which is refused
    else old.setAttribute(name, value);
  }
  if (!old.hasAttribute("data-keep")) patch(old, [...node.childNodes]);
}
