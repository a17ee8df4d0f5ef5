// A user's past: one row per impression, newest first, a bar as long as the watch time, marks where actions were.

import { label, legend, symbol } from "./actions.js";
import { axis, duration, el, id, moment, plural, ruler, seconds, styled } from "./dom.js";
import { tip } from "./tips.js";

const PAUSE_S = 30; // shorter ones between impressions go without saying

/** Draw impressions (oldest first, as the service has them) into `place`. */
export function drawHistory(place, impressions, lengths, card) {
  if (!impressions.length) {
    const nothing = "Nothing is recorded of this user. Add an impression, or send what happens to /v1/events.";
    place.replaceChildren(el("p", { class: "empty" }, nothing));
    return;
  }
  const scale = axis(cutoff(impressions.map(ends)));
  const names = card.actions.filter((name) =>
    impressions.some((each) => each.actions.some((done) => done.name === name)),
  );
  const parts = [];
  for (const session of sessions(impressions, card.session_gap_s)) {
    if (session.pause) parts.push(el("p", { class: "pause" }, `${duration(session.pause)} pause`));
    const rows = session.impressions.map((each, at) => row(each, session.impressions[at + 1], lengths, scale));
    const title = `${moment(session.impressions.at(-1).ts_ms)} · ${plural(rows.length, "impression")}`;
    parts.push(el("h3", {}, title), el("ul", { class: "rows" }, rows));
  }
  place.replaceChildren(legend(names), ruler(scale), ...parts);
  rove([...place.querySelectorAll(".timeline")]);
}

/** What is known of an impression's end, in seconds. */
const ends = (each) => Math.max(each.watch_s ?? 0, ...each.actions.map((done) => done.at_s ?? 0));

/** Where the axis ends: a few very long impressions must not squeeze all others. */
function cutoff(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const most = sorted.at(-1);
  const usual = sorted[Math.floor(0.9 * (sorted.length - 1))];
  return most <= 2 * usual ? most : 1.25 * usual;
}

/** Newest first; a session ends where the next impression begins more than the model's gap later. */
function sessions(impressions, gap) {
  const found = [];
  for (const each of impressions) {
    const last = found.at(-1)?.impressions.at(-1);
    const apart = last ? (each.ts_ms - last.ts_ms) / 1000 : Infinity;
    if (apart > gap) found.push({ impressions: [], pause: 0 });
    found.at(-1).impressions.push(each);
  }
  for (let place = 1; place < found.length; place++) {
    // Above the older of the two, since the newest comes first.
    found[place - 1].pause = pauseBefore(found[place].impressions[0], found[place - 1].impressions.at(-1));
  }
  return found.reverse().map((each) => ({ ...each, impressions: each.impressions.toReversed() }));
}

const pauseBefore = (later, earlier) => Math.max(0, (later.ts_ms - earlier.ts_ms) / 1000 - ends(earlier));

function row(each, before, lengths, [end]) {
  const length = lengths[each.item];
  const at = (value) => `${Math.min(100, (100 * value) / end)}%`;
  const pause = before ? pauseBefore(each, before) : 0;
  const known = each.watch_s !== null;
  const timed = each.actions.filter((done) => done.at_s !== null);
  const untimed = each.actions.filter((done) => done.at_s === null);
  const track = el(
    "div",
    { class: "track" },
    length && styled(el("span", { class: `ghost${length > end ? " cut" : ""}` }), { "--to": at(length) }),
    styled(el("span", { class: `bar${known ? "" : " open"}${ends(each) > end ? " cut" : ""}` }), {
      "--to": at(ends(each)),
    }),
    timed.map((done) => styled(symbol(done.name), { "--at": at(Math.min(done.at_s, 0.97 * end)) })),
    untimed.length > 0 &&
      styled(
        el(
          "span",
          { class: "untimed" },
          untimed.map((done) => symbol(done.name)),
        ),
        { "--at": at(ends(each)) },
      ),
  );
  const timeline = el(
    "div",
    { class: "timeline", role: "img", tabindex: "-1", "aria-label": told(each, length).join(", ") },
    id(each.item),
    track,
    el("span", { class: "figure" }, known ? seconds(each.watch_s) : "?"),
  );
  tip(timeline, () => [...told(each, length), moment(each.ts_ms)]);
  const rest = pause >= PAUSE_S && el("span", { class: "rest" }, `${duration(pause)} pause`);
  return el("li", {}, timeline, rest);
}

function told(each, length) {
  const of = length ? ` of ${seconds(length)}` : "";
  const actions = each.actions.map(
    (done) => `${label(done.name)} ${done.at_s === null ? "at an unknown time" : `at ${seconds(done.at_s)}`}`,
  );
  const watched = each.watch_s === null ? "watch time unknown" : `watched ${seconds(each.watch_s)}${of}`;
  return [each.item, watched, ...(actions.length ? actions : ["no action"])];
}

/** One stop of the tab key for all rows; arrows, Home and End move among them. */
function rove(rows) {
  rows[0].tabIndex = 0;
  rows.forEach((own, place) => {
    own.addEventListener("keydown", (event) => {
      const to = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (to === undefined || !rows[to]) return;
      event.preventDefault();
      move(own, rows[to]);
      rows[to].focus();
    });
    own.addEventListener("focus", () =>
      move(
        rows.find((other) => other.tabIndex === 0),
        own,
      ),
    );
  });
}

function move(from, to) {
  if (from) from.tabIndex = -1;
  to.tabIndex = 0;
}
