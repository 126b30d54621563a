"""report.html: what is on the page, that it needs nothing else, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_run import run

from smpo_fast import cli
from smpo_fast.common.errors import DataError
from smpo_fast.evaluation.image_store import ImageStore
from smpo_fast.publishing import charts, web_report
from smpo_fast.publishing.web_report import write_web_report

EVIL = "a cat </script><script>document.title = 'evil'</script> & <b>"
EVALUATED = ['eval.contenders=["v=embedded-v"]', "eval.count=5", "eval.steps=2", "run.steps=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated with another model beside it, by prompts one of which is an attack."""
    folder = tmp_path_factory.mktemp("runs") / "owl"
    prompts = folder.with_suffix(".txt")
    prompts.write_text("a small red circle on a blue background\n" * 4 + EVIL + "\n")
    (folder.parent / "brightness.py").write_text(
        "import numpy as np\ndef mean(images, prompts):\n    return np.array([np.asarray(i).mean() for i in images])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        words = [f"eval.prompts={prompts}", *EVALUATED, "eval.scorer=brightness:mean"]
        assert run(folder, *words) == 0
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text by the tag that it is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


def pairs_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="pairs">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_has_every_comparison_and_needs_nothing_else(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    facts = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    cells = {data.strip() for tag in ("td", "th") for data in page.texts[tag]}
    assert len(facts["comparisons"]) == 2
    for row in facts["comparisons"]:
        assert {row["model"], row["name"], f"{row['aligned']:.4g}", f"{row['p_corrected']:.2g}"} <= cells
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert not attributes.get(name) or attributes[name].startswith(("#", "data:")), (tag, attributes)
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    assert "batch.pairs_per_step" not in text and "pairs_per_step = 6" in text
    assert "rewards 0." in text, "the statistics of the labels"


def test_a_prompt_is_text_and_no_code(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    assert "<script>document.title" not in text
    assert pairs_of(text)["rows"][4]["prompt"] == EVIL


def test_images_and_scores_are_those_of_the_evaluation(finished: Path) -> None:
    found = pairs_of((finished / "report.html").read_text())
    assert found["models"] == ["base", "aligned", "v"] and found["score"] == "reward"
    images = finished / "evaluation" / "images"
    for row in found["rows"]:
        assert all((images / file).is_file() for file in row["files"].values())
        assert row["images"]["base"].startswith("data:image/png;base64,")
    facts = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    mean = np.mean([row["scores"]["aligned"] for row in found["rows"]])
    assert mean == pytest.approx(facts["comparisons"][0]["aligned"], rel=1e-4)


def test_many_prompts_show_the_worst_and_the_best(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_report, "MOST_PROMPTS", 4)
    monkeypatch.setattr(web_report._Viewer, "_gains", lambda self, model: np.array([0.1, -0.5, 0.2, 0.0, 0.9]))
    found = pairs_of(web_report.compose(web_report.read_facts(finished)))
    assert {1, 4} <= {row["number"] for row in found["rows"]} and len(found["rows"]) == 4


def test_a_run_without_evaluation_and_a_folder_that_is_no_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "plain", ignore=shutil.ignore_patterns("evaluation", "report.html"))
    text = write_web_report(tmp_path / "plain").read_text()
    assert "Is it preferred?" not in text and "<svg" in text and "<script" not in text
    with pytest.raises(DataError, match="no run wrote it"):
        write_web_report(tmp_path)


def test_an_evaluation_writes_it_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "owl"))
    words = ["eval.prompts=embedded", "eval.scorer=embedded", "eval.count=2", "eval.contenders=[]", f"run.dir={folder}"]
    assert cli.main(["evaluate", "--config", str(folder / "config.toml"), *words]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert len(pairs_of((folder / "report.html").read_text())["rows"]) == 2
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == before
    store = ImageStore(folder / "evaluation" / "images")
    next(store.folder.glob("*/*.png")).write_bytes(b"x")
    assert cli.main(["report", str(folder)]) in (0, 2)


def test_lines_leave_out_what_is_missing_and_never_draw_it_as_zero() -> None:
    svg = charts.lines([1, 2, 3, 4], {"x": [5.0, None, float("nan"), 6.0]})
    raw = re.search(r'class="raw" points="([^"]*)"', svg)
    assert raw and len(raw[1].split()) == 2
    assert charts.lines([1], {"x": [None]}) == ""
    long = charts.lines(range(10_000), {"x": np.sin(np.arange(10_000) / 500).tolist()})
    assert len(long) < 30_000


def test_a_histogram_counts_gains_and_losses() -> None:
    svg = charts.histogram(np.array([-1.0, -0.5, 0.5, 0.6, 1.0, 0.0]), "x & y")
    assert 'aria-label="x &amp; y: 3 gains and 2 losses"' in svg
    assert svg.count("bar loss") == 15


# --- in a browser -----------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--virtual-time-budget=3000",
]  # fmt: skip
# What a user would do, in the page; the answers are left in the title.
VISIT = """
<script>
addEventListener("error", (event) => { document.title = "error: " + event.message; });
const key = (name) => document.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const said = [];
const note = (id) => said.push(document.getElementById(id).textContent);
note("prompt"); key("ArrowRight"); note("prompt");
document.getElementById("left").click(); note("left-text"); document.getElementById("left").click(); note("left-text");
document.getElementById("order").value = "best"; document.getElementById("order").onchange(); note("prompt");
document.getElementById("model").value = "v"; document.getElementById("model").onchange(); note("right-text");
document.getElementById("blind").click(); note("left-text"); note("prompt");
for (const vote of "adsad") key(vote);
note("result");
said.push(smpoReport.pairs(), location.hash);
document.title = JSON.stringify(said);
</script>
"""


