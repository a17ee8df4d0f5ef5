// What-if queries: the ensemble's score and rank for other predictions of one objective, one per slider position.

import { label } from "./actions.js";
import { el, number, percent, plus, seconds, styled, svg } from "./dom.js";

const MAX_CHANGE = 4; // log odds in either direction, or log1p seconds
const STEP = 0.25;
const CHANGES = Array.from({ length: 1 + (2 * MAX_CHANGE) / STEP }, (_, index) => index * STEP - MAX_CHANGE);
const CENTER = CHANGES.indexOf(0);

/**
 * The what-if slider of a candidate.
 *
 * query(objective, changes): returns the results, one per change.
 * preview(result): shows the list with the result; null restores it.
 */
export function whatIf(candidate, query, preview) {
  if (!candidate.explanation.length) return null;
  let results = null;
  let turn = 0;
  const byWeight = [...candidate.explanation].sort((a, b) => b.weight - a.weight);
  const objective = el(
    "select",
    { id: "what-if-objective" },
    byWeight.map((part) => el("option", { value: part.objective }, label(part.objective))),
  );
  const slider = el("input", {
    id: "what-if-slider",
    type: "range",
    min: 0,
    max: CHANGES.length - 1,
    value: CENTER,
    disabled: true,
  });
  const output = el("output", { for: "what-if-slider what-if-objective", class: "output" });
  const direction = el("p", { class: "quiet" });
  const drawing = el("div", {});
  const reset = el("button", { type: "button", class: "plain", disabled: true }, "Reset to the prediction");

  const part = () => candidate.explanation.find((each) => each.objective === objective.value);
  const format = (value) => (part().unit === "s" ? seconds(value) : percent(value));

  async function selectObjective() {
    const thisTurn = ++turn;
    slider.disabled = true;
    preview(null);
    output.replaceChildren("Querying the ensemble…");
    try {
      const response = await query(objective.value, CHANGES);
      if (thisTurn !== turn) return;
      results = response;
    } catch (error) {
      if (thisTurn === turn) output.replaceChildren(error.message);
      return;
    }
    slider.disabled = false;
    slider.value = CENTER;
    direction.replaceChildren(monotonicity(results, part()));
    update();
  }

  function update() {
    const selected = results[slider.value];
    const predicted = results[CENTER];
    reset.disabled = selected === predicted;
    slider.setAttribute("aria-valuetext", `${format(selected.prediction)}, rank ${selected.rank}`);
    output.replaceChildren(
      el(
        "dl",
        {},
        line("prediction", format(predicted.prediction), format(selected.prediction)),
        line("score", number(predicted.score), `${number(selected.score)} (${plus(selected.score - predicted.score)})`),
        line("rank", predicted.rank, selected.rank),
      ),
    );
    drawing.replaceChildren(curve(results, selected, format));
    preview(selected === predicted ? null : selected);
  }

  objective.addEventListener("change", selectObjective);
  slider.addEventListener("input", update);
  reset.addEventListener("click", () => {
    slider.value = CENTER;
    update();
    slider.focus();
  });
  const section = el(
    "section",
    { class: "card", "aria-labelledby": "what-if-title" },
    el("h3", { id: "what-if-title" }, "What if the prediction were different?"),
    el(
      "div",
      { class: "what-if" },
      el("div", { class: "field" }, el("label", { for: "what-if-objective" }, "Objective"), objective),
      el("div", { class: "field" }, el("label", { for: "what-if-slider" }, "Prediction, lower or higher"), slider),
    ),
    output,
    drawing,
    direction,
    reset,
  );
  selectObjective();
  return section;
}

const line = (name, before, after) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, `${before} → `, el("strong", {}, String(after))));

/** Whether the score is monotonic in the prediction, checked on the results. */
function monotonicity(results, part) {
  const sign = part.higher_is_better ? 1 : -1;
  const steps = results.slice(1).map((each, index) => sign * (each.score - results[index].score));
  const tolerance = Math.max(...steps.map(Math.abs)) * 1e-3 + 1e-6; // for rounding
  if (steps.some((step) => step < -tolerance))
    return "The score decreases somewhere as this objective improves: the ensemble is not monotonic here.";
  return part.higher_is_better
    ? "Higher is better: the score never decreases as the prediction increases."
    : "Lower is better: the score never increases as the prediction increases.";
}

/** Plot of the score over the prediction; the dot marks the slider position. */
function curve(results, selected, format) {
  const scores = results.map((each) => each.score);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const x = (index) => (100 * index) / (results.length - 1);
  const y = (score) => 96 - (92 * (score - low)) / (high - low || 1);
  const points = results.map((each, index) => `${x(index)},${y(each.score)}`).join(" ");
  const [from, to] = [results[0], results.at(-1)].map((each) => `${number(each.score)} at ${format(each.prediction)}`);
  const name = `Score from ${from} to ${to}`;
  return el(
    "figure",
    { class: "curve" },
    el(
      "div",
      { class: scores[0] > scores.at(-1) ? "plot falls" : "plot", role: "img", "aria-label": name },
      svg(
        "svg",
        { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("line", { class: "guide", x1: x(CENTER), x2: x(CENTER), y1: 0, y2: 100 }),
        svg("polyline", { class: "line", points }),
      ),
      el("span", { class: "high" }, number(high)),
      el("span", { class: "low" }, number(low)),
      styled(el("i", { class: "dot" }), {
        "--at": `${x(results.indexOf(selected))}%`,
        "--up": `${y(selected.score)}%`,
      }),
    ),
    el(
      "figcaption",
      { class: "ends", "aria-hidden": "true" },
      el("span", {}, format(results[0].prediction)),
      el("span", {}, `as predicted, ${format(results[CENTER].prediction)}`),
      el("span", {}, format(results.at(-1).prediction)),
    ),
  );
}
