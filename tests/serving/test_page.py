"""The page in a real browser: correct content, accessibility and error handling."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.helpers import REPOSITORY
from tests.helpers.browser import PageMonitor, PageRanker, chromium
from tests.helpers.fake_ranker import ITEMS, make_model
from tests.helpers.service import RunningService, running

pytestmark = pytest.mark.browser

KEY = "a-key-of-sixteen-characters"
WATCH_TIMES = [4.0, 10.0, 20.0]
START_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningService]]:
    """Start a service per model version and keys, each once."""
    contexts: dict[tuple[str, ...], Any] = {}
    started: dict[tuple[str, ...], RunningService] = {}

    def serve_version(version: str = "full", *keys: str) -> RunningService:
        if (key := (version, *keys)) not in started:
            folder = tmp_path_factory.mktemp("page")
            model = make_model(folder / "model", version)
            contexts[key] = running(folder, keys, model=model, load=PageRanker.load)
            started[key] = contexts[key].__enter__()
        return started[key]

    yield serve_version
    for context in contexts.values():
        context.__exit__(None, None, None)


@pytest.fixture
def opened(browser: Browser, serve: Callable[..., RunningService]) -> Iterator[Callable[..., tuple[Page, PageMonitor]]]:
    """Open the page of a service; checks at the end that the page had no errors."""
    monitors: list[PageMonitor] = []
    contexts = []

    def open_page(version: str = "full", *keys: str, width: int = 1400, **context: Any) -> tuple[Page, PageMonitor]:
        service = serve(version, *keys)
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        monitors.append(PageMonitor(f"http://127.0.0.1:{service.address[1]}/"))
        monitors[-1].watch(page)
        page.goto(monitors[-1].origin)
        return page, monitors[-1]

    yield open_page
    for context in contexts:
        context.close()
    assert [error for monitor in monitors for error in monitor.errors] == []


def post_history(service: RunningService, user: str) -> None:
    """Record three impressions of 4, 10 and 20 seconds, the last after a pause of one hour."""
    for number, watch_s in enumerate(WATCH_TIMES):
        actions = [{"name": "like", "at_s": watch_s / 2}, {"name": "comment", "at_s": None}][:number]
        ts_ms = START_MS + number * 20_000 + (3_600_000 if number == 2 else 0)
        item = {"item": f"v{10 + number}", "ts_ms": ts_ms, "watch_s": watch_s, "actions": actions}
        assert service.post(user, item).status_code == 200


def rank_for(page: Page, user: str) -> None:
    page.get_by_label("User", exact=True).fill(user)
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.locator("#history-title")).to_have_text(f"History of {user}")
    expect(page.locator("#ranking")).not_to_have_attribute("aria-busy", "true")


def response_of(service: RunningService, user: str, k: int = 10, **options: Any) -> Any:
    """Return the service's response to the page's request."""
    return service.rank(user, candidates=ITEMS, k=k, explain=True, num_sequences=8, **options).json()


def items(page: Page) -> list[str]:
    """Return the items of the list's rows from top to bottom, as displayed."""
    rows = [(row.bounding_box()["y"], row.get_attribute("data-item")) for row in page.locator("#list > li").all()]  # type: ignore[index]
    return [str(item) for _, item in sorted(rows)]


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def box(page: Page, selector: str) -> dict[str, float]:
    bounds = page.locator(selector).first.bounding_box()
    assert bounds is not None
    return dict(bounds)


def test_list_and_explanation_match_the_response(opened: Callable, serve: Callable[..., RunningService]) -> None:
    page, _ = opened()
    rank_for(page, "u1")
    expected = response_of(serve(), "u1")
    best = expected["candidates"]
    assert items(page) == [candidate["item"] for candidate in best]
    assert texts(page, "#list .value") == [f"{candidate['score']:.3f}".replace("-", "−") for candidate in best]
    assert "40 candidates ranked by ensemble score" in page.locator("#status").inner_text()
    contributions_on_page = dict(
        zip(texts(page, ".parts tbody th .named"), texts(page, ".parts tbody td.strong"), strict=True)
    )
    contributions = {part["objective"].replace("_", " "): part["contribution"] for part in best[0]["explanation"]}
    assert contributions_on_page == {name: f"{value:+.3f}".replace("-", "−") for name, value in contributions.items()}
    assert len(texts(page, ".sequences li")) == len(best[0]["sequences"]) == 3
    like, exit_ = best[0]["expected_time_s"]["like"], best[0]["expected_time_s"]["exit"]
    strip, diamond = box(page, ".over.hue0"), box(page, ".over.hue0 b")
    end = box(page, ".over.hue-exit b")
    centers = [box["x"] + box["width"] / 2 - strip["x"] for box in (diamond, end)]
    assert centers[0] / centers[1] == pytest.approx(like / exit_, rel=0.02), "times share one axis from 0"


