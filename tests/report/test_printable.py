from hypothesis import given
from hypothesis import strategies as st

from ray_auditor.report.number import decimal, duration, percent, percent_interval, signed
from ray_auditor.report.printable import printable


@given(
    st.text(st.characters(), max_size=60)
    | st.sampled_from(["\x1b[31m", "a\u202eb", "\ud800", "\u200b", "\x00"])
)
def test_any_text_becomes_printable_and_bounded(text: str) -> None:
    shown = printable(text, max_chars=20)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert len(shown) <= 21 * len("<U+10FFFF>")
    if text.isprintable() and len(text) <= 20:
        assert shown == text


def test_what_is_hidden_is_named() -> None:
    assert printable("a\u202eb\x1b[0m\n") == "a<U+202E>b<U+001B>[0m<U+000A>"
    assert printable("0123456789", max_chars=6) == "0123…89"


def test_numbers_round_once_and_say_when_there_is_none() -> None:
    assert [signed(value) for value in (9.24, -0.36, -0.04, 0.0, 12345.6, -2.5e9, None)] == [
        "+9.2", "\N{MINUS SIGN}0.4", "0.0", "0.0", "+12,346", "\N{MINUS SIGN}2.5e+09", "n.d.",
    ]  # fmt: skip
    assert percent(0.413) == "+41.3%"
    assert percent_interval(-0.02, 0.1) == "[\N{MINUS SIGN}2.0%, +10.0%]"
    assert percent(None) == percent_interval(None, 0.1) == decimal(None) == "n.d."
    assert decimal(1234.567) == "1,234.57"
    assert [duration(value) for value in (42.4, 200, 18420)] == ["42 s", "3 min 20 s", "5 h 07 min"]
