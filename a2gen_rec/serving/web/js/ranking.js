// The ranked list: places, how they moved, and what each candidate is expected to do, at a glance.

import { label } from "./actions.js";
import { axis, el, id, number, percent, plural, plus, seconds } from "./dom.js";
import { glance } from "./predicted.js";

const FALLBACKS = {
  unknown_user: "The model has never seen this user: the ranking rests on the recorded history alone, if there is any.",
  empty_history: "Nothing is recorded of this user yet: the ranking knows no past.",
  history_unavailable: "The store of impressions does not answer: the ranking was made without the user's past.",
};

/** What the ranking had to make do with, in words. */
export function fallbacks(answer) {
  const words = answer.fallbacks.map((kind) =>
    kind === "unknown_items"
      ? `The model does not know ${answer.unknown_items} of the ${plural(answer.ranked, "candidate")}: ` +
        "all unknown items look alike to it."
      : (FALLBACKS[kind] ?? kind),
  );
  return words.length
    ? el(
        "ul",
        { class: "banner", "aria-label": "What the ranking had to make do with" },
        words.map((each) => el("li", {}, each)),
      )
    : "";
}

/** Where each candidate was in the ranking before: item -> place from 0. */
const places = (answer) => new Map(answer.candidates.map((each, place) => [each.item, place]));

/** What changed since, in a sentence or two; "" with nothing to compare. */
export function changed(answer, before, cause, stop) {
  if (!before) return "";
  const was = places(before);
  const moves = answer.candidates.map((each, place) => ({
    item: each.item,
    up: was.has(each.item) ? was.get(each.item) - place : null,
  }));
  const moved = moves.filter((each) => each.up !== 0).length;
  const most = moves.filter((each) => each.up > 0).sort((a, b) => b.up - a.up)[0];
  return el(
    "p",
    { class: "compared" },
    el(
      "span",
      {},
      `${cause}: ${moved} of ${plural(moves.length, "place")} changed. `,
      most && ["Most up: ", id(most.item), ` ▲${most.up}. `],
    ),
    el("button", { type: "button", class: "plain", onclick: stop }, "Stop comparing"),
  );
}

/**
 * Draw the list into `place`.
 *
 * before: the ranking to compare with, or null; chosen: its item is open; choose(item): called when one is asked for.
 */
export function drawList(place, answer, before, chosen, choose) {
  const was = before && places(before);
  const former = new Map(before?.candidates.map((each) => [each.item, each]));
  const [end] = axis(
    Math.max(
      1,
      ...answer.candidates.flatMap((each) => [
        each.expected_watch_s ?? 0,
        ...Object.values(each.expected_at_s).map((time) => time ?? 0),
      ]),
    ),
  );
  const hasTimes = answer.candidates.some((each) => Object.values(each.expected_at_s).some((time) => time !== null));
  place.replaceChildren(
    ...answer.candidates.map((each, at) => {
      const open = each.item === chosen;
      const now = value(each, answer.by);
      const then = former.has(each.item) ? value(former.get(each.item), answer.by) : null;
      const button = el(
        "button",
        {
          type: "button",
          class: "candidate",
          "aria-expanded": String(open),
          "aria-controls": "detail",
          onclick: () => choose(each.item),
        },
        el("span", { class: "place" }, String(at + 1)),
        el("span", { class: "move" }, was && movement(was.has(each.item) ? was.get(each.item) - at : null)),
        el("span", { class: "name" }, id(each.item), !each.known && el("span", { class: "mark" }, "unknown")),
        el(
          "span",
          { class: "value" },
          now,
          then !== null && el("small", {}, difference(each, former.get(each.item), answer.by)),
        ),
        hasTimes && glance(each, end),
        el(
          "span",
          { class: "watch" },
          each.expected_watch_s === null || answer.by === "watch"
            ? ""
            : [el("span", { class: "hidden" }, "expected to be watched "), seconds(each.expected_watch_s)],
        ),
      );
      const item = el("li", { class: open ? "chosen" : null }, button);
      item.dataset.item = each.item;
      item.style.order = at;
      return item;
    }),
  );
}

const asRanked = new WeakMap(); // row of a supposed candidate -> what its cells held

/** Show the list as if the candidate had another place and score; null shows it as it is. */
export function suppose(place, answer, item, nudged) {
  const own = answer.candidates.findIndex((each) => each.item === item);
  const each = answer.candidates[own];
  [...place.children].forEach((row, at) => {
    let shown = at + 1;
    if (nudged && at === own) shown = nudged.place;
    else if (nudged) shown += (at >= nudged.place - 1 && at < own) - (at > own && at <= nudged.place - 1);
    // Equal orders keep the order of the document: one that leaves the list goes behind all others.
    row.style.order = 2 * shown + (nudged && at === own && nudged.place > place.children.length ? 1 : 0);
    row.classList.toggle("supposed", Boolean(nudged) && at === own);
    row.querySelector(".place").textContent = shown;
    if (at !== own) return;
    const cells = [row.querySelector(".value"), row.querySelector(".move")];
    if (!asRanked.has(row))
      asRanked.set(
        row,
        cells.map((cell) => [...cell.childNodes]),
      );
    const supposed = nudged && [
      [number(nudged.score), el("small", {}, plus(nudged.score - each.score))],
      [movement(own + 1 - nudged.place)],
    ];
    cells.forEach((cell, which) => cell.replaceChildren(...(supposed ?? asRanked.get(row))[which]));
  });
}

function movement(up) {
  if (up === null) return el("span", { class: "new" }, "new");
  if (up === 0) return el("span", { class: "same" }, "=", el("span", { class: "hidden" }, " same place"));
  return el(
    "span",
    { class: up > 0 ? "up" : "down" },
    `${up > 0 ? "▲" : "▼"}${Math.abs(up)}`,
    el("span", { class: "hidden" }, up > 0 ? " up" : " down"),
  );
}

/** What orders the list, as a figure. */
function value(candidate, by) {
  if (by === "ensemble") return candidate.score === null ? "–" : number(candidate.score);
  if (by === "watch") return candidate.expected_watch_s === null ? "–" : seconds(candidate.expected_watch_s);
  return percent(candidate.probability[by]);
}

function difference(now, then, by) {
  if (by === "ensemble") return plus(now.score - then.score);
  if (by === "watch") return `${plus(now.expected_watch_s - then.expected_watch_s, 1)} s`;
  return `${plus(100 * (now.probability[by] - then.probability[by]), 1)} pp`;
}

/** A ranking in a sentence. */
export function summary(answer, ms) {
  const by =
    { ensemble: "the ensemble's score", watch: "expected watch time" }[answer.by] ??
    `the chance of ${label(answer.by)}`;
  const least = answer.least_first ? ", least first" : "";
  const past = plural(answer.history, "past impression");
  return `${plural(answer.ranked, "candidate")} ranked by ${by}${least}, from ${past}, in ${number(ms, 0)} ms.`;
}