def test_history_is_drawn_to_scale_newest_first(opened: Callable, serve: Callable[..., RunningService]) -> None:
    post_history(serve(), "viewer")
    page, _ = opened()
    rank_for(page, "viewer")
    rows = page.locator("#history .timeline")
    assert [row.locator("bdi").inner_text() for row in rows.all()] == ["v12", "v11", "v10"]
    bars = [row.locator(".bar").bounding_box()["width"] for row in rows.all()]  # type: ignore[index]
    assert bars[0] / bars[2] == pytest.approx(5, rel=0.03)
    assert bars[1] / bars[2] == pytest.approx(2.5, rel=0.03)
    mark, bar = box(page, "#history .timeline .track > .symbol"), box(page, "#history .timeline .bar")
    assert mark["x"] + mark["width"] / 2 == pytest.approx(bar["x"] + bar["width"] / 2, abs=1.5), (
        "like at half of the watch time"
    )
    assert rows.nth(0).locator(".untimed svg").count() == 1, "a comment at an unknown time"
    assert texts(page, "#history .pause") == ["1 h pause"]
    label = rows.nth(0).get_attribute("aria-label")
    assert label == "v12, watched 20 s of 12 s, like at 10 s, comment at an unknown time"


def test_adding_an_impression_shows_rank_changes(opened: Callable, serve: Callable[..., RunningService]) -> None:
    post_history(serve(), "mover")
    page, _ = opened()
    page.get_by_label("Show top").fill("30")
    rank_for(page, "mover")
    before = response_of(serve(), "mover", k=30)["candidates"]
    page.locator("#list button").nth(3).click()
    page.get_by_role("button", name="Add an impression of this item").click()
    assert page.get_by_label("Item", exact=True).input_value() == before[3]["item"]
    page.get_by_label("Watch time (s)").fill("7.5")
    page.get_by_label("Pause before (min)").fill("2")
    page.locator("#impression").get_by_label("like", exact=True).check()
    page.get_by_label("like: seconds since the start of the impression").fill("2.5")
    page.get_by_role("button", name="Record and rank again").click()
    expect(page.locator("#changes")).to_contain_text(f"After {before[3]['item']}")
    last = serve().client.get("/v1/users/mover/history").json()["impressions"][-1]
    assert (last["item"], last["watch_s"]) == (before[3]["item"], 7.5)
    assert last["actions"] == [{"name": "like", "at_s": 2.5}]
    assert last["ts_ms"] == START_MS + 40_000 + 3_600_000 + 20_000 + 1000 + 120_000, (
        "after the last impression and a pause"
    )
    after = response_of(serve(), "mover", k=30)["candidates"]
    index_before = {candidate["item"]: index for index, candidate in enumerate(before)}
    expected = []
    for index, candidate in enumerate(after):
        up = index_before.get(candidate["item"], -1) - index
        is_new = candidate["item"] not in index_before
        expected.append("new" if is_new else "= same rank" if not up else f"▲{up} up" if up > 0 else f"▼{-up} down")
    assert texts(page, "#list .move") == expected
    assert {text[0] for text in expected} >= set("▲▼n")
    rows = page.locator("#history .timeline")
    expect(rows).to_have_count(4)
    page.get_by_role("button", name="Stop comparing").click()
    assert texts(page, "#list .move") == [""] * 30


