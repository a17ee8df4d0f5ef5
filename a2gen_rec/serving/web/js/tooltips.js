// One tooltip for the page, on hover and on focus; Escape hides it, and the pointer may rest on it.

import { $ } from "./dom.js";

let owner = null;
let hideTimer = 0;

/** Show `lines()` while `element` is hovered or has the focus. */
export function tooltip(element, lines) {
  const show = () => open(element, lines());
  element.addEventListener("pointerenter", show);
  element.addEventListener("focus", show);
  element.addEventListener("pointerleave", () => (hideTimer = setTimeout(() => close(element), 120)));
  element.addEventListener("blur", () => close(element));
  return element;
}

function open(element, lines) {
  clearTimeout(hideTimer);
  close(owner);
  const box = $("tooltip");
  box.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  box.hidden = false;
  owner = element;
  element.setAttribute("aria-describedby", "tooltip");
  const anchor = element.getBoundingClientRect();
  const viewport = document.documentElement;
  const left = Math.min(Math.max(8, anchor.left + 24), viewport.clientWidth - box.offsetWidth - 8);
  const below = anchor.bottom + 6 + box.offsetHeight < viewport.clientHeight;
  box.style.setProperty("left", `${Math.max(8, left)}px`);
  box.style.setProperty("top", `${below ? anchor.bottom + 6 : Math.max(8, anchor.top - box.offsetHeight - 6)}px`);
}

function close(element) {
  if (!element || element !== owner) return;
  element.removeAttribute("aria-describedby");
  $("tooltip").hidden = true;
  owner = null;
}

document.addEventListener("keydown", (event) => event.key === "Escape" && close(owner));
document.addEventListener("scroll", () => close(owner), { passive: true });
$("tooltip").addEventListener("pointerenter", () => clearTimeout(hideTimer));
$("tooltip").addEventListener("pointerleave", () => close(owner));
