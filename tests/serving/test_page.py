"""The page in a real browser: what it shows is what the service answers, for everyone and whatever happens."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.helpers import REPOSITORY
from tests.helpers.browser import PageMonitor, PageRanker, chromium
from tests.helpers.fake_ranker import ITEMS, make_model
from tests.helpers.service import RunningService, running

KEY = "a-key-of-sixteen-characters"
WATCHED = [4.0, 10.0, 20.0]
BEGAN = 1_700_000_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningService]]:
    """Services by their model's version, each started once."""
    contexts: dict[tuple[str, ...], Any] = {}
    started: dict[tuple[str, ...], RunningService] = {}

    def one(version: str = "whole", *keys: str) -> RunningService:
        if (which := (version, *keys)) not in started:
            folder = tmp_path_factory.mktemp("page")
            model = make_model(folder / "model", version)
            contexts[which] = running(folder, keys, model=model, load=PageRanker.load)
            started[which] = contexts[which].__enter__()
        return started[which]

    yield one
    for context in contexts.values():
        context.__exit__(None, None, None)


@pytest.fixture
def opened(browser: Browser, serve: Callable[..., RunningService]) -> Iterator[Callable[..., tuple[Page, PageMonitor]]]:
    """Open the page of a service; at the end, nothing went wrong in it."""
    witnesses: list[PageMonitor] = []
    contexts = []

    def open_page(version: str = "whole", *keys: str, width: int = 1400, **context: Any) -> tuple[Page, PageMonitor]:
        service = serve(version, *keys)
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        witnesses.append(PageMonitor(f"http://127.0.0.1:{service.address[1]}/"))
        witnesses[-1].watch(page)
        page.goto(witnesses[-1].origin)
        return page, witnesses[-1]

    yield open_page
    for context in contexts:
        context.close()
    assert [error for witness in witnesses for error in witness.errors] == []


def past(service: RunningService, user: str) -> None:
    """Three impressions of a user: of 4, 10 and 20 seconds, the last after a pause of an hour."""
    for number, watch_s in enumerate(WATCHED):
        actions = [{"name": "like", "at_s": watch_s / 2}, {"name": "comment", "at_s": None}][:number]
        ts_ms = BEGAN + number * 20_000 + (3_600_000 if number == 2 else 0)
        item = {"item": f"v{10 + number}", "ts_ms": ts_ms, "watch_s": watch_s, "actions": actions}
        assert service.post(user, item).status_code == 200


def rank_for(page: Page, user: str) -> None:
    page.get_by_label("User", exact=True).fill(user)
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.locator("#past-title")).to_have_text(f"History of {user}")
    expect(page.locator("#ranking")).not_to_have_attribute("aria-busy", "true")


def asked(service: RunningService, user: str, k: int = 10, **more: Any) -> Any:
    """The service's own answer to what the page asks."""
    return service.rank(user, candidates=ITEMS, k=k, explain=True, sequences=8, **more).json()


def items(page: Page) -> list[str]:
    """Of the list's rows, from top to bottom as they are seen."""
    rows = [(row.bounding_box()["y"], row.get_attribute("data-item")) for row in page.locator("#list > li").all()]  # type: ignore[index]
    return [str(item) for _, item in sorted(rows)]


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def box(page: Page, selector: str) -> dict[str, float]:
    found = page.locator(selector).first.bounding_box()
    assert found is not None
    return dict(found)


def test_the_list_and_its_explanation_are_the_service_s(opened: Callable, serve: Callable[..., RunningService]) -> None:
    page, _ = opened()
    rank_for(page, "u1")
    expected = asked(serve(), "u1")
    best = expected["candidates"]
    assert items(page) == [each["item"] for each in best]
    assert texts(page, "#list .value") == [f"{each['score']:.3f}".replace("-", "−") for each in best]
    assert "40 candidates ranked by the ensemble's score" in page.locator("#status").inner_text()
    shown = dict(zip(texts(page, ".parts tbody th .named"), texts(page, ".parts tbody td.strong"), strict=True))
    shares = {each["objective"].replace("_", " "): each["share"] for each in best[0]["explanation"]}
    assert shown == {name: f"{share:+.3f}".replace("-", "−") for name, share in shares.items()}
    assert len(texts(page, ".sequences li")) == len(best[0]["sequences"]) == 3
    like, exit_ = best[0]["expected_time_s"]["like"], best[0]["expected_time_s"]["exit"]
    strip, diamond = box(page, ".over.hue0"), box(page, ".over.hue0 b")
    end = box(page, ".over.hue-exit b")
    at = [each["x"] + each["width"] / 2 - strip["x"] for each in (diamond, end)]
    assert at[0] / at[1] == pytest.approx(like / exit_, rel=0.02), "times are places on one axis from 0"