def test_what_if_moves_the_candidate_to_its_rank(opened: Callable, serve: Callable[..., RunningService]) -> None:
    page, _ = opened()
    rank_for(page, "u1")
    ranked = [candidate["item"] for candidate in response_of(serve(), "u1")["candidates"]]
    page.locator("#list button").nth(4).click()
    slider = page.get_by_label("Prediction, lower or higher")
    expect(slider).to_be_enabled()
    for objective, keys, sentence in [
        ("like", ["ArrowRight"] * 8, "the score never decreases as the prediction increases"),
        ("like", ["Home"], "the score never decreases"),
        ("glance", ["End"], "the score never increases as the prediction increases"),
    ]:
        page.get_by_label("Objective").select_option(objective)
        expect(page.locator("#what-if-slider")).to_be_enabled()
        for key in keys:
            slider.press(key)
        change = 0.25 * int(slider.input_value()) - 4
        what_if = {"item": ranked[4], "objective": objective, "changes": [change]}
        (result,) = response_of(serve(), "u1", what_if=what_if)["what_if"]
        others = [item for item in ranked if item != ranked[4]]
        index = min(result["rank"], 10) - 1
        assert items(page) == [*others[:index], ranked[4], *others[index:]]
        row = page.locator(f"#list > li[data-item={ranked[4]}]")
        assert row.locator(".rank").inner_text() == str(result["rank"])
        assert row.locator(".value").inner_text().startswith(f"{result['score']:.3f}".replace("-", "−"))
        expect(page.locator("#details")).to_contain_text(sentence)
        page.get_by_role("button", name="Reset to the prediction").click()
        assert items(page) == ranked


def test_query_time_is_one_second_after_the_last_impression(
    opened: Callable, serve: Callable[..., RunningService]
) -> None:
    post_history(serve(), "long ago")
    page, _ = opened()
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if "/v1/rank" in request.url else None)
    rank_for(page, "long ago")
    after = START_MS + 2 * 20_000 + 3_600_000 + 20_000 + 1000
    assert {body["now_ms"] for body in bodies if body["user"] == "long ago"} == {after}
    page.locator("#what-if-slider").fill("1")
    expect(page.locator("#details")).to_contain_text("Reset to the prediction")
    queries = {(body["now_ms"], "what_if" in body) for body in bodies if body["user"] == "long ago"}
    assert queries == {(after, False), (after, True)}
    rank_for(page, "no history")
    assert abs(bodies[-1]["now_ms"] - time.time() * 1000) < 3_600_000


