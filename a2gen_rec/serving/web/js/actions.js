// Appearance of actions and objectives: a symbol, a color and the name.

import { el, svg } from "./dom.js";

const HUES = 10;
const SHAPES = {
  heart: "M8 14.2 2.2 8.4a3.6 3.6 0 0 1 0-5.2 3.7 3.7 0 0 1 5.2 0l.6.6.6-.6a3.7 3.7 0 0 1 5.2 0 3.6 3.6 0 0 1 0 5.2z",
  bubble: "M2 2h12a1 1 0 0 1 1 1v7a1 1 0 0 1-1 1H8l-4 3.8V11H2a1 1 0 0 1-1-1V3a1 1 0 0 1 1-1z",
  plus: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zm1 6h3v2H9v3H7V9H4V7h3V4h2z",
  star: "m8 1 2.1 4.5 4.9.6-3.6 3.4.9 4.9L8 12l-4.3 2.4.9-4.9L1 6.1l4.9-.6z",
  arrow: "M9.5 2.5 15.5 8l-6 5.5V10C5.5 10 3 11 .8 14 1 9 4 6 9.5 6z",
  pointer: "m3.5 1 10 7.5-4.4.6 2.5 4.8-2 1-2.4-4.9-3.2 3z",
  cart: "M.8 2h2.5l.5 2H15l-1.7 6.5H4.9L2.4 3.5H.8zM5.5 12a1.5 1.5 0 1 1 0 3a1.5 1.5 0 0 1 0-3zM10.5 12h3v3h-3z",
  bag: "M4.5 5V4.5a3.5 3.5 0 0 1 7 0V5H14l.8 10H1.2L2 5zM6 5h4v-.5a2 2 0 0 0-4 0z",
  cross: "M3 1.2 8 6.2l5-5L14.8 3l-5 5 5 5-1.8 1.8-5-5-5 5L1.2 13l5-5-5-5z",
  eye: "M8 3c3.5 0 6 2.3 7.5 5C14 10.7 11.5 13 8 13S2 10.7.5 8C2 5.3 4.5 3 8 3zm0 2a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  person: "M8 1.5a3.2 3.2 0 1 1 0 6.4 3.2 3.2 0 0 1 0-6.4zM1.5 15a6.5 6 0 0 1 13 0z",
  stop: "M3 2.5h2v11H3zM8 4l5.5 4L8 12z",
  disc: "M8 2a6 6 0 1 1 0 12A6 6 0 0 1 8 2z",
  diamond: "m8 1 7 7-7 7-7-7z",
  triangle: "m8 1.5 7 12.5H1z",
  square: "M2.5 2.5h11v11h-11z",
  drop: "m8 14.5-7-12.5h14z",
  hexagon: "M4.5 2h7L15 8l-3.5 6h-7L1 8z",
};
// Names of actions vary between logs; the first matching pattern selects the symbol.
const PATTERNS = [
  [/dislike|hate|negative|report|block/, "cross"],
  [/like|love|thumb/, "heart"],
  [/comment|reply/, "bubble"],
  [/follow|subscribe/, "plus"],
  [/collect|favou?rite|save|bookmark/, "star"],
  [/forward|share|repost/, "arrow"],
  [/cart/, "cart"],
  [/buy|order|pay|purchase/, "bag"],
  [/profile|author/, "person"],
  [/view|watch|glance|specification|page/, "eye"],
  [/click|tap|effective/, "pointer"],
  [/^exit$/, "stop"],
];
const OTHER_SHAPES = ["disc", "diamond", "triangle", "square", "drop", "hexagon"];

let names = [];

/** Set all names in order; the order defines their colors and symbols. */
export function setNames(all) {
  names = [...new Set(all)];
}

export const hue = (name) => (name === "exit" ? "hue-exit" : `hue${Math.max(names.indexOf(name), 0) % HUES}`);
export const label = (name) => name.replaceAll("_", " ");

export function symbol(name, attributes = {}) {
  const other = OTHER_SHAPES[Math.max(names.indexOf(name), 0) % OTHER_SHAPES.length];
  const shape = PATTERNS.find(([pattern]) => pattern.test(name))?.[1] ?? other;
  return svg(
    "svg",
    { viewBox: "0 0 16 16", class: `symbol ${hue(name)}`, "aria-hidden": "true", ...attributes },
    svg("path", { d: SHAPES[shape], "fill-rule": "evenodd" }),
  );
}

export const named = (name) => el("span", { class: "named" }, symbol(name), label(name));
export const legend = (names) =>
  el(
    "ul",
    { class: "legend" },
    names.map((name) => el("li", {}, named(name))),
  );
