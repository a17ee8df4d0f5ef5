// The form of an impression to add.

import { named } from "./actions.js";
import { $, el } from "./dom.js";

const PAUSE_MS = 1000;

/** Fill the form once; submit(impression, item) records it and resolves when done. */
export function prepareEvent(card, submit) {
  const actions = card.actions.slice(1, -1);
  const form = $("event");
  form.replaceChildren(
    el(
      "div",
      { class: "field" },
      el("label", { for: "event-item" }, "Item"),
      el("input", {
        id: "event-item",
        list: "event-items",
        required: true,
        maxlength: 256,
        autocomplete: "off",
        spellcheck: "false",
      }),
      el("datalist", { id: "event-items" }),
    ),
    el(
      "div",
      { class: "pair" },
      numeric("event-watch", "Watched (s)", { placeholder: "unknown" }),
      numeric("event-pause", "Pause before (min)", { value: 0 }),
    ),
    actions.length > 0 &&
      el(
        "fieldset",
        {},
        el("legend", {}, "What the user did, and when (s)"),
        actions.map((name, place) => {
          const time = el("input", {
            id: `event-at-${place}`,
            type: "number",
            min: 0,
            max: 1e7,
            step: "any",
            disabled: true,
            "aria-label": `${name}: seconds since the impression began`,
            placeholder: "unknown",
          });
          const box = el("input", {
            id: `event-did-${place}`,
            type: "checkbox",
            onchange: () => (time.disabled = !box.checked),
          });
          return el("div", { class: "did" }, el("label", { for: `event-did-${place}` }, box, named(name)), time);
        }),
      ),
    el("p", { class: "quiet" }, "It is recorded in the service's store, for every later ranking of this user."),
    el("button", { type: "submit", class: "main" }, "Record and rank again"),
    el("p", { id: "event-problem", role: "alert", class: "problem" }),
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    $("event-problem").replaceChildren();
    try {
      await submit(filled(actions));
      form.reset();
      form.querySelectorAll(".did input[type=number]").forEach((time) => (time.disabled = true));
    } catch (problem) {
      $("event-problem").replaceChildren(problem.message);
    } finally {
      button.disabled = false;
    }
  };
}

/** The form for an item, with what is likeliest to happen in it. */
export function suggest(candidate, card) {
  const actions = card.actions.slice(1, -1);
  $("add").open = true;
  $("event").reset();
  $("event-item").value = candidate.item;
  $("event-watch").value = rounded(candidate.expected_watch_s);
  actions.forEach((name, place) => {
    const step = candidate.timeline.find((each) => each.action === name);
    $(`event-did-${place}`).checked = Boolean(step);
    $(`event-at-${place}`).disabled = !step;
    $(`event-at-${place}`).value = rounded(step?.at_s);
  });
  $("event-item").focus();
  $("event").scrollIntoView({ block: "nearest" });
}

/** The moment of an impression after `impressions` and a pause: histories may lie far back. Without any, now. */
export function begins(impressions, pauseMin) {
  const ended = impressions.map(
    (each) => each.ts_ms + 1000 * Math.max(each.watch_s ?? 0, ...each.actions.map((done) => done.at_s ?? 0)),
  );
  return impressions.length ? Math.round(Math.max(...ended) + PAUSE_MS + 60_000 * pauseMin) : Date.now();
}

function filled(actions) {
  const did = actions.flatMap((name, place) =>
    $(`event-did-${place}`).checked ? [{ name, at_s: amount(`event-at-${place}`) }] : [],
  );
  return {
    item: $("event-item").value.trim(),
    watch_s: amount("event-watch"),
    pauseMin: amount("event-pause") ?? 0,
    actions: did,
  };
}

const amount = (name) => ($(name).value === "" ? null : Number($(name).value));
const rounded = (value) => (value === null || value === undefined ? "" : Math.round(10 * value) / 10);

function numeric(name, text, attributes) {
  return el(
    "div",
    { class: "field" },
    el("label", { for: name }, text),
    el("input", { id: name, type: "number", min: 0, max: 1e7, step: "any", ...attributes }),
  );
}
