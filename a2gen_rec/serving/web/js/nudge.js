// What if an objective were predicted otherwise? The service's ensemble answers for every step of the slider at once.

import { label } from "./actions.js";
import { el, number, percent, plus, seconds, styled, svg } from "./dom.js";

const REACH = 4; // log odds to either side, or log1p seconds
const STEP = 0.25;
const CHANGES = Array.from({ length: 1 + (2 * REACH) / STEP }, (_, place) => place * STEP - REACH);
const HERE = CHANGES.indexOf(0);

/**
 * The slider of a candidate.
 *
 * ask(objective, changes): the service's answers, one per change.
 * show(answer): what the list should look like; null as it was.
 */
export function nudge(candidate, ask, show) {
  if (!candidate.explanation.length) return null;
  let answers = null;
  let turn = 0;
  const weightiest = [...candidate.explanation].sort((a, b) => b.weight - a.weight);
  const objective = el(
    "select",
    { id: "nudge-objective" },
    weightiest.map((part) => el("option", { value: part.objective }, label(part.objective))),
  );
  const slider = el("input", {
    id: "nudge-slider",
    type: "range",
    min: 0,
    max: CHANGES.length - 1,
    value: HERE,
    disabled: true,
  });
  const told = el("output", { for: "nudge-slider nudge-objective", class: "told" });
  const direction = el("p", { class: "quiet" });
  const drawing = el("div", {});
  const reset = el("button", { type: "button", class: "plain", disabled: true }, "Back to the prediction");

  const part = () => candidate.explanation.find((each) => each.objective === objective.value);
  const say = (value) => (part().unit === "s" ? seconds(value) : percent(value));

  async function choose() {
    const mine = ++turn;
    slider.disabled = true;
    show(null);
    told.replaceChildren("Asking the ensemble…");
    try {
      const found = await ask(objective.value, CHANGES);
      if (mine !== turn) return;
      answers = found;
    } catch (problem) {
      if (mine === turn) told.replaceChildren(problem.message);
      return;
    }
    slider.disabled = false;
    slider.value = HERE;
    direction.replaceChildren(toward(answers, part()));
    move();
  }

  function move() {
    const now = answers[slider.value];
    const here = answers[HERE];
    reset.disabled = now === here;
    slider.setAttribute("aria-valuetext", `${say(now.prediction)}, place ${now.place}`);
    told.replaceChildren(
      el(
        "dl",
        {},
        line("prediction", say(here.prediction), say(now.prediction)),
        line("score", number(here.score), `${number(now.score)} (${plus(now.score - here.score)})`),
        line("place", here.place, now.place),
      ),
    );
    drawing.replaceChildren(curve(answers, now, say));
    show(now === here ? null : now);
  }

  objective.addEventListener("change", choose);
  slider.addEventListener("input", move);
  reset.addEventListener("click", () => {
    slider.value = HERE;
    move();
    slider.focus();
  });
  const section = el(
    "section",
    { class: "card", "aria-labelledby": "nudge-title" },
    el("h3", { id: "nudge-title" }, "What if it were predicted otherwise?"),
    el(
      "div",
      { class: "nudge" },
      el("div", { class: "field" }, el("label", { for: "nudge-objective" }, "Objective"), objective),
      el("div", { class: "field" }, el("label", { for: "nudge-slider" }, "Its prediction, lower or higher"), slider),
    ),
    told,
    drawing,
    direction,
    reset,
  );
  choose();
  return section;
}

const line = (name, before, now) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, `${before} → `, el("strong", {}, String(now))));

/** Whether the ensemble kept its promise, from its own answers. */
function toward(answers, part) {
  const sign = part.better === "more" ? 1 : -1;
  const steps = answers.slice(1).map((each, place) => sign * (each.score - answers[place].score));
  const slip = Math.max(...steps.map(Math.abs)) * 1e-3 + 1e-6; // of rounding
  if (steps.some((step) => step < -slip))
    return "The score moves against this objective somewhere: the ensemble is not monotone here.";
  return part.better === "more"
    ? "More of it is better: the score never falls as the prediction rises."
    : "Less of it is better: the score never rises as the prediction rises.";
}

/** Score over prediction, as the ensemble has it; the dot is where the slider is. */
function curve(answers, now, say) {
  const scores = answers.map((each) => each.score);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const x = (place) => (100 * place) / (answers.length - 1);
  const y = (score) => 96 - (92 * (score - low)) / (high - low || 1);
  const points = answers.map((each, place) => `${x(place)},${y(each.score)}`).join(" ");
  const [from, to] = [answers[0], answers.at(-1)].map((each) => `${number(each.score)} at ${say(each.prediction)}`);
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
        svg("line", { class: "guide", x1: x(HERE), x2: x(HERE), y1: 0, y2: 100 }),
        svg("polyline", { class: "line", points }),
      ),
      el("span", { class: "high" }, number(high)),
      el("span", { class: "low" }, number(low)),
      styled(el("i", { class: "dot" }), { "--at": `${x(answers.indexOf(now))}%`, "--up": `${y(now.score)}%` }),
    ),
    el(
      "figcaption",
      { class: "ends", "aria-hidden": "true" },
      el("span", {}, say(answers[0].prediction)),
      el("span", {}, `as predicted, ${say(answers[HERE].prediction)}`),
      el("span", {}, say(answers.at(-1).prediction)),
    ),
  );
}
