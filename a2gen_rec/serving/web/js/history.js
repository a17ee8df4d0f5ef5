// The user's history: one row per impression, newest first, with a bar for the watch time and symbols for the actions.

import { label, legend, symbol } from "./actions.js";
import { axis, dateTime, duration, el, id, plural, ruler, seconds, styled } from "./dom.js";
import { tooltip } from "./tooltips.js";

const MIN_PAUSE_S = 30; // shorter pauses between impressions are not shown

/** Draw impressions (oldest first, as in the response) into `container`; `durations`: seconds by item. */
export function drawHistory(container, impressions, durations, card) {
  if (!impressions.length) {
    const text = "No recorded impressions of this user. Add one here, or send events to /v1/events.";
    container.replaceChildren(el("p", { class: "empty" }, text));
    return;
  }
  const scale = axis(cutoff(impressions.map(endOf)));
  const names = card.actions.filter((name) =>
    impressions.some((each) => each.actions.some((action) => action.name === name)),
  );
  const parts = [];
  for (const session of sessions(impressions, card.session_gap_s)) {
    if (session.pause) parts.push(el("p", { class: "pause" }, `${duration(session.pause)} pause`));
    const rows = session.impressions.map((each, index) => row(each, session.impressions[index + 1], durations, scale));
    const title = `${dateTime(session.impressions.at(-1).ts_ms)} · ${plural(rows.length, "impression")}`;
    parts.push(el("h3", {}, title), el("ul", { class: "rows" }, rows));
  }
  container.replaceChildren(legend(names), ruler(scale), ...parts);
  addRovingFocus([...container.querySelectorAll(".timeline")]);
}

/** Known end of an impression in seconds since its start. */
const endOf = (impression) =>
  Math.max(impression.watch_s ?? 0, ...impression.actions.map((action) => action.at_s ?? 0));

/** End of the axis, so that a few very long impressions do not compress all others. */
function cutoff(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const max = sorted.at(-1);
  const typical = sorted[Math.floor(0.9 * (sorted.length - 1))];
  return max <= 2 * typical ? max : 1.25 * typical;
}

/** Sessions, newest first; a new one starts after a gap longer than the model's. */
function sessions(impressions, gap) {
  const result = [];
  for (const each of impressions) {
    const last = result.at(-1)?.impressions.at(-1);
    const elapsed = last ? (each.ts_ms - last.ts_ms) / 1000 : Infinity;
    if (elapsed > gap) result.push({ impressions: [], pause: 0 });
    result.at(-1).impressions.push(each);
  }
  for (let index = 1; index < result.length; index++) {
    // The pause is shown above the older session, since the newest comes first.
    result[index - 1].pause = pauseBefore(result[index].impressions[0], result[index - 1].impressions.at(-1));
  }
  return result.reverse().map((each) => ({ ...each, impressions: each.impressions.toReversed() }));
}

const pauseBefore = (later, earlier) => Math.max(0, (later.ts_ms - earlier.ts_ms) / 1000 - endOf(earlier));

function row(impression, previous, durations, [end]) {
  const videoS = durations[impression.item];
  const position = (value) => `${Math.min(100, (100 * value) / end)}%`;
  const pause = previous ? pauseBefore(impression, previous) : 0;
  const known = impression.watch_s !== null;
  const timed = impression.actions.filter((action) => action.at_s !== null);
  const untimed = impression.actions.filter((action) => action.at_s === null);
  const track = el(
    "div",
    { class: "track" },
    videoS && styled(el("span", { class: `ghost${videoS > end ? " cut" : ""}` }), { "--to": position(videoS) }),
    styled(el("span", { class: `bar${known ? "" : " open"}${endOf(impression) > end ? " cut" : ""}` }), {
      "--to": position(endOf(impression)),
    }),
    timed.map((action) => styled(symbol(action.name), { "--at": position(Math.min(action.at_s, 0.97 * end)) })),
    untimed.length > 0 &&
      styled(
        el(
          "span",
          { class: "untimed" },
          untimed.map((action) => symbol(action.name)),
        ),
        { "--at": position(endOf(impression)) },
      ),
  );
  const timeline = el(
    "div",
    { class: "timeline", role: "img", tabindex: "-1", "aria-label": description(impression, videoS).join(", ") },
    id(impression.item),
    track,
    el("span", { class: "figure" }, known ? seconds(impression.watch_s) : "?"),
  );
  tooltip(timeline, () => [...description(impression, videoS), dateTime(impression.ts_ms)]);
  const rest = pause >= MIN_PAUSE_S && el("span", { class: "rest" }, `${duration(pause)} pause`);
  return el("li", {}, timeline, rest);
}

function description(impression, videoS) {
  const of = videoS ? ` of ${seconds(videoS)}` : "";
  const actions = impression.actions.map(
    (action) => `${label(action.name)} ${action.at_s === null ? "at an unknown time" : `at ${seconds(action.at_s)}`}`,
  );
  const watched = impression.watch_s === null ? "watch time unknown" : `watched ${seconds(impression.watch_s)}${of}`;
  return [impression.item, watched, ...(actions.length ? actions : ["no action"])];
}

/** Roving tab index: one tab stop for all rows; arrow keys, Home and End move between them. */
function addRovingFocus(rows) {
  rows[0].tabIndex = 0;
  rows.forEach((row, index) => {
    row.addEventListener("keydown", (event) => {
      const to = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (to === undefined || !rows[to]) return;
      event.preventDefault();
      moveFocus(row, rows[to]);
      rows[to].focus();
    });
    row.addEventListener("focus", () =>
      moveFocus(
        rows.find((other) => other.tabIndex === 0),
        row,
      ),
    );
  });
}

function moveFocus(from, to) {
  if (from) from.tabIndex = -1;
  to.tabIndex = 0;
}
