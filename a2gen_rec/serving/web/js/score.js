// Score explanation: contributions of the objectives as one signed bar and as a table.

import { hue, label, named } from "./actions.js";
import { el, number, percent, plus, seconds, styled } from "./dom.js";
import { tooltip } from "./tooltips.js";

/** `previous`: the same candidate in the previous ranking, if there is one to compare with. */
export function explanation(candidate, previous) {
  const parts = candidate.explanation;
  if (!parts.length) return null;
  const order = [...parts].sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution));
  const before = new Map(previous?.explanation.map((part) => [part.objective, part.contribution]));
  return el(
    "section",
    { class: "card", "aria-labelledby": "score-title" },
    el("h3", { id: "score-title" }, `Score ${number(candidate.score)}: contributions`),
    bar(order),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": "Contributions to the score" },
      el(
        "table",
        { class: "parts" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "objective"),
            el("th", { scope: "col", class: "figure" }, "prediction"),
            el("th", { scope: "col", class: "figure" }, "weight"),
            el("th", { scope: "col", class: "figure" }, "transform"),
            el("th", { scope: "col", class: "figure" }, "contribution"),
            previous && el("th", { scope: "col", class: "figure" }, "change"),
          ),
        ),
        el(
          "tbody",
          {},
          order.map((part) =>
            el(
              "tr",
              {},
              el(
                "th",
                { scope: "row" },
                named(part.objective),
                el(
                  "span",
                  { class: "quiet", title: betterText(part) },
                  part.higher_is_better ? " ↑" : " ↓",
                  el("span", { class: "hidden" }, betterText(part)),
                ),
              ),
              el("td", { class: "figure" }, part.unit === "s" ? seconds(part.prediction) : percent(part.prediction)),
              el("td", { class: "figure" }, number(part.weight)),
              el("td", { class: "figure" }, number(part.transform)),
              el("td", { class: "figure strong" }, plus(part.contribution)),
              previous &&
                el(
                  "td",
                  { class: "figure change" },
                  before.has(part.objective) ? plus(part.contribution - before.get(part.objective)) : "–",
                ),
            ),
          ),
        ),
        el(
          "tfoot",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "row", colspan: "4" }, "score: sum of the contributions"),
            el("td", { class: "figure strong" }, number(candidate.score)),
            previous && el("td", { class: "figure change" }, scoreChange(candidate, previous)),
          ),
        ),
      ),
    ),
    el(
      "p",
      { class: "quiet" },
      "↑ higher is better, ↓ lower is better. Contribution = weight × transform. Weights depend on user and ",
      "candidate; a transform never decreases as its objective improves.",
    ),
  );
}

const scoreChange = (now, before) => (before.score === null ? "–" : plus(now.score - before.score));
const betterText = (part) => `${part.higher_is_better ? "higher" : "lower"} is better`;

function bar(parts) {
  const negative = parts.filter((part) => part.contribution < 0).reverse();
  const positive = parts.filter((part) => part.contribution >= 0);
  const below = -sum(negative);
  const total = below + sum(positive) || 1;
  const stack = (group) =>
    group.map((part) =>
      tooltip(
        styled(el("span", { class: `part ${hue(part.objective)}` }, el("span", {}, label(part.objective))), {
          "--wide": `${(100 * Math.abs(part.contribution)) / total}%`,
        }),
        () => [`${label(part.objective)} ${plus(part.contribution)}`],
      ),
    );
  return styled(
    el("div", { class: "stack", "aria-hidden": "true" }, stack(negative), el("i", { class: "zero" }), stack(positive)),
    { "--zero": `${(100 * below) / total}%` },
  );
}

const sum = (parts) => parts.reduce((total, part) => total + part.contribution, 0);
