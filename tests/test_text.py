"""Text -> token windows."""

import pytest
import torch

from pyprune import InputError
from pyprune.base.text import default_text, halves, load_text, read_text, token_windows


def test_default_text_is_long_and_always_the_same():
    assert len(default_text()) > 300_000
    assert default_text() == default_text()


@pytest.mark.parametrize("text", [default_text(), "one\n\ntwo\n\nthree", "no break at all", "", "a\n\n", "\n\nb"])
def test_halves_do_not_overlap_and_lose_nothing(text):
    first, second = halves(text)
    assert first + second == text
    assert abs(len(first) - len(second)) <= max(10_000, len(text) // 5)


def test_halves_split_at_a_paragraph():
    assert halves("aaaa\n\nbbbb\n\ncccc") == ("aaaa\n\nbbbb", "\n\ncccc")


def test_load_text(tmp_path):
    whole, name = load_text(None, "first")
    assert name == "pydoc_data.topics (first half)"
    assert whole + load_text(None, "second")[0] == default_text()
    (tmp_path / "t.txt").write_text("aa\n\nbb", encoding="utf-8")
    assert load_text(tmp_path / "t.txt", "second") == ("aa\n\nbb", "t.txt")
    assert load_text(f"{tmp_path}/t.txt:first", "second") == ("aa", "t.txt (first half)")
    assert load_text(f"{tmp_path}/t.txt:second", "first") == ("\n\nbb", "t.txt (second half)")


def test_read_jsonl(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "é", "id": 1}\n\n{"text": "b\\nc"}\n', encoding="utf-8")
    assert read_text(tmp_path / "t.jsonl") == "é\n\nb\nc"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"caf\xe9", r"text must be UTF-8; .*t\.txt is not"),
        ("t.jsonl", b"\xff", r"text must be UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', r"text must be JSON lines; .*t\.jsonl:2 is not JSON"),
        ("t.jsonl", b'{"text": "a"}\n\n["a"]\n', r"string field 'text' in every line; .*t\.jsonl:3 has none"),
        ("t.jsonl", b'{"body": "a"}\n', r"t\.jsonl:1 has none"),
        ("t.jsonl", b'{"text": 7}\n', r"t\.jsonl:1 has none"),
        ("t.jsonl", b"[" * 100_000, r"t\.jsonl:1 is not JSON"),
    ],
)
def test_bad_files_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


def test_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="text must be an existing file; got"):
            read_text(path)


def test_windows_are_the_text_from_its_start(tokenizer):
    text = default_text()
    windows = token_windows(tokenizer, text, 1000, 64)
    assert windows.shape == (15, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, token_windows(tokenizer, text, 1000, 64))
    assert windows.flatten().tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][: 15 * 64]


def test_zero_tokens_means_all(tokenizer):
    text = default_text()[:20_000]
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert token_windows(tokenizer, text, 0, 32).shape == (count // 32, 32)
    assert token_windows(tokenizer, text, 10**9, 32).shape == (count // 32, 32)


class Spaces:
    """One token for every hundred characters, as tokenizers do with runs of spaces."""

    def __call__(self, text, **kwargs):
        return {"input_ids": list(range(len(text) // 100))}


def test_long_tokens_do_not_shorten_the_text():
    assert token_windows(Spaces(), " " * 100_000, 512, 64).shape == (8, 64)


@pytest.mark.parametrize(
    ("tokens", "window", "message"),
    [
        (0, 1, "window must be at least 2 tokens; got 1"),
        (31, 32, r"tokens must be at least one window \(32\), or 0 for all; got 31"),
        (-5, 32, r"tokens must be at least one window \(32\), or 0 for all; got -5"),
    ],
)
def test_bad_numbers_are_refused(tokens, window, message, tokenizer):
    with pytest.raises(InputError, match=message):
        token_windows(tokenizer, "some text", tokens, window)


@pytest.mark.parametrize("text", ["", "short"])
def test_text_shorter_than_a_window_is_refused(text, tokenizer):
    with pytest.raises(
        InputError, match=r"calibration text must hold at least one window of 64 tokens; got '\d+ tokens'"
    ):
        token_windows(tokenizer, text, 0, 64, "calibration text")
