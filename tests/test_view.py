"""What people look at: text traces, and the page that replays episodes, also in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Scripted, make_task

from agent import run_episodes
from config import BadInput
from tasks.scoring import exact_match
from tools import view

HOSTILE = (
    "</script><script>document.title = 'taken'</script>"
    "<img src=x onerror=\"document.title = 'taken'\"> Anna & <b>Ben</b>"
)
SCRIPT = [
    "<create_memory>Anna lives in Rome</create_memory><create_memory>Ben is a baker</create_memory>"
    "<read_memory>Anna Ben</read_memory>",
    "<update_memory>1: Anna lives in Oslo</update_memory><delete_memory>2</delete_memory>"
    "<delete_memory>7</delete_memory>",
    "<scratchpad>market 1</scratchpad>",
    "<answer>Oslo</answer>",
]
CHUNKS = [HOSTILE, "Anna lives in Oslo.", "Anna went to the market."]


def play(config, embed, script, question="Where does Anna live?", chunks=CHUNKS):
    task = make_task(chunks, (question,), ("Oslo",))
    return run_episodes([task], Scripted({question: script}), config, embed, exact_match)


@pytest.fixture
def page(config, embed, tmp_path):
    """A page with two tasks and two policies. The second policy fails in the first task."""
    sft = play(config, embed, SCRIPT) + play(config, embed, SCRIPT, "Where now?")
    grpo = play(config, embed, [*SCRIPT[:3], "<answer>Rome</answer>"]) + sft[1:]
    view.write_page([("sft", sft), ("grpo", grpo)], "paper", tmp_path / "page.html")
    return tmp_path / "page.html"


def test_the_trace_replays_the_memory(config, embed):
    """Bug: the memory shown after a turn is not what the store held."""
    [episode] = play(config, embed, SCRIPT)
    text = view.trace(episode)
    assert "memory: [0] Anna lives in Rome | [1] Ben is a baker\n" in text
    assert "memory: [0] Anna lives in Oslo\n" in text
    assert "not executed, delete '': no entry with that number is shown" in text
    assert text.endswith("answer: Oslo  gold: Oslo  score: 1")


def test_the_trace_cannot_command_the_terminal(config, embed):
    """Bug: a document with escape sequences clears the screen, or hides what the policy did."""
    [episode] = play(config, embed, [], chunks=["a\x1b[2Jb\u202e漢字 'c'"])
    assert "a\\x1b[2Jb\\u202e漢字 'c'\n" in view.trace(episode)


def test_replay_marks_what_a_turn_did(config, embed):
    """Bug: the memory after a turn is wrong, or an entry has the mark of another operation."""
    [episode] = play(config, embed, SCRIPT)
    turns = [entries for _, entries in view.replay(episode)]
    rome, oslo = "Anna lives in Rome", "Anna lives in Oslo"
    assert turns[0] == [
        {"id": 0, "text": rome, "mark": "created"},
        {"id": 1, "text": "Ben is a baker", "mark": "created"},
    ]
    assert turns[1] == [
        {"id": 0, "text": oslo, "mark": "updated", "old": rome},
        {"id": 1, "text": "Ben is a baker", "mark": "deleted"},
    ]
    assert turns[2] == [{"id": 0, "text": oslo}] and episode.memory.texts == {0: oslo}


def test_an_entry_updated_and_deleted_in_one_turn(config, embed):
    """Bug: the last operation of a turn on an entry does not decide its mark."""
    both = [
        "<create_memory>a b</create_memory><read_memory>a</read_memory>",
        "<update_memory>1: a c</update_memory><delete_memory>1</delete_memory>",
    ]
    [episode] = play(config, embed, both)
    marks = [[entry.get("mark") for entry in entries] for _, entries in view.replay(episode)]
    assert marks[:3] == [["created"], ["deleted"], []]


def test_a_page_needs_nothing_else_and_runs_no_document(page):
    """Bug: a document with a tag ends the script, or the page loads something from elsewhere."""
    text = page.read_text(encoding="utf-8")
    rest = re.sub(r'<script type="application/json".*?</script>', "", text)
    assert not re.search(r"""(src|href)\s*=\s*["']?\w|@import|url\(|https?://""", rest)
    assert text.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(data[1])
    assert data["labels"] == ["sft", "grpo"] and data["tags"]["create_memory"] == "create"
    assert [[episode["reward"] for episode in task] for task in data["tasks"]] == [[1, 0], [1, 1]]
    turns = data["tasks"][0][0]["turns"]
    assert turns[0]["chunk"] == HOSTILE and turns[1]["operations"][2]["error"]
    assert turns[1]["shown"] == [
        {"id": 0, "text": "Anna lives in Rome"},
        {"id": 1, "text": "Ben is a baker"},
    ]


