// The ranked list: ranks, rank changes and a one-line summary of each candidate.

import { label } from "./actions.js";
import { axis, el, id, number, percent, plural, plus, seconds } from "./dom.js";
import { summaryTrack } from "./predictions.js";

const FALLBACKS = {
  unknown_user: "Unknown user: the ranking uses only the recorded history, if any.",
  empty_history: "No recorded impressions of this user: the ranking uses no history.",
  history_unavailable: "Event store unavailable: the ranking uses no history.",
};

/** Messages about the fallbacks of a ranking. */
export function fallbacks(answer) {
  const messages = answer.fallbacks.map((kind) =>
    kind === "unknown_items"
      ? `${answer.unknown_items} of ${plural(answer.num_candidates, "candidate")} unknown to the model: ` +
        "unknown items have equal item features."
      : (FALLBACKS[kind] ?? kind),
  );
  return messages.length
    ? el(
        "ul",
        { class: "banner", "aria-label": "Fallbacks used" },
        messages.map((each) => el("li", {}, each)),
      )
    : "";
}

/** Item -> index in a ranking. */
const indices = (answer) => new Map(answer.candidates.map((each, index) => [each.item, index]));

/** Summary of the rank changes since the previous ranking; "" without one. */
export function changes(answer, previous, cause, stop) {
  if (!previous) return "";
  const indexBefore = indices(previous);
  const moves = answer.candidates.map((each, index) => ({
    item: each.item,
    up: indexBefore.has(each.item) ? indexBefore.get(each.item) - index : null,
  }));
  const moved = moves.filter((each) => each.up !== 0).length;
  const largest = moves.filter((each) => each.up > 0).sort((a, b) => b.up - a.up)[0];
  return el(
    "p",
    { class: "compared" },
    el(
      "span",
      {},
      `${cause}: ${moved} of ${plural(moves.length, "rank")} changed. `,
      largest && ["Largest rise: ", id(largest.item), ` ▲${largest.up}. `],
    ),
    el("button", { type: "button", class: "plain", onclick: stop }, "Stop comparing"),
  );
}

/**
 * Draw the list into `container`.
 *
 * previous: the ranking to compare with, or null; selected: item with open details; select(item): called on a click.
 */
export function drawList(container, answer, previous, selected, select) {
  const indexBefore = previous && indices(previous);
  const before = new Map(previous?.candidates.map((each) => [each.item, each]));
  const [end] = axis(
    Math.max(
      1,
      ...answer.candidates.flatMap((each) => [
        each.expected_watch_s ?? 0,
        ...Object.values(each.expected_time_s).map((time) => time ?? 0),
      ]),
    ),
  );
  const hasTimes = answer.candidates.some((each) => Object.values(each.expected_time_s).some((time) => time !== null));
  container.replaceChildren(
    ...answer.candidates.map((each, index) => {
      const open = each.item === selected;
      const reference = before.get(each.item);
      const rise = indexBefore?.has(each.item) ? indexBefore.get(each.item) - index : null;
      const button = el(
        "button",
        {
          type: "button",
          class: "candidate",
          "aria-expanded": String(open),
          "aria-controls": "details",
          onclick: () => select(each.item),
        },
        el("span", { class: "rank" }, String(index + 1)),
        el("span", { class: "move" }, indexBefore && rankChange(rise)),
        el("span", { class: "name" }, id(each.item), !each.known && el("span", { class: "mark" }, "unknown")),
        el(
          "span",
          { class: "value" },
          value(each, answer.sort_by),
          reference && el("small", {}, valueChange(each, reference, answer.sort_by)),
        ),
        hasTimes && summaryTrack(each, end),
        el(
          "span",
          { class: "watch" },
          each.expected_watch_s === null || answer.sort_by === "watch"
            ? ""
            : [el("span", { class: "hidden" }, "expected watch time "), seconds(each.expected_watch_s)],
        ),
      );
      const item = el("li", { class: open ? "selected" : null }, button);
      item.dataset.item = each.item;
      item.style.order = index;
      return item;
    }),
  );
}

const originalCells = new WeakMap(); // row of a previewed candidate -> original content of its cells

/** Show the list with the rank and score of a what-if result; null restores it. */
export function preview(container, answer, item, result) {
  const index = answer.candidates.findIndex((each) => each.item === item);
  const candidate = answer.candidates[index];
  [...container.children].forEach((row, at) => {
    let rank = at + 1;
    if (result && at === index) rank = result.rank;
    else if (result) rank += (at >= result.rank - 1 && at < index) - (at > index && at <= result.rank - 1);
    // Equal orders keep the order of the document: a candidate that leaves the list goes behind all others.
    row.style.order = 2 * rank + (result && at === index && result.rank > container.children.length ? 1 : 0);
    row.classList.toggle("preview", Boolean(result) && at === index);
    row.querySelector(".rank").textContent = rank;
    if (at !== index) return;
    const cells = [row.querySelector(".value"), row.querySelector(".move")];
    if (!originalCells.has(row))
      originalCells.set(
        row,
        cells.map((cell) => [...cell.childNodes]),
      );
    const changed = result && [
      [number(result.score), el("small", {}, plus(result.score - candidate.score))],
      [rankChange(index + 1 - result.rank)],
    ];
    cells.forEach((cell, column) => cell.replaceChildren(...(changed ?? originalCells.get(row))[column]));
  });
}

function rankChange(up) {
  if (up === null) return el("span", { class: "new" }, "new");
  if (up === 0) return el("span", { class: "same" }, "=", el("span", { class: "hidden" }, " same rank"));
  return el(
    "span",
    { class: up > 0 ? "up" : "down" },
    `${up > 0 ? "▲" : "▼"}${Math.abs(up)}`,
    el("span", { class: "hidden" }, up > 0 ? " up" : " down"),
  );
}

/** Value of the sort key. */
function value(candidate, sortBy) {
  if (sortBy === "ensemble") return candidate.score === null ? "–" : number(candidate.score);
  if (sortBy === "watch") return candidate.expected_watch_s === null ? "–" : seconds(candidate.expected_watch_s);
  return percent(candidate.probability[sortBy]);
}

function valueChange(now, before, sortBy) {
  if (sortBy === "ensemble") return plus(now.score - before.score);
  if (sortBy === "watch") return `${plus(now.expected_watch_s - before.expected_watch_s, 1)} s`;
  return `${plus(100 * (now.probability[sortBy] - before.probability[sortBy]), 1)} pp`;
}

/** One-sentence summary of a ranking. */
export function summary(answer, ms) {
  const key =
    { ensemble: "ensemble score", watch: "expected watch time" }[answer.sort_by] ??
    `probability of ${label(answer.sort_by)}`;
  const ascending = answer.ascending ? ", ascending" : "";
  const history = plural(answer.history_length, "past impression");
  const candidates = plural(answer.num_candidates, "candidate");
  return `${candidates} ranked by ${key}${ascending}, with ${history}, in ${number(ms, 0)} ms.`;
}
