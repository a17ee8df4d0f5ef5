// DOM elements and number formats. Text becomes text nodes only: nothing on this page is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Create an element; attributes that are null, undefined or false are omitted, `on…` are listeners. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const TAIL = 6; // characters kept at the end of an identifier: long ones often share a prefix

/** Identifier of any length and script: isolated text direction, shortened in the middle if it does not fit. */
export function id(text) {
  const characters = [...text];
  if (characters.length <= 2 * TAIL) return el("bdi", { class: "id" }, el("span", {}, text));
  const halves = [characters.slice(0, -TAIL), characters.slice(-TAIL)].map((half) => half.join(""));
  return el(
    "bdi",
    { class: "id", title: text },
    halves.map((half) => el("span", {}, half)),
  );
}

/** Full identifier, on as many lines as necessary. */
export const fullId = (text) => el("bdi", { class: "full" }, text);

/** Set custom properties for the style sheet: the content security policy forbids style attributes. */
export function styled(element, properties) {
  for (const [name, value] of Object.entries(properties)) element.style.setProperty(name, value);
  return element;
}

export const $ = (name) => document.getElementById(name);

const MINUS = "−";
const signed = (text) => text.replace("-", MINUS);

export const number = (value, digits = 3) => signed(value.toFixed(digits));
export const plus = (value, digits = 3) => {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? "±0" : (value > 0 ? "+" : "") + signed(text);
};

/** Format a probability; 0 % and 100 % only for exact values. */
export function percent(value) {
  if (value > 0 && value < 0.0005) return "<0.1 %";
  if (value < 1 && value > 0.9995) return ">99.9 %";
  const digits = value >= 0.1 || value === 0 ? 0 : 1;
  return `${(100 * value).toFixed(value > 0.99 && value < 1 ? 1 : digits)} %`;
}

/** Format seconds since the start of an impression. */
export function seconds(value) {
  if (value >= 100) return duration(value);
  return `${value >= 10 || Number.isInteger(value) ? Math.round(value) : value.toFixed(1)} s`;
}

/** Format the duration of a pause or a video. */
export function duration(s) {
  if (s < 100) return `${Math.round(s)} s`;
  const parts = [
    [31_557_600, "years"],
    [86_400, "d"],
    [3600, "h"],
    [60, "min"],
  ];
  const [unit, name] = parts.find(([size]) => s >= size) ?? [1, "s"];
  const count = s / unit;
  return `${count < 10 ? Math.round(10 * count) / 10 : Math.round(count)} ${name}`;
}

const DATE_TIME = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
export const dateTime = (ms) => DATE_TIME.format(ms);

/** Axis from 0 to at least `max` with round ticks. Returns [end, step]. */
export function axis(max, ticks = 4) {
  const rough = Math.max(max, 1) / ticks;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 3, 5, 10].map((each) => each * size).find((each) => each >= rough * 0.999);
  return [Math.ceil(max / step - 1e-9) * step || step, step];
}

/** Tick labels in seconds above timelines. */
export function ruler([end, step]) {
  const marks = [];
  for (let tick = 0; tick <= end * 1.0001; tick += step) {
    marks.push(styled(el("span", {}, seconds(tick)), { "--at": `${(100 * tick) / end}%` }));
  }
  return el("div", { class: "ruler", "aria-hidden": "true" }, marks);
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
