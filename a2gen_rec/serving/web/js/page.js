// State of the page and its event handlers.

import { setNames } from "./actions.js";
import * as api from "./api.js";
import { $, el, fullId, id, plural } from "./dom.js";
import { drawHistory } from "./history.js";
import { createForm, fillForm, nextTime } from "./impression_form.js";
import { predictions } from "./predictions.js";
import { changes, drawList, fallbacks, preview, summary } from "./ranking.js";
import { explanation } from "./score.js";
import { whatIf } from "./what_if.js";

const MAX_SHOWN = 50; // impressions in the history
const NUM_SEQUENCES = 8;
const TIMEOUT_MS = 10_000; // a person waits longer than a feed
const WIDE = matchMedia("(min-width: 1100px)"); // list and details side by side
const details = $("details"); // kept here, because it may be detached while the list is redrawn

const state = {
  card: null,
  user: "",
  impressions: [],
  request: null, // request of the answer
  answer: null,
  previous: null, // answer to compare with
  selected: null, // item whose details are open
  turn: 0, // answers to outdated requests are dropped
};

async function start() {
  const card = (state.card = await api.model());
  setNames([...card.actions.slice(1, -1), ...card.labels, ...card.objectives, "watch_time"]);
  $("model").replaceChildren(id(card.dataset), " · model ", id(card.version));
  const sortKeys = card.sort_keys.map((name) => el("option", { value: name }, name.replaceAll("_", " ")));
  $("sort-by").replaceChildren(...sortKeys);
  $("candidates").value ||= card.sample_items.join("\n");
  $("candidates").dispatchEvent(new Event("input"));
  $("k").max = card.limits.candidates;
  createForm(card, addImpression);
  // The form is shown with its values in it: what a person enters from here on is not overwritten.
  $("key-form").hidden = true;
  $("request").hidden = false;
  document.querySelector("main").hidden = false;
  $("remove-key").hidden = !api.key.get();
  const { turn } = state;
  // Recorded users are only suggestions; if the store fails, the model's sample users remain.
  const recorded = await api.users().catch(() => []);
  suggestUsers([...new Set([...recorded, ...card.sample_users])].slice(0, 8), new Set(recorded));
  if (turn !== state.turn) return; // the person has ranked meanwhile
  const isTyping = document.activeElement === $("user"); // a suggestion would mix with what the person enters
  if (!isTyping) $("user").value ||= recorded[0] ?? card.sample_users[0] ?? "";
  if (!isTyping && $("user").value && $("candidates").value) await rankForm();
  else setStatus("Enter a user and candidates.");
}

function suggestUsers(users, recorded) {
  $("users").replaceChildren(...users.map((user) => el("option", { value: user })));
  $("user-suggestions").replaceChildren(
    ...users.map((user) =>
      el(
        "button",
        { type: "button", class: "plain", onclick: () => (($("user").value = user), attempt(rankForm)) },
        id(user),
        recorded.has(user) && el("span", { class: "mark" }, "history"),
      ),
    ),
  );
}

/** Candidates of the form: one per line, or separated by spaces or commas on a single line. */
function readCandidates() {
  const text = $("candidates").value.trim();
  const names = text.split(text.includes("\n") ? "\n" : /[\s,]+/).map((name) => name.trim());
  return [...new Set(names.filter(Boolean))];
}

/** Rank the candidates of the form. */
async function rankForm() {
  const candidates = readCandidates();
  if (!candidates.length) throw new api.ApiError("Enter at least one candidate.");
  const { limits } = state.card;
  if (candidates.length > limits.candidates)
    throw new api.ApiError(`At most ${limits.candidates} candidates can be ranked.`);
  const user = $("user").value.trim();
  const request = { user, candidates, k: Number($("k").value), sort_by: $("sort-by").value };
  if (!user) throw new api.ApiError("Enter a user.");
  await rank(request, null, "");
}

/** Rank, then draw everything. `previous`: the answer to compare with; `cause`: what changed since. */
async function rank(request, previous, cause) {
  const thisTurn = ++state.turn;
  setStatus("Ranking…");
  $("ranking").setAttribute("aria-busy", "true");
  try {
    // If the event store fails, the ranking works without history, and the page shows the error in its place.
    const history = await api.history(request.user, MAX_SHOWN).catch((error) => error);
    const timed = { ...request, now_ms: nextTime(history.impressions ?? [], 0) };
    const start = performance.now();
    const options = { explain: true, num_sequences: NUM_SEQUENCES, timeout_ms: TIMEOUT_MS };
    const answer = await api.rank({ ...timed, ...options });
    const ms = performance.now() - start;
    if (thisTurn !== state.turn) return;
    const items = answer.candidates.map((each) => each.item);
    Object.assign(state, { request: timed, answer, previous, user: request.user });
    const first = WIDE.matches ? (items[0] ?? null) : null; // in one column, open details would hide the list
    state.selected = items.includes(state.selected) ? state.selected : first;
    drawUserHistory(history);
    $("fallbacks").replaceChildren(fallbacks(answer));
    $("changes").replaceChildren(changes(answer, previous, cause, stopComparing));
    setStatus(summary(answer, ms));
    draw();
    $("list-about").hidden = !answer.candidates.some((each) =>
      Object.values(each.expected_time_s).some((time) => time !== null),
    );
  } catch (error) {
    if (thisTurn === state.turn) setStatus(state.answer ? "The list below is from the previous request." : "");
    throw error;
  } finally {
    if (thisTurn === state.turn) $("ranking").removeAttribute("aria-busy");
  }
}