def visit(page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """The page's HTML after its scripts have run, and what the browser printed."""
    words = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", *flags, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_looking_flipping_and_voting_in_a_browser(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text((finished / "report.html").read_text().replace("</body>", f"{VISIT}</body>"))
    html, console = visit(page, tmp_path / "profile", "--dump-dom")
    assert console == ""
    title = re.search(r"<title>(.*?)</title>", html, re.S)
    assert title
    first, second, flipped, back, best, other, blind, blind_prompt, result, votes, place = json.loads(
        title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    rows = pairs_of((finished / "report.html").read_text())["rows"]

    def gain(row: dict[str, Any]) -> float:
        return row["scores"]["aligned"] - row["scores"]["base"]

    ranked = sorted(rows, key=gain)
    assert first.startswith(f"1 of 5: {ranked[0]['prompt']}") and second.startswith(f"2 of 5: {ranked[1]['prompt']}")
    assert flipped.startswith("aligned, reward") and back.startswith("base, reward")
    assert best.startswith(f"1 of 5: {ranked[-1]['prompt']}") and other.startswith("v, reward")
    assert blind == "A" and "gain" not in blind_prompt
    assert result.startswith("5 votes: v is preferred to the base in") and "ties count half" in result
    (tmp_path / "votes.jsonl").write_text(votes)
    assert [json.loads(line)["label_0"] for line in votes.splitlines()].count(0.5) == 1
    assert "model=v" in place and "blind=1" in place
    words = ["import", str(tmp_path / "votes.jsonl"), str(tmp_path / "pairs"), "--root"]
    assert cli.main([*words, str(finished / "evaluation" / "images")]) == 0
    summary = json.loads((tmp_path / "pairs" / "import.json").read_text())
    assert summary["pairs"] == 5 and summary["statistics"]["ties"] == 1, "own human labels"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_is_wider_than_the_window(width: int, finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    measure = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    page.write_text((finished / "report.html").read_text().replace("</body>", measure))
    html, console = visit(page, tmp_path / "profile", "--dump-dom", f"--window-size={width},900")
    found = re.search(r"<title>(\d+) (\d+)</title>", html)
    assert console == "" and found and int(found[1]) <= int(found[2])
