// What a score is made of: the objectives' shares, as one signed bar and as a table.

import { hue, label, named } from "./actions.js";
import { el, number, percent, plus, seconds, styled } from "./dom.js";
import { tip } from "./tips.js";

/** `former`: the same candidate in the ranking before, if there is one to compare with. */
export function explained(candidate, former) {
  const parts = candidate.explanation;
  if (!parts.length) return null;
  const order = [...parts].sort((a, b) => Math.abs(b.share) - Math.abs(a.share));
  const before = new Map(former?.explanation.map((part) => [part.objective, part.share]));
  return el(
    "section",
    { class: "card", "aria-labelledby": "score-title" },
    el("h3", { id: "score-title" }, `Why its score is ${number(candidate.score)}`),
    bar(order),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": "Parts of the score" },
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
            el("th", { scope: "col", class: "figure" }, "share"),
            former && el("th", { scope: "col", class: "figure" }, "change"),
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
                  { class: "quiet", title: `${part.better} is better` },
                  part.better === "more" ? " ↑" : " ↓",
                  el("span", { class: "hidden" }, `${part.better} is better`),
                ),
              ),
              el("td", { class: "figure" }, part.unit === "s" ? seconds(part.prediction) : percent(part.prediction)),
              el("td", { class: "figure" }, number(part.weight)),
              el("td", { class: "figure" }, number(part.transform)),
              el("td", { class: "figure strong" }, plus(part.share)),
              former &&
                el(
                  "td",
                  { class: "figure change" },
                  before.has(part.objective) ? plus(part.share - before.get(part.objective)) : "–",
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
            el("th", { scope: "row", colspan: "4" }, "score: the sum of the shares"),
            el("td", { class: "figure strong" }, number(candidate.score)),
            former &&
              el("td", { class: "figure change" }, former.score === null ? "–" : plus(candidate.score - former.score)),
          ),
        ),
      ),
    ),
    el(
      "p",
      { class: "quiet" },
      "↑ more is better, ↓ less is. Share = weight × transform; weights are this user's and candidate's, ",
      "and a transform never falls when its objective gets better.",
    ),
  );
}

function bar(parts) {
  const down = parts.filter((part) => part.share < 0).reverse();
  const up = parts.filter((part) => part.share >= 0);
  const below = -sum(down);
  const all = below + sum(up) || 1;
  const stack = (some) =>
    some.map((part) =>
      tip(
        styled(el("span", { class: `part ${hue(part.objective)}` }, el("span", {}, label(part.objective))), {
          "--wide": `${(100 * Math.abs(part.share)) / all}%`,
        }),
        () => [`${label(part.objective)} ${plus(part.share)}`],
      ),
    );
  return styled(
    el("div", { class: "stack", "aria-hidden": "true" }, stack(down), el("i", { class: "zero" }), stack(up)),
    { "--zero": `${(100 * below) / all}%` },
  );
}

const sum = (parts) => parts.reduce((total, part) => total + part.share, 0);