def test_page_works_with_the_keyboard_alone(opened: Callable, serve: Callable[..., RunningService]) -> None:
    post_history(serve(), "keys")
    page, _ = opened()
    expect(page.locator("#list > li")).to_have_count(10)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("keys")
    page.keyboard.press("Enter")
    expect(page.locator("#history-title")).to_have_text("History of keys")
    expect(page.locator("#what-if-slider")).to_be_enabled()  # disabled fields are no tab stops
    stops = []
    for _ in range(80):  # a focus trap would never return to the start
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
                const active = document.activeElement;
                const outline = active === document.body ? 1 : parseFloat(getComputedStyle(active).outlineWidth);
                return [active.id || active.className || active.tagName, outline];
            }"""
        )
        stops.append(stop)
        if stop[0] in ("BODY", "skip"):
            break
    names = [name for name, _ in stops]
    assert names[-1] in ("BODY", "skip"), names
    assert names.count("candidate") == 10
    assert names.count("timeline") == 1, "one tab stop for the history"
    assert {"what-if-slider", "what-if-objective", "sort-by", "k"} <= set(names)
    assert min(width for _, width in stops) > 0, "the focus is visible"
    row = page.locator("#history .timeline")
    row.first.focus()
    page.keyboard.press("ArrowDown")
    expect(row.nth(1)).to_be_focused()
    tooltip = page.get_by_role("tooltip")
    expect(tooltip).to_contain_text("watched 10 s of 11 s")
    assert row.nth(1).get_attribute("aria-describedby") == "tooltip"
    page.keyboard.press("Escape")
    expect(tooltip).to_be_hidden()
    button = page.locator("#list button").nth(2)
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(button).to_be_focused()


def test_history_keeps_its_tab_stop(opened: Callable, serve: Callable[..., RunningService]) -> None:
    post_history(serve(), "twice")
    page, _ = opened()
    rank_for(page, "twice")
    rows = page.locator("#history .timeline")
    for index in (0, 1):  # the second time at the row that had the focus
        rows.nth(index).focus()
        page.keyboard.press("Shift+Tab")
        expect(page.locator("#history .timeline:focus")).to_have_count(0)
        page.keyboard.press("Tab")
        expect(rows.nth(index)).to_be_focused()


HOSTILE = ["<img/src=x/onerror=alert(1)>", '"><script>alert(2)</script>', "\u202eevil\u2066", "{{7*7}}${7*7}"]


def test_identifiers_are_rendered_as_text(opened: Callable, serve: Callable[..., RunningService]) -> None:
    for number, name in enumerate(HOSTILE):
        impression = {"item": name, "ts_ms": START_MS + number, "watch_s": 3}
        assert serve().post(HOSTILE[0], impression).status_code == 200
    page, _ = opened()
    page.locator("#request summary").click()
    page.get_by_label("Item identifiers").fill("\n".join(HOSTILE))
    rank_for(page, HOSTILE[0])
    assert sorted(items(page)) == sorted(HOSTILE)
    assert sorted(texts(page, "#list .name bdi")) == sorted(HOSTILE)
    assert sorted(texts(page, "#history .timeline bdi")) == sorted(HOSTILE)
    page.locator("#history .timeline").first.focus()
    expect(page.get_by_role("tooltip")).to_contain_text(HOSTILE[-1])
    assert page.locator("body img, body script, [onerror]").count() == 0
    expect(page.get_by_label("Fallbacks used")).to_contain_text("4 of 4 candidates")


def test_entries_are_kept_while_users_are_loaded(browser: Browser, serve: Callable[..., RunningService]) -> None:
    page = browser.new_page()
    held: list[Route] = []
    page.route("**/v1/users*", lambda route: held.append(route))
    page.goto(f"http://127.0.0.1:{serve().address[1]}/")
    page.locator("#request summary").click()
    page.get_by_label("Item identifiers").fill("v3\nv4")
    rank_for(page, "early")
    assert sorted(items(page)) == ["v3", "v4"]
    with page.expect_response("**/v1/users*"):
        held[0].continue_()
    expect(page.locator("#user-suggestions button").first).to_be_visible()
    expect(page.locator("#history-title")).to_have_text("History of early")
    assert page.get_by_label("Item identifiers").input_value() == "v3\nv4"
    assert sorted(items(page)) == ["v3", "v4"]
    page.close()


def test_no_user_is_suggested_in_a_focused_field(browser: Browser, serve: Callable[..., RunningService]) -> None:
    page = browser.new_page()
    held: list[Route] = []
    page.route("**/v1/users*", lambda route: held.append(route))
    page.goto(f"http://127.0.0.1:{serve().address[1]}/")
    page.get_by_label("User", exact=True).click()
    with page.expect_response("**/v1/users*"):
        held[0].continue_()
    expect(page.locator("#user-suggestions button").first).to_be_visible()
    expect(page.locator("#status")).to_contain_text("Enter a user")
    page.keyboard.type("late")
    page.keyboard.press("Enter")
    expect(page.locator("#history-title")).to_have_text("History of late")
    page.close()


def test_api_key_is_requested_and_kept_in_the_tab(opened: Callable) -> None:
    page, monitor = opened("full", KEY)
    field = page.locator("#key")
    expect(field).to_be_focused()
    field.fill("another-key-of-sixteen")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").first).to_contain_text("Invalid API key")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#list > li")).to_have_count(10)
    expect(field).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator("#list > li")).to_have_count(10)
    page.get_by_role("button", name="Remove the API key").click()
    expect(field).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    monitor.ignore_status(401)


def error_response(status: int, code: str, message: str) -> Callable[[Route], None]:
    error = {"error": {"code": code, "message": message, "request_id": "r"}}
    return lambda route: route.fulfill(status=status, json=error, headers={"Retry-After": "3"})


@pytest.mark.parametrize(
    ("response", "message", "status"),
    [
        (error_response(503, "overloaded", "the ranking queue is full"), "overloaded: the ranking queue is full", 503),
        (error_response(504, "timeout", "deadline exceeded"), "timed out", 504),
        (error_response(422, "invalid_request", "unknown feature"), "Invalid request: unknown feature", 422),
        (lambda route: route.fulfill(status=502, body="<h1>gateway</h1>"), "not JSON (status 502)", 502),
        (lambda route: route.abort(), "Cannot reach", 0),
    ],
)
def test_errors_have_a_message_and_a_retry_button(
    opened: Callable, response: Callable[[Route], None], message: str, status: int
) -> None:
    page, monitor = opened()
    expect(page.locator("#list > li")).to_have_count(10)
    page.route("**/v1/rank", response)
    page.get_by_role("button", name="Rank", exact=True).click()
    error = page.locator("#error")
    expect(error).to_contain_text(message)
    expect(page.locator("#status")).to_have_text("The list below is from the previous request.")
    page.unroute("**/v1/rank")
    page.get_by_role("button", name="Try again").click()
    expect(error).to_be_empty()
    expect(page.locator("#status")).to_contain_text("40 candidates ranked")
    monitor.ignore_status(status)


def test_form_is_kept_if_recording_fails(opened: Callable) -> None:
    page, monitor = opened()
    expect(page.locator("#list > li")).to_have_count(10)
    page.route("**/v1/events", error_response(507, "store_full", "event store is full"))
    page.get_by_text("Add an impression", exact=True).click()
    page.get_by_label("Item", exact=True).fill("v7")
    page.get_by_role("button", name="Record and rank again").click()
    expect(page.locator("#impression-error")).to_have_text("Not recorded: event store is full.")
    assert page.get_by_label("Item", exact=True).input_value() == "v7"
    assert page.locator("#changes").inner_text() == ""
    monitor.ignore_status(507)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("no ensemble", "This model has no ensemble"),
        ("no ensemble no sequences", "it has no sequences"),
        ("no times", "times are not recorded"),
        ("no objectives", ": contributions"),
    ],
)
def test_page_adapts_to_missing_model_outputs(
    opened: Callable, serve: Callable[..., RunningService], version: str, message: str
) -> None:
    page, _ = opened(version, width=1000)
    page.locator("#list button").first.click()
    expect(page.locator("#details")).to_contain_text(message)
    assert items(page) == [candidate["item"] for candidate in response_of(serve(version), "u1")["candidates"]]
    assert page.locator("#what-if-slider").count() == (0 if "ensemble" in version else 1)


LAYOUTS = [(width, scheme) for width in (400, 1400) for scheme in ("light", "dark")]
AUDIT = (REPOSITORY / "tests" / "helpers" / "audit.js").read_text()


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_page_is_accessible(opened: Callable, serve: Callable[..., RunningService], width: int, scheme: str) -> None:
    long = "x" * 200
    post_history(serve(), long)
    page, _ = opened(width=width, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#request summary").click()
    page.get_by_label("Item identifiers").fill(" ".join([*ITEMS[:9], long]))
    rank_for(page, long)
    row = page.locator(f"#list > li[data-item={long}] .candidate")
    if row.get_attribute("aria-expanded") == "false":
        row.click()
    page.get_by_role("button", name="Add an impression of this item").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "no horizontal scrolling"
    assert {name: violations for name, violations in page.evaluate(AUDIT).items() if violations} == {}
    assert page.evaluate("document.documentElement.lang") == "en"
    inside = page.locator("#list #details").count()
    assert inside == (1 if width == 400 else 0), "in one column, below its candidate"


def test_package_contains_the_page_without_inline_code() -> None:
    from a2gen_rec.serving.http.app import WEB

    html = WEB.joinpath("index.html").read_text()
    assert "style=" not in html
    assert html.count("<script") == html.count('<script type="module" src=') == 1
    modules = [file for file in WEB.joinpath("js").iterdir() if file.name.endswith(".js")]
    source = "".join(file.read_text() for file in modules)
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert forbidden not in source
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    assert "serving/web/*" in pyproject
    assert "serving/web/js/*" in pyproject
