"""What people look at: the page that replays episodes, in a browser too where one is installed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Scripted, make_task

import show
from agent import run_episodes
from scoring import exact_match

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> Anna & <b>Ben</b>"
SCRIPT = ["<create_memory>Anna lives in Rome</create_memory><create_memory>Ben is a baker</create_memory><read_memory>Anna Ben</read_memory>",
          "<update_memory>1: Anna lives in Oslo</update_memory><delete_memory>2</delete_memory><delete_memory>7</delete_memory>",
          "<scratchpad>market 1</scratchpad>", "<answer>Oslo</answer>"]


def episodes(config, embed, script, question):
    return run_episodes([make_task([HOSTILE, "Anna lives in Oslo.", "Anna went to the market."], (question,), ("Oslo",))],
                        Scripted({question: script}), config, embed, exact_match)


@pytest.fixture
def page(config, embed, tmp_path):
    """A page with two tasks and two policies, of which the second one fails in the first task."""
    sft = [*episodes(config, embed, SCRIPT, "Where does Anna live?"), *episodes(config, embed, SCRIPT, "Where now?")]
    grpo = [*episodes(config, embed, [*SCRIPT[:3], "<answer>Rome</answer>"], "Where does Anna live?"), sft[1]]
    show.write_page({"sft": sft, "grpo": grpo}, "paper", tmp_path / "page.html")
    return tmp_path / "page.html"


def test_replay_marks_what_a_turn_did(config, embed):
    """Bug: the memory shown after a turn is not the one that the episode had, or an entry is marked with what it did not go through."""
    [episode] = episodes(config, embed, SCRIPT, "Where does Anna live?")
    turns = [entries for _, entries in show.replay(episode)]
    assert turns[0] == [{"id": 0, "text": "Anna lives in Rome", "mark": "created"}, {"id": 1, "text": "Ben is a baker", "mark": "created"}]
    assert turns[1] == [{"id": 0, "text": "Anna lives in Oslo", "mark": "updated", "old": "Anna lives in Rome"},
                        {"id": 1, "text": "Ben is a baker", "mark": "deleted"}]
    assert turns[2] == [{"id": 0, "text": "Anna lives in Oslo"}] and episode.memory.texts == {0: "Anna lives in Oslo"}
    both = ["<create_memory>a b</create_memory><read_memory>a</read_memory>", "<update_memory>1: a c</update_memory><delete_memory>1</delete_memory>"]
    [episode] = episodes(config, embed, both, "Where does Anna live?")
    assert [[entry.get("mark") for entry in entries] for _, entries in show.replay(episode)][:3] == [["created"], ["deleted"], []]


def test_a_page_needs_nothing_else_and_takes_no_orders(page):
    """Bug: a document that holds a tag ends the script, or the page loads something from elsewhere."""
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?\w|@import|url\(|https?://""", re.sub(r'<script type="application/json".*?</script>', "", text))
    assert text.count("</script>") == 2
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["labels"] == ["sft", "grpo"] and data["tasks"][0][0]["turns"][0]["chunk"] == HOSTILE
    assert [[episode["reward"] for episode in task] for task in data["tasks"]] == [[1, 0], [1, 1]]
    assert data["tasks"][0][0]["turns"][1]["operations"][2]["error"] and data["tags"]["create_memory"] == "create"


@pytest.fixture
def browser(page):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("the browser test needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={page.parent / 'profile'}"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1300])
def test_the_page_in_a_browser(browser, page, scheme, width):
    """Bug: the page shows the wrong turn, cannot be used by keyboard alone, is cut off on a phone, or hard to read for some."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=900, deviceScaleFactor=1, mobile=False))
    browser.get(page.as_uri())

    def text():
        return browser.execute_script("return document.body.innerText")

    def press(key):
        browser.switch_to.active_element.send_keys(key)

    left, right = "\ue012", "\ue014"
    assert HOSTILE in text() and "taken" not in browser.title and "sft: reward 1.00" in text() and "grpo: reward 0.00" in text()
    press(left)  # nothing earlier
    press(right)
    assert "turn 2 of 4" in text() and "Anna lives in Rome → Anna lives in Oslo (updated)" in text() and "Ben is a baker (deleted)" in text()
    assert "delete 7: no entry of that number is shown" in text() and "Retrieved for the query “Anna Ben”" in text()
    press(right), press(right), press(right)
    assert "turn 4 of 4" in text() and "Rome ✗ gold: Oslo" in text() and "Oslo ✓ gold: Oslo" in text()
    options = "return [...document.querySelectorAll('#task option')].map(option => option.textContent)"
    assert len(browser.execute_script(options)) == 2
    browser.execute_script("document.getElementById('failed').focus()")
    press(" ")
    assert len(browser.execute_script(options)) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]] == []
    browser.save_screenshot(str(page.with_name(f"{scheme}-{width}.png")))
    axe_core_python = pytest.importorskip("axe_core_python", reason="all but the accessibility check passes; that needs axe-core-python")
    browser.execute_script((Path(axe_core_python.__file__).parent / "axe.min.js").read_text())
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert [(one["id"], one["impact"]) for one in found["violations"] if one["impact"] in ("serious", "critical")] == []
