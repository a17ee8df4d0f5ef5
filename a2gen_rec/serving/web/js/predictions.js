// Predictions for a candidate: probability and time of every action.

import { hue, label, named, symbol } from "./actions.js";
import { axis, el, percent, plus, ruler, seconds, styled } from "./dom.js";
import { tooltip } from "./tooltips.js";

const MIN_PROBABILITY = 0.005; // symbols of less likely actions would be too small

/** One-line summary: a bar for the expected watch time; symbols at expected times, sized by probability. */
export function summaryTrack(candidate, end) {
  const position = (value) => `${Math.min(100, (100 * value) / end)}%`;
  const watch = candidate.expected_watch_s;
  const marks = Object.entries(candidate.expected_time_s)
    .filter(([name, time]) => name !== "exit" && time !== null && candidate.probability[name] >= MIN_PROBABILITY)
    .map(([name, time]) =>
      styled(symbol(name), { "--at": position(time), "--size": 0.45 + 0.55 * Math.sqrt(candidate.probability[name]) }),
    );
  return el(
    "span",
    { class: "track", "aria-hidden": "true" },
    candidate.duration_s &&
      styled(el("span", { class: `ghost${candidate.duration_s > end ? " cut" : ""}` }), {
        "--to": position(candidate.duration_s),
      }),
    watch !== null && styled(el("span", { class: "bar" }), { "--to": position(watch) }),
    marks,
  );
}

/** Time strips, one per action; then the outcomes without times, and full sequences. */
export function predictions(candidate, previous, card) {
  const actions = card.actions.slice(1);
  const others = [...Object.keys(candidate.probability)].filter((name) => !actions.includes(name));
  const times = [
    ...Object.values(candidate.expected_time_s),
    ...candidate.sequences.flatMap((each) => each.steps.map((step) => step.at_s)),
  ];
  const scale = axis(Math.max(1, ...times.filter((time) => time !== null)));
  const hasTimes = times.some((time) => time > 0);
  const changeCell = (name) =>
    previous && el("td", { class: "change" }, pointsChange(candidate.probability[name], previous.probability[name]));
  const row = (name, ...cells) => el("tr", {}, el("th", { scope: "row" }, named(name)), cells);
  const actionRows = actions.map((name) =>
    row(
      name,
      name === "exit" ? el("td", {}) : probabilityCell(candidate.probability[name], name),
      name === "exit" ? previous && el("td", {}) : changeCell(name),
      el("td", { class: "strip" }, strip(candidate, name, scale[0])),
      el("td", { class: "figure" }, timeOf(candidate.expected_time_s[name])),
    ),
  );
  const outcomeRows = others.map((name) =>
    row(name, probabilityCell(candidate.probability[name], name), changeCell(name), el("td", { colspan: 2 })),
  );
  return el(
    "section",
    { class: "card", "aria-labelledby": "predictions-title" },
    el("h3", { id: "predictions-title" }, "Predicted actions"),
    mostProbable(candidate),
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
            el("th", { scope: "col", class: "figure" }, "probability"),
            previous && el("th", { scope: "col", class: "figure" }, "change"),
            el(
              "th",
              { scope: "col", class: "strip" },
              hasTimes ? [el("span", { class: "hidden" }, "time"), ruler(scale)] : "time",
            ),
            el("th", { scope: "col", class: "figure" }, "expected"),
          ),
        ),
        el("tbody", {}, actionRows),
        el("tbody", {}, outcomeRows),
      ),
    ),
    hasTimes &&
      candidate.sequences.length > 0 &&
      el(
        "p",
        { class: "quiet" },
        "Each stroke is the time of the action in one of the most probable sequences; height shows its probability. ",
        "◆ is the expected time, given that the action occurs.",
      ),
    sequences(candidate),
  );
}

function mostProbable(candidate) {
  if (!candidate.timeline.length)
    return el(
      "p",
      { class: "quiet" },
      "This model predicts actions and times independently; it has no sequences.",
    );
  return el("p", {}, "Most probable: ", steps(candidate.timeline), ` (${percent(candidate.timeline_probability)})`);
}

function sequences(candidate) {
  if (!candidate.sequences.length) return null;
  const total = candidate.sequences.reduce((sum, each) => sum + each.probability, 0);
  return el(
    "details",
    {},
    el("summary", {}, `${candidate.sequences.length} most probable sequences, total ${percent(Math.min(1, total))}`),
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
    timeline.map((step, index) => [
      index > 0 && " → ",
      el(
        "span",
        { class: "step" },
        index > 0 && symbol(step.action),
        label(step.action),
        index > 0 && step.at_s !== null && ` ${seconds(step.at_s)}`,
      ),
    ]),
  );

const timeOf = (time) => (time === null || time === undefined ? "–" : seconds(time));

function probabilityCell(value, name) {
  return el(
    "td",
    { class: "figure" },
    styled(el("span", { class: `probability ${hue(name)}` }, percent(value)), { "--to": `${100 * value}%` }),
  );
}

/** Change since the previous ranking in percentage points. */
function pointsChange(now, before) {
  return `${plus(100 * (now - before), 1)} pp`;
}

function strip(candidate, name, end) {
  const expected = candidate.expected_time_s[name];
  const position = (value) => `${(100 * value) / end}%`;
  const strokes = candidate.sequences
    .map((each) => ({ probability: each.probability, at_s: each.steps.find((step) => step.action === name)?.at_s }))
    .filter((each) => each.at_s !== null && each.at_s !== undefined);
  if (!strokes.length && (expected === null || expected === undefined))
    return el("span", { class: "quiet" }, "times are not recorded");
  const maxProbability = Math.max(...candidate.sequences.map((each) => each.probability), 1e-9);
  const box = el(
    "span",
    { class: `over ${hue(name)}`, "aria-hidden": "true" },
    strokes.map((each) => {
      const height = 15 + 85 * Math.sqrt(each.probability / maxProbability);
      return styled(el("i", {}), { "--at": position(each.at_s), "--tall": `${height}%` });
    }),
    expected !== null && styled(el("b", {}, "◆"), { "--at": position(expected) }),
  );
  tooltip(box, () =>
    strokes.length
      ? strokes.map((each) => `${seconds(each.at_s)}: ${percent(each.probability)}`)
      : [`${label(name)}: in none of the most probable sequences`],
  );
  return box;
}