def test_policies_of_one_name(config, embed, tmp_path):
    """Bug: of two runs with the same label only one is on the page."""
    episodes = play(config, embed, SCRIPT)
    view.write_page([("grpo", episodes), ("grpo", episodes)], "paper", tmp_path / "page.html")
    assert '"labels": ["grpo", "grpo"]' in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [0, -1])
def test_a_bad_number_of_episodes(monkeypatch, number):
    """Bug: --trace 0 prints nothing, not even an error."""
    monkeypatch.setattr("sys.argv", ["view", "--trace", str(number)])
    with pytest.raises(BadInput, match="--trace"):
        view.main()


def test_a_page_is_not_overwritten(tmp_path, monkeypatch):
    """Bug: after minutes of play, the page replaces another one, or its folder does not exist."""
    (tmp_path / "page.html").write_text("old")
    for out, message in ((tmp_path / "page.html", "exists"), (tmp_path / "no/page.html", "folder")):
        monkeypatch.setattr("sys.argv", ["view", "--html", str(out)])
        with pytest.raises(BadInput, match=message):
            view.main()


@pytest.fixture
def browser(page):
    webdriver = pytest.importorskip("selenium.webdriver", reason="this test needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("this test needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync"
    ).split()
    for flag in [*flags, f"user-data-dir={page.parent / 'profile'}"]:
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1300])
def test_the_page_in_a_browser(browser, page, scheme, width):
    """Bug: the page shows a wrong turn, needs a mouse, is cut off on a phone or hard to read."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())

    def text():
        return browser.execute_script("return document.body.innerText")

    def press(key):
        browser.switch_to.active_element.send_keys(key)

    left, right = "\ue012", "\ue014"
    assert HOSTILE in text() and "taken" not in browser.title
    assert "sft: reward 1.00" in text() and "grpo: reward 0.00" in text()
    press(left)  # there is nothing earlier
    press(right)
    assert "turn 2 of 4" in text() and "Ben is a baker (deleted)" in text()
    assert "Anna lives in Rome → Anna lives in Oslo (updated)" in text()
    assert "delete 7: no entry with that number is shown" in text()
    assert "Retrieved for the query “Anna Ben”" in text()
    for _ in range(3):
        press(right)
    assert (
        "turn 4 of 4" in text() and "Rome ✗ gold: Oslo" in text() and "Oslo ✓ gold: Oslo" in text()
    )
    options = "return document.querySelectorAll('#task option').length"
    assert browser.execute_script(options) == 2
    browser.execute_script("document.getElementById('failed').focus()")
    press(" ")
    assert browser.execute_script(options) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    log = [one for one in browser.get_log("browser") if "favicon" not in one["message"]]
    assert [one for one in log if one["level"] == "SEVERE"] == []
    check_accessibility(browser)


def check_accessibility(browser):
    axe = pytest.importorskip(
        "axe_core_python", reason="the rest passes; this needs axe-core-python"
    )
    browser.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text())
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
    assert [one["id"] for one in serious] == []