def test_the_past_is_drawn_to_scale_newest_first(opened: Callable, serve: Callable[..., RunningService]) -> None:
    past(serve(), "looked at")
    page, _ = opened()
    rank_for(page, "looked at")
    rows = page.locator("#history .timeline")
    assert [row.locator("bdi").inner_text() for row in rows.all()] == ["v12", "v11", "v10"]
    bars = [row.locator(".bar").bounding_box()["width"] for row in rows.all()]  # type: ignore[index]
    assert bars[0] / bars[2] == pytest.approx(5, rel=0.03)
    assert bars[1] / bars[2] == pytest.approx(2.5, rel=0.03)
    mark, bar = box(page, "#history .timeline .track > .symbol"), box(page, "#history .timeline .bar")
    assert mark["x"] + mark["width"] / 2 == pytest.approx(bar["x"] + bar["width"] / 2, abs=1.5), "like at half the time"
    assert rows.nth(0).locator(".untimed svg").count() == 1, "a comment at an unknown time"
    assert texts(page, "#history .pause") == ["1 h pause"]
    label = rows.nth(0).get_attribute("aria-label")
    assert label == "v12, watched 20 s of 12 s, like at 10 s, comment at an unknown time"


def test_an_impression_is_recorded_and_what_it_changes_is_told(
    opened: Callable, serve: Callable[..., RunningService]
) -> None:
    past(serve(), "mover")
    page, _ = opened()
    page.get_by_label("Show").fill("30")
    rank_for(page, "mover")
    before = asked(serve(), "mover", k=30)["candidates"]
    page.locator("#list button").nth(3).click()
    page.get_by_role("button", name="Add an impression of it").click()
    assert page.get_by_label("Item", exact=True).input_value() == before[3]["item"]
    page.get_by_label("Watched (s)").fill("7.5")
    page.get_by_label("Pause before (min)").fill("2")
    page.locator("#event").get_by_label("like", exact=True).check()
    page.get_by_label("like: seconds since the impression began").fill("2.5")
    page.get_by_role("button", name="Record and rank again").click()
    expect(page.locator("#changed")).to_contain_text(f"After {before[3]['item']}")
    last = serve().client.get("/v1/users/mover/history").json()["impressions"][-1]
    assert (last["item"], last["watch_s"]) == (before[3]["item"], 7.5)
    assert last["actions"] == [{"name": "like", "at_s": 2.5}]
    assert last["ts_ms"] == BEGAN + 40_000 + 3_600_000 + 20_000 + 1000 + 120_000, "after the last one, and a pause"
    after = asked(serve(), "mover", k=30)["candidates"]
    was = {each["item"]: place for place, each in enumerate(before)}
    told = []
    for place, each in enumerate(after):
        up = was.get(each["item"], -1) - place
        is_new = each["item"] not in was
        told.append("new" if is_new else "= same place" if not up else f"▲{up} up" if up > 0 else f"▼{-up} down")
    assert texts(page, "#list .move") == told
    assert {each[0] for each in told} >= set("▲▼n")
    rows = page.locator("#history .timeline")
    expect(rows).to_have_count(4)
    page.get_by_role("button", name="Stop comparing").click()
    assert texts(page, "#list .move") == [""] * 30


def test_a_nudge_moves_the_candidate_as_the_ensemble_says(
    opened: Callable, serve: Callable[..., RunningService]
) -> None:
    page, _ = opened()
    rank_for(page, "u1")
    ranked = [each["item"] for each in asked(serve(), "u1")["candidates"]]
    page.locator("#list button").nth(4).click()
    slider = page.get_by_label("Its prediction, lower or higher")
    expect(slider).to_be_enabled()
    for objective, keys, sentence in [
        ("like", ["ArrowRight"] * 8, "the score never falls as the prediction rises"),
        ("like", ["Home"], "the score never falls"),
        ("glance", ["End"], "the score never rises as the prediction rises"),
    ]:
        page.get_by_label("Objective").select_option(objective)
        expect(page.locator("#nudge-slider")).to_be_enabled()
        for key in keys:
            slider.press(key)
        change = 0.25 * int(slider.input_value()) - 4
        (answer,) = asked(serve(), "u1", nudge={"item": ranked[4], "objective": objective, "changes": [change]})[
            "nudged"
        ]
        others = [item for item in ranked if item != ranked[4]]
        place = min(answer["place"], 10) - 1
        assert items(page) == [*others[:place], ranked[4], *others[place:]]
        row = page.locator(f"#list > li[data-item={ranked[4]}]")
        assert row.locator(".place").inner_text() == str(answer["place"])
        assert row.locator(".value").inner_text().startswith(f"{answer['score']:.3f}".replace("-", "−"))
        expect(page.locator("#detail")).to_contain_text(sentence)
        page.get_by_role("button", name="Back to the prediction").click()
        assert items(page) == ranked


