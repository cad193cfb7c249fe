"""Files -> documents -> token windows."""

import json

import pytest
import torch

from pyprune import InputError
from pyprune.base.text import Exchange, default_text, halves, load_text, read_documents
from pyprune.base.windows import cut, start_ids, token_stream, token_windows

TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


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
    (whole,), name = load_text(None, "first")
    assert name == "pydoc_data.topics (first half)"
    assert whole + load_text(None, "second")[0][0] == default_text()
    (tmp_path / "t.txt").write_text("aa\n\nbb", encoding="utf-8")
    assert load_text(tmp_path / "t.txt", "second") == (["aa\n\nbb"], "t.txt")
    assert load_text(f"{tmp_path}/t.txt:first", "second") == (["aa"], "t.txt (first half)")
    assert load_text(f"{tmp_path}/t.txt:second", "first") == (["\n\nbb"], "t.txt (second half)")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "abc"), encoding="utf-8")
    assert load_text(f"{tmp_path}/t.jsonl:first", "first")[0] == ["a", "b"]
    assert load_text(f"{tmp_path}/t.jsonl:second", "first")[0] == ["c"]


def test_records(tmp_path):
    lines = [
        {"text": "é", "id": 1},
        {"messages": TALK},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"question": "Why?", "answer": "So."},
    ]
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    text, talk, task, question = read_documents(tmp_path / "t.jsonl")
    assert text == "é" and talk.messages == tuple(TALK) and talk.plain is None
    assert task.plain == "Add.\n\n1 2\n3" and [m["content"] for m in task.messages] == ["Add.\n\n1 2", "3"]
    assert question.plain == "Why?\nSo." and question.place.endswith("t.jsonl:7")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"caf\xe9", r"text must be UTF-8; .*t\.txt is not"),
        ("t.jsonl", b"\xff", r"text must be UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', r"text must be JSON lines; .*t\.jsonl:2 is not JSON"),
        ("t.jsonl", b'{"text": "a"}\n\n["a"]\n', r"'text', 'messages', .* in every line; .*t\.jsonl:3 has none"),
        ("t.jsonl", b'{"body": "a"}\n', r"t\.jsonl:1 has none"),
        ("t.jsonl", b'{"text": 7}\n', r"t\.jsonl:1 has none"),
        ("t.jsonl", b'{"prompt": "a"}\n', r"t\.jsonl:1 has none"),
        ("t.jsonl", b"[" * 100_000, r"t\.jsonl:1 is not JSON"),
        ("t.jsonl", b'{"messages": []}\n', r"t\.jsonl:1: messages must be a list of objects"),
        ("t.jsonl", b'{"messages": [{"role": "user"}]}\n', r"t\.jsonl:1: messages must be a list of objects"),
    ],
)
def test_bad_files_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / name)


def test_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="text must be an existing file; got"):
            read_documents(path)


def test_windows_are_the_text_from_its_start(tokenizer):
    text = default_text()
    windows = token_windows(tokenizer, text, 1000, 64)
    assert windows.shape == (15, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, token_windows(tokenizer, [text], 1000, 64))
    assert windows.flatten().tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][: 15 * 64]
    documents = text.split("\n\n")
    assert torch.equal(windows, token_windows(tokenizer, documents, 1000, 64)), "documents are joined as they were"


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


@pytest.fixture
def beginning(tokenizer):
    """A tokenizer that begins every text with its start token."""
    import copy

    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.bos_token = "<s>"
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", own.bos_token_id)]
    )
    return own


def test_every_window_begins_as_the_tokenizer_begins_a_text(beginning, tokenizer):
    start = beginning.bos_token_id
    plain = tokenizer(default_text()[:9000], add_special_tokens=False)["input_ids"]
    windows = token_windows(beginning, default_text()[:9000], 1000, 64)
    assert windows.shape == (15, 64) and (windows[:, 0] == start).all()
    assert windows[:, 1:].flatten().tolist() == plain[: 15 * 63], "nothing of the text is lost"
    assert start_ids(tokenizer) == [], "this one begins a text with nothing"
    for words, used in (("never", beginning), ("auto", tokenizer)):
        assert token_windows(used, default_text()[:9000], 1000, 64, start=words).flatten().tolist() == plain[: 15 * 64]
    forced = token_windows(tokenizer, default_text()[:9000], 1000, 64, start="always")
    assert (forced[:, 0] == tokenizer.bos_token_id).all() and torch.equal(forced[:, 1:], windows[:, 1:])


def test_documents_begin_and_start_tokens_do_not_double(beginning, tokenizer):
    start = beginning.bos_token_id
    one, two = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("first text", "second"))
    stream = token_stream(beginning, ["first text", "second"], [start])
    assert stream == [start, *one, start, *two]
    assert cut([start, 5, 6, start, 7, 8], 3, [start]).tolist() == [[start, 5, 6], [start, 7, 8]]
    assert cut([start, 5, 6, 9, start, 7, 8], 3, [start]).tolist() == [[start, 5, 6], [start, 9, start], [start, 7, 8]]
    assert cut([start, 5, 6, 9, 7], 3, [start], most=1).tolist() == [[start, 5, 6]]
    assert cut([5, 6], 3).shape == (0, 3)


def test_conversations_are_read_in_the_words_of_the_template(tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    talk, task = Exchange(tuple(TALK)), Exchange(tuple(TALK), "Hi? Hello.")
    assert token_stream(own, ["a", task, "b"], []) == own("a\n\nHi? Hello.\n\nb", add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match="text must have 'text', or the tokenizer a chat template"):
        token_stream(own, [talk], [])
    own.chat_template = TEMPLATE
    rendered = own("<user>Hi?</s><assistant>Hello.</s>", add_special_tokens=False)["input_ids"]
    alone = [own(t, add_special_tokens=False)["input_ids"] for t in ("a", "b")]
    assert token_stream(own, ["a", talk, task, "b"], []) == [*alone[0], *rendered, *rendered, *alone[1]]
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"text: the tokenizer's chat template fails .*roles must alternate"):
        token_stream(own, [talk], [])


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


def test_a_start_token_that_is_not_there_is_refused(tokenizer, beginning):
    import copy

    own = copy.deepcopy(tokenizer)
    own.bos_token = None
    with pytest.raises(InputError, match="start_token must be auto or never with a tokenizer that has no start token"):
        token_windows(own, "some text", 0, 4, start="always")
    with pytest.raises(InputError, match="start_token must be one of auto, always, never"):
        token_windows(own, "some text", 0, 4, start="often")
    with pytest.raises(InputError, match="window must be longer than the start of a text"):
        token_windows(beginning, "some text", 0, 2)


@pytest.mark.parametrize("text", ["", "short"])
def test_text_shorter_than_a_window_is_refused(text, tokenizer):
    with pytest.raises(
        InputError, match=r"calibration text must hold at least one window of 64 tokens; got '\d+ tokens'"
    ):
        token_windows(tokenizer, text, 0, 64, "calibration text")


def test_lines_of_json_end_at_line_feeds_alone(tmp_path):
    words = "one\u2028two\x85three"
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": words}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_documents(tmp_path / "t.jsonl") == [words]
