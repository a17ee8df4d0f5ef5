// What the page knows, and what happens when something is asked of it.

import { setNames } from "./actions.js";
import * as api from "./api.js";
import { $, el, id, plural, whole } from "./dom.js";
import { begins, prepareEvent, suggest } from "./event.js";
import { drawHistory } from "./history.js";
import { nudge } from "./nudge.js";
import { predicted } from "./predicted.js";
import { changed, drawList, fallbacks, summary, suppose } from "./ranking.js";
import { explained } from "./score.js";

const SHOWN = 50; // impressions of the history
const SEQUENCES = 8;
const PATIENCE_MS = 10_000; // a person waits longer than a feed does
const BOTH = matchMedia("(min-width: 1100px)"); // room for list and detail side by side
const detail = $("detail"); // held here: while the list is drawn anew, it may be in none of the document

const state = {
  card: null,
  user: "",
  impressions: [],
  request: null, // of the answer
  answer: null,
  before: null, // the answer to compare with
  chosen: null,
  turn: 0, // an answer to anything but the latest question is late
};

async function start() {
  state.card = await api.model();
  $("key-form").hidden = true;
  $("request").hidden = false;
  document.querySelector("main").hidden = false;
  $("forget").hidden = !api.key.get();
  // Users are only suggested: without a store that answers, there are the model's.
  const recorded = await api.users().catch(() => []);
  const card = state.card;
  setNames([...card.actions.slice(1, -1), ...card.labels, ...card.objectives, "watch_time"]);
  $("model").replaceChildren(id(card.dataset), " · model ", id(card.version));
  $("by").replaceChildren(...card.orders.map((name) => el("option", { value: name }, name.replaceAll("_", " "))));
  $("candidates").value = card.sample_items.join("\n");
  $("candidates").dispatchEvent(new Event("input"));
  $("k").max = card.limits.candidates;
  suggestUsers([...new Set([...recorded, ...card.sample_users])].slice(0, 8), new Set(recorded));
  prepareEvent(card, add);
  $("user").value ||= recorded[0] ?? card.sample_users[0] ?? "";
  if ($("user").value && $("candidates").value) await rankAsked();
  else say("Give a user and candidates.");
}

function suggestUsers(users, recorded) {
  $("users").replaceChildren(...users.map((user) => el("option", { value: user })));
  $("some-users").replaceChildren(
    ...users.map((user) =>
      el(
        "button",
        { type: "button", class: "plain", onclick: () => (($("user").value = user), attempt(rankAsked)) },
        id(user),
        recorded.has(user) && el("span", { class: "mark" }, "history"),
      ),
    ),
  );
}

/** One a line, whatever they hold; on a single line, between spaces or commas. */
function candidatesAsked() {
  const text = $("candidates").value.trim();
  const names = text.split(text.includes("\n") ? "\n" : /[\s,]+/).map((name) => name.trim());
  return [...new Set(names.filter(Boolean))];
}

/** Rank what the form asks for. */
async function rankAsked() {
  const candidates = candidatesAsked();
  if (!candidates.length) throw new api.Problem("Give at least one candidate.");
  const { limits } = state.card;
  if (candidates.length > limits.candidates)
    throw new api.Problem(`At most ${limits.candidates} candidates can be ranked.`);
  const request = { user: $("user").value.trim(), candidates, k: Number($("k").value), by: $("by").value };
  if (!request.user) throw new api.Problem("Give a user.");
  await show(request, null, "");
}

/** Ask, then draw everything. `before`: the answer to compare with. */
async function show(request, before, cause) {
  const mine = ++state.turn;
  say("Ranking…");
  $("ranking").setAttribute("aria-busy", "true");
  try {
    // The ranking goes on without the history where the store is down; the page shows what there is.
    const history = await api.history(request.user, SHOWN).catch((problem) => problem);
    const asked = { ...request, now_ms: begins(history.impressions ?? [], 0) };
    const began = performance.now();
    const answer = await api.rank({ ...asked, explain: true, sequences: SEQUENCES, timeout_ms: PATIENCE_MS });
    const ms = performance.now() - began;
    if (mine !== state.turn) return;
    const items = answer.candidates.map((each) => each.item);
    Object.assign(state, { request: asked, answer, before, user: request.user });
    const first = BOTH.matches ? (items[0] ?? null) : null; // opened below its row, it would hide all others
    state.chosen = items.includes(state.chosen) ? state.chosen : first;
    drawPast(history);
    $("fallbacks").replaceChildren(fallbacks(answer));
    $("changed").replaceChildren(changed(answer, before, cause, stopComparing));
    say(summary(answer, ms));
    draw();
    $("list-about").hidden = !answer.candidates.some((each) =>
      Object.values(each.expected_at_s).some((time) => time !== null),
    );
  } catch (problem) {
    if (mine === state.turn) say(state.answer ? "The list below is the former one." : "");
    throw problem;
  } finally {
    if (mine === state.turn) $("ranking").removeAttribute("aria-busy");
  }
}

