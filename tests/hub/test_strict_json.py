import pytest

from ray_auditor.hub import CandidateError
from ray_auditor.hub.config_json import MAX_CONFIG_BYTES, parse_object, read_object


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "must be UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is not JSON"),
        (b'{"a": "\xff"}', "must be UTF-8"),
        (b'{"a": "\\ud800"}', "must be UTF-8"),
        (b'{"a": "\x00"}', "is not JSON"),
        (b'{"a": ' + b"9" * 20 + b"}", "at most 19 digits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "at most 19 digits"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", "at most 32 deep"),
        (b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "at most 32 deep"),
        (b'{"a":' * 90_000 + b"1" + b"}" * 90_000, "at most 32 deep"),
        (b"[" + b"0," * 300_000 + b"0]", "at most 200000 items"),
        (b"[1]", "must be an object, got list"),
        (b"", "is not JSON"),
        (b'{"a": 1} {"b": 2}', "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 1,}', "is not JSON"),
        (b'{"a": 1 /* comment */}', "is not JSON"),
    ],
)
def test_B8_json_that_two_readers_read_differently(raw: bytes, why: str) -> None:
    with pytest.raises(CandidateError, match=why) as caught:
        parse_object(raw, "config.json")
    assert caught.value.reason.startswith("rejected:json: config.json: ")


def test_plain_json_is_read(tmp_path) -> None:
    (tmp_path / "c.json").write_text(
        '{"a": [1, 2.5, null, true, "\\u00e9\\ud83d\\ude00", {"b": -3}], "inf": 1e400}\n'
    )
    assert read_object(tmp_path, "c.json") == {
        "a": [1, 2.5, None, True, "é\U0001f600", {"b": -3}],
        "inf": float("inf"),
    }


def test_B8_a_file_past_the_limit_is_not_read(tmp_path, audit_events) -> None:
    with open(tmp_path / "c.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CandidateError, match=f"at most {MAX_CONFIG_BYTES} bytes, got 1073741824"):
        read_object(tmp_path, "c.json")


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(CandidateError, match=r"rejected:missing_file: c\.json does not exist"):
        read_object(tmp_path, "c.json")