def test_it_ranks_for_a_second_after_the_last_impression(
    opened: Callable, serve: Callable[..., RunningService]
) -> None:
    past(serve(), "long ago")
    page, _ = opened()
    told: list[Any] = []
    page.on("request", lambda request: told.append(request.post_data_json) if "/v1/rank" in request.url else None)
    rank_for(page, "long ago")
    after = BEGAN + 2 * 20_000 + 3_600_000 + 20_000 + 1000
    assert {each["now_ms"] for each in told if each["user"] == "long ago"} == {after}
    page.locator("#nudge-slider").fill("1")
    expect(page.locator("#detail")).to_contain_text("Back to the prediction")
    mine = {(each["now_ms"], "nudge" in each) for each in told if each["user"] == "long ago"}
    assert mine == {(after, False), (after, True)}
    rank_for(page, "of whom nothing is recorded")
    assert abs(told[-1]["now_ms"] - time.time() * 1000) < 3_600_000


def test_the_keyboard_alone_is_enough(opened: Callable, serve: Callable[..., RunningService]) -> None:
    past(serve(), "keys")
    page, _ = opened()
    expect(page.locator("#list > li")).to_have_count(10)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("keys")
    page.keyboard.press("Enter")
    expect(page.locator("#past-title")).to_have_text("History of keys")
    stops = []
    for _ in range(80):  # a trap would never come back to the beginning
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
                const at = document.activeElement;
                const outline = at === document.body ? 1 : parseFloat(getComputedStyle(at).outlineWidth);
                return [at.id || at.className || at.tagName, outline];
            }"""
        )
        stops.append(stop)
        if stop[0] in ("BODY", "skip"):
            break
    names = [name for name, _ in stops]
    assert names[-1] in ("BODY", "skip"), names
    assert names.count("candidate") == 10
    assert names.count("timeline") == 1, "one stop for the whole past"
    assert {"nudge-slider", "nudge-objective", "by", "k"} <= set(names)
    assert min(width for _, width in stops) > 0, "where the focus is can be seen"
    row = page.locator("#history .timeline")
    row.first.focus()
    page.keyboard.press("ArrowDown")
    expect(row.nth(1)).to_be_focused()
    tip = page.get_by_role("tooltip")
    expect(tip).to_contain_text("watched 10 s of 11 s")
    assert row.nth(1).get_attribute("aria-describedby") == "tip"
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    button = page.locator("#list button").nth(2)
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(button).to_be_focused()


def test_the_past_can_be_reached_by_keyboard_again(opened: Callable, serve: Callable[..., RunningService]) -> None:
    past(serve(), "twice")
    page, _ = opened()
    rank_for(page, "twice")
    rows = page.locator("#history .timeline")
    for place in (0, 1):  # the second time where it was left
        rows.nth(place).focus()
        page.keyboard.press("Shift+Tab")
        expect(page.locator("#history .timeline:focus")).to_have_count(0)
        page.keyboard.press("Tab")
        expect(rows.nth(place)).to_be_focused()


BAD = ["<img/src=x/onerror=alert(1)>", '"><script>alert(2)</script>', "\u202eevil\u2066", "{{7*7}}${7*7}"]


def test_names_are_text_whatever_they_hold(opened: Callable, serve: Callable[..., RunningService]) -> None:
    for number, name in enumerate(BAD):
        past_one = {"item": name, "ts_ms": BEGAN + number, "watch_s": 3}
        assert serve().post(BAD[0], past_one).status_code == 200
    page, _ = opened()
    page.locator("#request summary").click()
    page.get_by_label("Identifiers of items").fill("\n".join(BAD))
    rank_for(page, BAD[0])
    assert sorted(items(page)) == sorted(BAD)
    assert sorted(texts(page, "#list .name bdi")) == sorted(BAD)
    assert sorted(texts(page, "#history .timeline bdi")) == sorted(BAD)
    page.locator("#history .timeline").first.focus()
    expect(page.get_by_role("tooltip")).to_contain_text(BAD[-1])
    assert page.locator("body img, body script, [onerror]").count() == 0
    expect(page.get_by_label("What the ranking had to make do with")).to_contain_text("4 of the 4 candidates")


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(opened: Callable) -> None:
    page, witness = opened("whole", KEY)
    field = page.locator("#key")
    expect(field).to_be_focused()
    field.fill("another-key-of-sixteen")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").first).to_contain_text("does not take this API key")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#list > li")).to_have_count(10)
    expect(field).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator("#list > li")).to_have_count(10)
    page.get_by_role("button", name="Forget the API key").click()
    expect(field).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    witness.ignore_status(401)


def refusing(status: int, code: str, message: str) -> Callable[[Route], None]:
    error = {"error": {"code": code, "message": message, "request_id": "r"}}
    return lambda route: route.fulfill(status=status, json=error, headers={"Retry-After": "3"})


@pytest.mark.parametrize(
    ("answer", "words", "status"),
    [
        (refusing(503, "overloaded", "more wait to be ranked than can be"), "too much to do", 503),
        (refusing(504, "timeout", "not ranked in time"), "took too long", 504),
        (refusing(422, "invalid_request", "no such feature"), "does not take this: no such feature", 422),
        (lambda route: route.fulfill(status=502, body="<h1>gateway</h1>"), "not JSON (status 502)", 502),
        (lambda route: route.abort(), "cannot be reached", 0),
    ],
)
def test_errors_are_told_in_words_and_can_be_tried_again(
    opened: Callable, answer: Callable[[Route], None], words: str, status: int
) -> None:
    page, witness = opened()
    expect(page.locator("#list > li")).to_have_count(10)
    page.route("**/v1/rank", answer)
    page.get_by_role("button", name="Rank", exact=True).click()
    problem = page.locator("#problem")
    expect(problem).to_contain_text(words)
    expect(page.locator("#status")).to_have_text("The list below is the former one.")
    page.unroute("**/v1/rank")
    page.get_by_role("button", name="Try again").click()
    expect(problem).to_be_empty()
    expect(page.locator("#status")).to_contain_text("40 candidates ranked")
    witness.ignore_status(status)


def test_what_cannot_be_recorded_is_kept_in_the_form(opened: Callable) -> None:
    page, witness = opened()
    expect(page.locator("#list > li")).to_have_count(10)
    page.route("**/v1/events", refusing(507, "store_full", "event store is full"))
    page.get_by_text("Add an impression", exact=True).click()
    page.get_by_label("Item", exact=True).fill("v7")
    page.get_by_role("button", name="Record and rank again").click()
    expect(page.locator("#event-problem")).to_have_text("Nothing was recorded: event store is full.")
    assert page.get_by_label("Item", exact=True).input_value() == "v7"
    assert page.locator("#changed").inner_text() == ""
    witness.ignore_status(507)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("no ensemble", "This model has no ensemble"),
        ("no ensemble no sequences", "makes no sequences of them"),
        ("no times", "times are not in the log"),
        ("no objectives", "Why its score is"),
    ],
)
def test_models_without_something_are_shown_without_it(
    opened: Callable, serve: Callable[..., RunningService], version: str, words: str
) -> None:
    page, _ = opened(version, width=1000)
    page.locator("#list button").first.click()
    expect(page.locator("#detail")).to_contain_text(words)
    assert items(page) == [each["item"] for each in asked(serve(version), "u1")["candidates"]]
    assert page.locator("#nudge-slider").count() == (0 if "ensemble" in version else 1)


LAYOUTS = [(width, scheme) for width in (400, 1400) for scheme in ("light", "dark")]
AUDIT = (REPOSITORY / "tests" / "helpers" / "audit.js").read_text()


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_the_page_can_be_read_by_everyone(
    opened: Callable, serve: Callable[..., RunningService], width: int, scheme: str
) -> None:
    long = "x" * 200
    past(serve(), long)
    page, _ = opened(width=width, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#request summary").click()
    page.get_by_label("Identifiers of items").fill(" ".join([*ITEMS[:9], long]))
    rank_for(page, long)
    row = page.locator(f"#list > li[data-item={long}] .candidate")
    if row.get_attribute("aria-expanded") == "false":
        row.click()
    page.get_by_role("button", name="Add an impression of it").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    assert {name: found for name, found in page.evaluate(AUDIT).items() if found} == {}
    assert page.evaluate("document.documentElement.lang") == "en"
    inside = page.locator("#list #detail").count()
    assert inside == (1 if width == 400 else 0), "where there is no room beside the list, below its candidate"


def test_the_package_has_all_files_and_no_inline_code() -> None:
    from a2gen_rec.serving.http.app import WEB

    html = WEB.joinpath("index.html").read_text()
    assert "style=" not in html
    assert html.count("<script") == html.count('<script type="module" src=') == 1
    modules = [each for each in WEB.joinpath("js").iterdir() if each.name.endswith(".js")]
    source = "".join(each.read_text() for each in modules)
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert forbidden not in source
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    assert "serving/web/*" in pyproject
    assert "serving/web/js/*" in pyproject
