"""A text of 60,000 tokens, made up between browser and server: little of it is in the document."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOTAL = 60_000
PAGE = 1000
MOST = 6000
"""Spans that are in the document at once, far fewer than there are tokens."""


def token(number: int) -> str:
    """Words of three tokens, so that pages of 1000 would cut some; a line now and then."""
    word = f" w{number}" if number % 3 == 0 else f"x{number}"
    return word + "\n" * (number % 300 == 299)


@dataclass
class LongText:
    """A page that shows the text, and what it has asked for."""

    watched: Any
    asked: list[int] = field(default_factory=list)
    broken: bool = False

    def answer_profile(self, route: Any) -> None:
        profile = route.fetch().json()
        route.fulfill(json={**profile, "num_tokens": TOTAL})

    def answer_tokens(self, route: Any) -> None:
        after, limit = (int(n) for n in re.findall(r"=(\d+)", route.request.url))
        self.asked.append(after)
        if self.broken:
            error = {"message": "come back later", "code": "queue_full"}
            route.fulfill(status=503, json={"error": error})
            return
        numbers = range(after, min(after + limit, TOTAL))
        body = {"texts": list(map(token, numbers)), "entropies": [n % 7 for n in numbers]}
        more = after + limit < TOTAL
        route.fulfill(json={**body, "first": after, "num_tokens": TOTAL, "has_more": more})

    @property
    def num_spans(self) -> int:
        return int(self.watched.page.locator(".t").count())

    def page_of(self, number: int) -> Any:
        return self.watched.page.locator(".heat-page").nth(number)

    def scroll(self, share: float) -> None:
        """To this share of the whole text."""
        box = self.watched.page.locator(".heat-box")
        box.evaluate("(box, share) => { box.scrollTop = share * box.scrollHeight }", share)

    def top(self) -> str:
        """The token at the upper edge of what is seen, once all that is seen has come."""
        self.watched.page.wait_for_function(
            """() => {
              const box = document.querySelector(".heat-box").getBoundingClientRect();
              return [...document.querySelectorAll(".heat-page.away")].every((page) => {
                const { top, bottom } = page.getBoundingClientRect();
                return bottom < box.top || top > box.bottom;
              });
            }"""
        )
        text = self.watched.page.evaluate(
            """() => {
              const box = document.querySelector(".heat-box").getBoundingClientRect();
              return [...document.querySelectorAll(".t")]
                .find((span) => span.getBoundingClientRect().bottom > box.top + 1)?.textContent;
            }"""
        )
        return str(text)


@pytest.fixture
def long(open_page: Callable[..., Any], read: str) -> LongText:
    watched = open_page("/")
    text = LongText(watched)
    watched.page.route("**/study/profile", text.answer_profile)
    watched.page.route("**/study/tokens?*", text.answer_tokens)
    watched.page.goto(f"/#/{read}")
    watched.expect(text.page_of(0)).to_contain_text("w99 ")
    return text


def test_what_is_far_away_is_let_go_and_comes_back(long: LongText) -> None:
    page, expect = long.watched.page, long.watched.expect
    expect(page.locator(".heat-page")).to_have_count(TOTAL // PAGE)
    height = page.locator(".heat-box").evaluate("(box) => box.scrollHeight")
    for number in (20, 40, 59):
        page.locator(".heat-box").evaluate(
            """(box, number) => { box.querySelectorAll(".heat-page")[number].scrollIntoView() }""",
            number,
        )
        expect(long.page_of(number).locator(".t").nth(900)).to_be_attached()
        expect(long.page_of(0).locator(".t")).to_have_count(0)
        assert long.num_spans <= MOST
    expect(page.get_by_text("End of the document")).to_be_attached()
    assert long.page_of(0).text_content() == "Tokens 1 to 1,000"
    assert len(long.asked) < 20  # what lies between was not looked at
    # heights were guessed well from the first page, and the way back asks nothing
    grown = page.locator(".heat-box").evaluate("(box) => box.scrollHeight")
    assert 0.7 < grown / height < 1.4
    asked = list(long.asked)
    long.scroll(0)
    expect(long.page_of(0)).to_contain_text("w99 ")
    assert long.top() == token(0)
    assert long.asked == asked
    assert long.num_spans <= MOST


def test_no_word_is_cut_where_a_page_ends(long: LongText) -> None:
    first, second = long.page_of(0), long.page_of(1)
    long.scroll(0.9 / 60)  # both are near
    long.watched.expect(second.locator(".t").nth(900)).to_be_attached()
    long.watched.expect(first.locator(".t").nth(900)).to_be_attached()
    assert second.text_content().startswith(" w")
    shown = first.text_content() + second.text_content()
    assert "".join(map(token, range(1100))) in shown
    assert second.get_attribute("aria-label") == "Tokens 1,001 to 2,000"


def test_what_is_read_stays_where_it_is(long: LongText) -> None:
    """Pages that are filled or emptied above do not move the text that is seen."""
    expect = long.watched.expect
    long.scroll(0.5)
    expect(long.page_of(30).locator(".t").nth(900)).to_be_attached()
    long.watched.page.get_by_role("region", name="Text of the document").focus()
    seen = []
    for _ in range(12):  # up into pages whose height was only guessed
        long.watched.page.keyboard.press("PageUp")
        number = re.search(r"\d+", long.top())
        assert number is not None
        seen.append(int(number[0]))
    assert seen == sorted(seen, reverse=True)
    assert max(a - b for a, b in pairwise(seen)) < PAGE


def test_what_has_the_focus_is_not_taken_away(long: LongText) -> None:
    page, expect = long.watched.page, long.watched.expect
    first = long.page_of(0)
    first.evaluate(
        """(page) => {
          const button = document.createElement("button");
          button.textContent = "a mark";
          page.append(button);
          button.focus({ preventScroll: true });
        }"""
    )
    long.scroll(0.5)
    expect(long.page_of(30).locator(".t").nth(900)).to_be_attached()
    assert page.evaluate("document.activeElement.textContent") == "a mark"
    expect(first.locator(".t").nth(900)).to_be_attached()
    page.get_by_label("Your question").focus(timeout=5000)
    long.scroll(0.9)
    expect(first.locator(".t")).to_have_count(0)


def test_a_page_that_does_not_come_can_be_asked_for_again(long: LongText) -> None:
    long.watched.allowed = ("status of 503",)
    long.broken = True
    long.scroll(0.5)
    last = long.page_of(30)
    long.watched.expect(last.get_by_role("alert")).to_contain_text("come back later")
    long.broken = False
    last.get_by_role("button", name="Try again").click()
    long.watched.expect(last.locator(".t").nth(900)).to_be_attached()


def test_a_place_of_the_strip_is_shown(long: LongText) -> None:
    strip = long.watched.page.locator(".strip svg")
    box = strip.bounding_box()
    strip.click(position={"x": box["width"] * 0.75, "y": box["height"] / 2})
    shown = long.page_of(45).locator(".t").first
    long.watched.expect(shown).to_be_attached()
    long.watched.page.locator(".heat-box").scroll_into_view_if_needed()
    long.watched.expect(shown).to_be_in_viewport()
