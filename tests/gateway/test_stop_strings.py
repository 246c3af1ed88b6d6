"""Stop strings are found however the text is split, and no more text than necessary is held back."""

from hypothesis import given, strategies as st

from pdserve.gateway.text.stop_strings import Pattern, StopMatcher

words = st.text("ab", min_size=1, max_size=5)


def matcher(*stops: str) -> StopMatcher:
    return StopMatcher([Pattern.compile(stop) for stop in stops])


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Implements the definition: the earliest end wins, and of the stop strings that end there the
    longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(st.text("abc", max_size=6), max_size=8), stops=st.lists(words, min_size=1, max_size=4))
def test_the_result_does_not_depend_on_the_splitting(pieces: list[str], stops: list[str]) -> None:
    watched = matcher(*stops)
    out = "".join(watched.push(piece) for piece in pieces) + watched.flush()
    assert (out, watched.found) == expected("".join(pieces), stops)


@given(pieces=st.lists(st.text("abc", max_size=6), max_size=8), stops=st.lists(words, min_size=1, max_size=4))
def test_only_what_could_begin_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    watched, seen, out = matcher(*stops), "", ""
    for piece in pieces:
        seen += piece
        out += watched.push(piece)
        if watched.found is not None:
            return
        held = seen[len(out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_that_only_looked_like_a_stop_string_comes_later() -> None:
    watched = matcher("###")
    assert [watched.push(piece) for piece in ("one #", "#", " two")] == ["one ", "", "## two"]
    assert watched.flush() == ""


def test_no_text_follows_a_stop_string() -> None:
    watched = matcher("end")
    assert watched.push("the end of") == "the "
    assert watched.push(" it all") == ""
    assert watched.flush() == ""


def test_without_stop_strings_text_passes() -> None:
    assert matcher().push("anything") == "anything"
