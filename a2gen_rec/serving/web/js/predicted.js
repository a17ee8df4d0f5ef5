// What is predicted of a candidate: how likely every action is, and when.

import { hue, label, named, symbol } from "./actions.js";
import { axis, el, percent, plus, ruler, seconds, styled } from "./dom.js";
import { tip } from "./tips.js";

const SURE = 0.005; // symbols of less likely actions would be specks

/** A candidate in one line: the expected watch time as a bar; symbols at expected times, larger the likelier. */
export function glance(candidate, end) {
  const at = (value) => `${Math.min(100, (100 * value) / end)}%`;
  const watch = candidate.expected_watch_s;
  const marks = Object.entries(candidate.expected_at_s)
    .filter(([name, time]) => name !== "exit" && time !== null && candidate.probability[name] >= SURE)
    .map(([name, time]) =>
      styled(symbol(name), { "--at": at(time), "--size": 0.45 + 0.55 * Math.sqrt(candidate.probability[name]) }),
    );
  return el(
    "span",
    { class: "track", "aria-hidden": "true" },
    candidate.length_s &&
      styled(el("span", { class: `ghost${candidate.length_s > end ? " cut" : ""}` }), {
        "--to": at(candidate.length_s),
      }),
    watch !== null && styled(el("span", { class: "bar" }), { "--to": at(watch) }),
    marks,
  );
}

/** Strips over time, one per action; below them the outcomes that have no moment, and whole sequences. */
export function predicted(candidate, former, card) {
  const actions = card.actions.slice(1);
  const others = [...Object.keys(candidate.probability)].filter((name) => !actions.includes(name));
  const times = [
    ...Object.values(candidate.expected_at_s),
    ...candidate.sequences.flatMap((each) => each.steps.map((step) => step.at_s)),
  ];
  const scale = axis(Math.max(1, ...times.filter((time) => time !== null)));
  const hasTimes = times.some((time) => time > 0);
  const change = (name) =>
    former && el("td", { class: "change" }, shift(candidate.probability[name], former.probability[name]));
  const row = (name, ...cells) => el("tr", {}, el("th", { scope: "row" }, named(name)), cells);
  const inTime = actions.map((name) =>
    row(
      name,
      name === "exit" ? el("td", {}) : chance(candidate.probability[name], name),
      name === "exit" ? former && el("td", {}) : change(name),
      el("td", { class: "strip" }, strip(candidate, name, scale[0])),
      el("td", { class: "figure" }, when(candidate.expected_at_s[name])),
    ),
  );
  const inAll = others.map((name) =>
    row(name, chance(candidate.probability[name], name), change(name), el("td", { colspan: 2 })),
  );
  return el(
    "section",
    { class: "card", "aria-labelledby": "predicted-title" },
    el("h3", { id: "predicted-title" }, "What would happen"),
    likeliest(candidate),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": "Actions over time" },
      el(
        "table",
        { class: "strips" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "action"),
            el("th", { scope: "col", class: "figure" }, "chance"),
            former && el("th", { scope: "col", class: "figure" }, "change"),
            el(
              "th",
              { scope: "col", class: "strip" },
              hasTimes ? [el("span", { class: "hidden" }, "when"), ruler(scale)] : "when",
            ),
            el("th", { scope: "col", class: "figure" }, "expected"),
          ),
        ),
        el("tbody", {}, inTime),
        el("tbody", {}, inAll),
      ),
    ),
    hasTimes &&
      candidate.sequences.length > 0 &&
      el(
        "p",
        { class: "quiet" },
        "Each stroke is one of the likeliest sequences: where it has the action, taller the likelier. ",
        "◆ is the expected time, should the action happen.",
      ),
    sequences(candidate),
  );
}

function likeliest(candidate) {
  if (!candidate.timeline.length)
    return el(
      "p",
      { class: "quiet" },
      "This model tells whether and when actions happen, but makes no sequences of them.",
    );
  return el("p", {}, "Most likely: ", steps(candidate.timeline), ` (${percent(candidate.timeline_probability)})`);
}

function sequences(candidate) {
  if (!candidate.sequences.length) return null;
  const all = candidate.sequences.reduce((sum, each) => sum + each.probability, 0);
  return el(
    "details",
    {},
    el("summary", {}, `The ${candidate.sequences.length} likeliest sequences, together ${percent(Math.min(1, all))}`),
    el(
      "ol",
      { class: "sequences" },
      candidate.sequences.map((each) =>
        el("li", {}, el("span", { class: "figure" }, percent(each.probability)), steps(each.steps)),
      ),
    ),
  );
}

const steps = (timeline) =>
  el(
    "span",
    { class: "steps" },
    timeline.map((step, place) => [
      place > 0 && " → ",
      el(
        "span",
        { class: "step" },
        place > 0 && symbol(step.action),
        label(step.action),
        place > 0 && step.at_s !== null && ` ${seconds(step.at_s)}`,
      ),
    ]),
  );

const when = (time) => (time === null || time === undefined ? "–" : seconds(time));

function chance(value, name) {
  return el(
    "td",
    { class: "figure" },
    styled(el("span", { class: `chance ${hue(name)}` }, percent(value)), { "--to": `${100 * value}%` }),
  );
}

/** Percentage points since the former ranking. */
function shift(now, before) {
  return `${plus(100 * (now - before), 1)} pp`;
}

function strip(candidate, name, end) {
  const expected = candidate.expected_at_s[name];
  const at = (value) => `${(100 * value) / end}%`;
  const strokes = candidate.sequences
    .map((each) => ({ chance: each.probability, at_s: each.steps.find((step) => step.action === name)?.at_s }))
    .filter((each) => each.at_s !== null && each.at_s !== undefined);
  if (!strokes.length && (expected === null || expected === undefined))
    return el("span", { class: "quiet" }, "times are not in the log");
  const largest = Math.max(...candidate.sequences.map((each) => each.probability), 1e-9);
  const box = el(
    "span",
    { class: `over ${hue(name)}`, "aria-hidden": "true" },
    strokes.map((each) =>
      styled(el("i", {}), { "--at": at(each.at_s), "--tall": `${15 + 85 * Math.sqrt(each.chance / largest)}%` }),
    ),
    expected !== null && styled(el("b", {}, "◆"), { "--at": at(expected) }),
  );
  tip(box, () =>
    strokes.length
      ? strokes.map((each) => `${seconds(each.at_s)}: ${percent(each.chance)}`)
      : [`${label(name)}: not in any of the likeliest sequences`],
  );
  return box;
}
