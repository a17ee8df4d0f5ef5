// Form to add an impression.

import { named } from "./actions.js";
import { $, el } from "./dom.js";

const MIN_PAUSE_MS = 1000;

/** Create the form; submit(impression) records the impression and resolves when done. */
export function createForm(card, submit) {
  const actions = card.actions.slice(1, -1);
  const form = $("impression");
  form.replaceChildren(
    el(
      "div",
      { class: "field" },
      el("label", { for: "impression-item" }, "Item"),
      el("input", {
        id: "impression-item",
        list: "impression-items",
        required: true,
        maxlength: 256,
        autocomplete: "off",
        spellcheck: "false",
      }),
      el("datalist", { id: "impression-items" }),
    ),
    el(
      "div",
      { class: "pair" },
      numeric("impression-watch", "Watch time (s)", { placeholder: "unknown" }),
      numeric("impression-pause", "Pause before (min)", { value: 0 }),
    ),
    actions.length > 0 &&
      el(
        "fieldset",
        {},
        el("legend", {}, "Actions and their times (s)"),
        actions.map((name, index) => {
          const time = el("input", {
            id: `impression-time-${index}`,
            type: "number",
            min: 0,
            max: 1e7,
            step: "any",
            disabled: true,
            "aria-label": `${name}: seconds since the start of the impression`,
            placeholder: "unknown",
          });
          const box = el("input", {
            id: `impression-action-${index}`,
            type: "checkbox",
            onchange: () => (time.disabled = !box.checked),
          });
          const nameLabel = el("label", { for: `impression-action-${index}` }, box, named(name));
          return el("div", { class: "action" }, nameLabel, time);
        }),
      ),
    el("p", { class: "quiet" }, "The impression is stored and counts in all later rankings of this user."),
    el("button", { type: "submit", class: "main" }, "Record and rank again"),
    el("p", { id: "impression-error", role: "alert", class: "error" }),
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    $("impression-error").replaceChildren();
    try {
      await submit(formValues(actions));
      form.reset();
      form.querySelectorAll(".action input[type=number]").forEach((time) => (time.disabled = true));
    } catch (error) {
      $("impression-error").replaceChildren(error.message);
    } finally {
      button.disabled = false;
    }
  };
}

/** Fill the form with an item and its most probable actions. */
export function fillForm(candidate, card) {
  const actions = card.actions.slice(1, -1);
  $("add").open = true;
  $("impression").reset();
  $("impression-item").value = candidate.item;
  $("impression-watch").value = rounded(candidate.expected_watch_s);
  actions.forEach((name, index) => {
    const step = candidate.timeline.find((each) => each.action === name);
    $(`impression-action-${index}`).checked = Boolean(step);
    $(`impression-time-${index}`).disabled = !step;
    $(`impression-time-${index}`).value = rounded(step?.at_s);
  });
  $("impression-item").focus();
  $("impression").scrollIntoView({ block: "nearest" });
}

/** Start time of an impression after `impressions` and a pause, which may be far in the past; now without any. */
export function nextTime(impressions, pauseMin) {
  const ends = impressions.map(
    (each) => each.ts_ms + 1000 * Math.max(each.watch_s ?? 0, ...each.actions.map((action) => action.at_s ?? 0)),
  );
  return impressions.length ? Math.round(Math.max(...ends) + MIN_PAUSE_MS + 60_000 * pauseMin) : Date.now();
}

function formValues(actions) {
  const occurred = actions.flatMap((name, index) =>
    $(`impression-action-${index}`).checked ? [{ name, at_s: numberOrNull(`impression-time-${index}`) }] : [],
  );
  return {
    item: $("impression-item").value.trim(),
    watch_s: numberOrNull("impression-watch"),
    pauseMin: numberOrNull("impression-pause") ?? 0,
    actions: occurred,
  };
}

const numberOrNull = (name) => ($(name).value === "" ? null : Number($(name).value));
const rounded = (value) => (value === null || value === undefined ? "" : Math.round(10 * value) / 10);

function numeric(name, text, attributes) {
  return el(
    "div",
    { class: "field" },
    el("label", { for: name }, text),
    el("input", { id: name, type: "number", min: 0, max: 1e7, step: "any", ...attributes }),
  );
}