function drawUserHistory(history) {
  $("history-title").replaceChildren("History of ", id(state.user));
  if (history instanceof Error) {
    state.impressions = [];
    $("history-about").replaceChildren();
    $("history").replaceChildren(el("p", { class: "empty" }, history.message));
    return;
  }
  state.impressions = history.impressions;
  const count = history.impressions.length;
  const about = [
    `Last ${plural(count, "impression")}, newest first; the model uses at most ${state.card.max_history}. `,
    "Ranked one second after the last impression. ",
    "Bars: watch time; outlines: video duration. Use the arrow keys to move between rows.",
  ];
  $("history-about").replaceChildren(...(count ? about : []));
  drawHistory($("history"), history.impressions, history.durations_s, state.card);
}

function draw() {
  const { answer, previous, selected } = state;
  drawList($("list"), answer, previous, selected, select);
  $("impression-items").replaceChildren(...answer.candidates.map((each) => el("option", { value: each.item })));
  const candidate = answer.candidates.find((each) => each.item === selected);
  details.hidden = !candidate;
  if (!candidate) return placeDetails();
  const before = previous?.candidates.find((each) => each.item === selected);
  const addButton = el(
    "button",
    { type: "button", class: "plain", onclick: () => fillForm(candidate, state.card) },
    "Add an impression of this item…",
  );
  details.replaceChildren(
    el(
      "div",
      { class: "title" },
      el("h3", {}, fullId(candidate.item)),
      !candidate.known && el("span", { class: "mark" }, "unknown to the model"),
      addButton,
    ),
    predictions(candidate, before, state.card),
    ...[
      explanation(candidate, before),
      answer.sort_by === "ensemble" &&
        whatIf(candidate, queryWhatIf, (result) => preview($("list"), answer, selected, result)),
    ].filter(Boolean),
    el(
      "p",
      { class: "quiet note" },
      !candidate.explanation.length
        ? "This model has no ensemble, and thus no scores."
        : answer.sort_by !== "ensemble"
          ? "Sort by ensemble to use what-if queries."
          : "",
    ),
  );
  placeDetails();
}

async function queryWhatIf(objective, changes) {
  const query = { item: state.selected, objective, changes };
  const options = { k: 1, include_timelines: false, timeout_ms: TIMEOUT_MS, what_if: query };
  return (await api.rank({ ...state.request, ...options })).what_if;
}

function select(item) {
  const closes = !WIDE.matches && item === state.selected;
  state.selected = closes ? null : item;
  draw();
  [...$("list").children]
    .find((row) => row.dataset.item === item)
    ?.querySelector("button")
    .focus();
}

/** Place the details next to the list, or below the candidate in a narrow window. */
function placeDetails() {
  const row = [...$("list").children].find((each) => each.dataset.item === state.selected);
  if (WIDE.matches || !row) $("side").append(details);
  else row.append(details);
}

function stopComparing() {
  state.previous = null;
  $("changes").replaceChildren();
  draw();
  $("ranking").focus();
}

/** Record an impression and rank the same candidates again. */
async function addImpression({ item, watch_s, actions, pauseMin }) {
  if (!state.answer) throw new api.ApiError("Rank first: the impression is added to the ranked user.");
  if (!item) throw new api.ApiError("Enter an item.");
  const { user, impressions, request, answer } = state;
  await api.record(user, { item, ts_ms: nextTime(impressions, pauseMin), watch_s, actions });
  await attempt(() => rank(request, answer, `After ${item}`));
}

const setStatus = (text) => $("status").replaceChildren(text);

/** Run `work`; on an API error, show its message and a button to retry. */
async function attempt(work) {
  $("error").replaceChildren();
  try {
    await work();
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    if (error.needsKey) return askForKey(error);
    $("error").replaceChildren(
      el("p", {}, error.message),
      el("button", { type: "button", class: "plain", onclick: () => attempt(state.card ? work : start) }, "Try again"),
    );
  }
}

function askForKey(error) {
  if (api.key.get()) $("error").replaceChildren(el("p", {}, error.message));
  $("key-form").hidden = false;
  $("key").focus();
}

$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(state.card ? rankForm : start);
});
$("candidates").addEventListener("input", () => {
  $("candidate-count").replaceChildren(String(readCandidates().length));
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
$("remove-key").addEventListener("click", () => {
  api.key.remove();
  location.reload();
});
WIDE.addEventListener("change", () => state.answer && placeDetails());

attempt(start);
