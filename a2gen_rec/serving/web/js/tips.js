// One tooltip for the page: on hover and on focus alike; Escape takes it away, and the pointer may rest on it.

import { $ } from "./dom.js";

let owner = null;
let leaving = 0;

/** Show `lines()` while `element` is hovered or has the focus. */
export function tip(element, lines) {
  const show = () => open(element, lines());
  element.addEventListener("pointerenter", show);
  element.addEventListener("focus", show);
  element.addEventListener("pointerleave", () => (leaving = setTimeout(() => close(element), 120)));
  element.addEventListener("blur", () => close(element));
  return element;
}

function open(element, lines) {
  clearTimeout(leaving);
  close(owner);
  const box = $("tip");
  box.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  box.hidden = false;
  owner = element;
  element.setAttribute("aria-describedby", "tip");
  const at = element.getBoundingClientRect();
  const room = document.documentElement;
  const left = Math.min(Math.max(8, at.left + 24), room.clientWidth - box.offsetWidth - 8);
  const below = at.bottom + 6 + box.offsetHeight < room.clientHeight;
  box.style.setProperty("left", `${Math.max(8, left)}px`);
  box.style.setProperty("top", `${below ? at.bottom + 6 : Math.max(8, at.top - box.offsetHeight - 6)}px`);
}

function close(element) {
  if (!element || element !== owner) return;
  element.removeAttribute("aria-describedby");
  $("tip").hidden = true;
  owner = null;
}

document.addEventListener("keydown", (event) => event.key === "Escape" && close(owner));
document.addEventListener("scroll", () => close(owner), { passive: true });
$("tip").addEventListener("pointerenter", () => clearTimeout(leaving));
$("tip").addEventListener("pointerleave", () => close(owner));