function drawPast(history) {
  $("past-title").replaceChildren("History of ", id(state.user));
  if (history instanceof Error) {
    state.impressions = [];
    $("past-about").replaceChildren();
    $("history").replaceChildren(el("p", { class: "empty" }, history.message));
    return;
  }
  state.impressions = history.impressions;
  const count = history.impressions.length;
  const about = [
    `The last ${plural(count, "impression")}, newest first; the model reads at most ${state.card.history}, `,
    "and ranks as if a second had passed since. ",
    "Bars are watch times, outlines the videos' lengths; arrow keys move among them.",
  ];
  $("past-about").replaceChildren(...(count ? about : []));
  drawHistory($("history"), history.impressions, history.lengths_s, state.card);
}

function draw() {
  const { answer, before, chosen } = state;
  drawList($("list"), answer, before, chosen, choose);
  $("event-items").replaceChildren(...answer.candidates.map((each) => el("option", { value: each.item })));
  const candidate = answer.candidates.find((each) => each.item === chosen);
  detail.hidden = !candidate;
  if (!candidate) return place();
  const former = before?.candidates.find((each) => each.item === chosen);
  const suggestion = el(
    "button",
    { type: "button", class: "plain", onclick: () => suggest(candidate, state.card) },
    "Add an impression of it…",
  );
  detail.replaceChildren(
    el(
      "div",
      { class: "title" },
      el("h3", {}, whole(candidate.item)),
      !candidate.known && el("span", { class: "mark" }, "unknown to the model"),
      suggestion,
    ),
    predicted(candidate, former, state.card),
    ...[
      explained(candidate, former),
      answer.by === "ensemble" && nudge(candidate, askNudge, (nudged) => suppose($("list"), answer, chosen, nudged)),
    ].filter(Boolean),
    el(
      "p",
      { class: "quiet note" },
      !candidate.explanation.length
        ? "This model has no ensemble: there is no score to explain."
        : answer.by !== "ensemble"
          ? "Rank by ensemble to ask what another prediction would change."
          : "",
    ),
  );
  place();
}

async function askNudge(objective, changes) {
  const question = { item: state.chosen, objective, changes };
  const answer = await api.rank({ ...state.request, k: 1, timelines: false, timeout_ms: PATIENCE_MS, nudge: question });
  return answer.nudged;
}

function choose(item) {
  const closes = !BOTH.matches && item === state.chosen;
  state.chosen = closes ? null : item;
  draw();
  [...$("list").children]
    .find((row) => row.dataset.item === item)
    ?.querySelector("button")
    .focus();
}

/** The detail stands beside the list, or where there is no room, below its candidate. */
function place() {
  const row = [...$("list").children].find((each) => each.dataset.item === state.chosen);
  if (BOTH.matches || !row) $("aside").append(detail);
  else row.append(detail);
}

function stopComparing() {
  state.before = null;
  $("changed").replaceChildren();
  draw();
  $("ranking").focus();
}

/** Record an impression and rank the same candidates again. */
async function add({ item, watch_s, actions, pauseMin }) {
  if (!state.answer) throw new api.Problem("Rank first: the impression is of the user whose list is shown.");
  if (!item) throw new api.Problem("Give an item.");
  const { user, impressions, request, answer } = state;
  await api.record(user, { item, ts_ms: begins(impressions, pauseMin), watch_s, actions });
  await attempt(() => show(request, answer, `After ${item}`));
}

const say = (words) => $("status").replaceChildren(words);

/** Do something; should it fail, say so in words, and offer it again. */
async function attempt(work) {
  $("problem").replaceChildren();
  try {
    await work();
  } catch (problem) {
    if (!(problem instanceof api.Problem)) throw problem;
    if (problem.needsKey) return askForKey(problem);
    $("problem").replaceChildren(
      el("p", {}, problem.message),
      el("button", { type: "button", class: "plain", onclick: () => attempt(state.card ? work : start) }, "Try again"),
    );
  }
}

function askForKey(problem) {
  if (api.key.get()) $("problem").replaceChildren(el("p", {}, problem.message));
  $("key-form").hidden = false;
  $("key").focus();
}

$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(state.card ? rankAsked : start);
});
$("candidates").addEventListener("input", () => {
  $("candidate-count").replaceChildren(String(candidatesAsked().length));
});
$("sample").addEventListener("click", () => {
  $("candidates").value = state.card?.sample_items.join("\n") ?? "";
  $("candidates").dispatchEvent(new Event("input"));
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set($("key").value.trim());
  $("key").value = "";
  attempt(start);
});
$("forget").addEventListener("click", () => {
  api.key.forget();
  location.reload();
});
BOTH.addEventListener("change", () => state.answer && place());

attempt(start);
