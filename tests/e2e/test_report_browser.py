"""Reports of real runs in a real browser: no console error, no request, no overflow on a phone, prints to PDF."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import REPOSITORY, CommandLine
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DATA = Path(os.environ.get("FINE_TUNE_DATA", "/nowhere"))
WIDTHS = {"desktop": (1280, 900), "phone": (360, 780)}

TINY = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the path (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def check(browser: Any, file: Path, shots: Path, needles: tuple[str, ...] = ()) -> None:
    """Open a page at both widths, light and dark, and hold it against what is promised of every report."""
    for name, (width, height) in WIDTHS.items():
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            told, asked, dialogs = [], [], []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("pageerror", lambda error, told=told: told.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("dialog", lambda dialog, dialogs=dialogs: (dialogs.append(1), dialog.dismiss()))
            page.goto(file.as_uri())
            assert told == [] and dialogs == []
            assert asked == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            wide = page.evaluate(OVERFLOWING, width)
            assert wide == [], wide
            assert page.evaluate(CONTRAST) > 4.5
            size = page.evaluate(TEXT_IN_CHARTS)
            assert size is None or size >= 8
            visible = page.inner_text("body")
            assert all(needle in visible for needle in needles)
            page.screenshot(
                path=shots / f"{file.parent.parent.name}_{file.stem}_{name}_{scheme}.png",
                full_page=True,
            )
            page.close()
    page = browser.new_page(viewport={"width": 688, "height": 1000})  # A4 within its margins
    page.emulate_media(media="print")
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.close()


# What sticks out of the window and does not scroll inside a box of its own.
OVERFLOWING = """width => [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > width + 1)
    .filter(e => !e.closest('.scroll') && !e.closest('pre') && !e.closest('svg'))
    .map(e => e.tagName + '.' + e.className)"""
# Of the text at the top, by the formula of WCAG 2.
CONTRAST = """() => {
    const part = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => c.match(/[0-9.]+/g).slice(0, 3).map(v => part(v / 255))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const text = light(getComputedStyle(document.querySelector('.lead')).color);
    const paper = light(getComputedStyle(document.querySelector('header')).backgroundColor);
    return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05); }"""
TEXT_IN_CHARTS = """() => {
    const text = document.querySelector('figure svg text');
    return text && text.getBoundingClientRect().height; }"""


def fit(root: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fine_tune", "fit", *map(str, args)]
    command += ["--trainer.default_root_dir", str(root)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_the_quickstarts_of_sft_and_dpo(browser: Any, tmp_path: Path) -> None:
    sft = fit(tmp_path, "--config", "configs/quickstart.yaml")
    assert sft.returncode == 0, sft.stderr
    first = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    check(browser, first / "report.html", tmp_path, ("Jakarta", "test/exact_match", "LoRA"))
    model = ["--model.model_name_or_path", first]
    dpo = fit(tmp_path, "--config", "configs/quickstart_dpo.yaml", *model, "--report", "id")
    assert dpo.returncode == 0, dpo.stderr
    second = tmp_path / "lightning_logs" / "quickstart_dpo" / "version_0"
    check(
        browser,
        second / "report.html",
        tmp_path,
        ("Jawaban sebelum dan sesudah", "Manokwari", "Berasal dari"),
    )
    subprocess.run(
        [sys.executable, "-m", "fine_tune", "report", first, second], cwd=REPOSITORY, check=True
    )
    check(browser, first / "comparison.html", tmp_path, ("model.optimizer.lr", "0.002", "5e-05"))


@pytest.mark.timeout(900)
@pytest.mark.skipif(not DATA.is_dir(), reason="FINE_TUNE_DATA names no folder of real rows")
def test_a_run_on_gsm8k_killed_and_gone_on_with(browser: Any, tmp_path: Path) -> None:
    args = [
        *("--name", "gsm8k", "--model", "fine_tune.modules.SFT", "--data", "fine_tune.data.SFTData"),
        *("--model.from_config", TINY),
        *("--model.tokenizer", "fine_tune/quickstart/tokenizer", "--model.optimizer.lr", "3e-3"),
        *("--data.path", DATA / "gsm8k_train.jsonl", "--data.prompt", "Question: {question}\nAnswer:"),
        *("--data.completion", " {answer}", "--data.max_length", 256, "--data.max_rows", 1500),
        *("--data.batch_size", 16, "--data.epochs", 2, "--trainer.log_every_n_steps", 2),
        *("--trainer.val_check_interval", 25, "--checkpoint.every", 25, "--generations.max_new_tokens", 24),
        *("--licences", "{all: MIT}", "--purpose", "Arithmetic word problems, to see the page with real rows."),
    ]  # fmt: skip
    folder = tmp_path / "lightning_logs" / "gsm8k" / "version_0"
    command = [
        sys.executable,
        "-m",
        "fine_tune",
        "fit",
        *map(str, args),
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    running = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while (
        not (folder / "run.json").is_file()
        or json.loads((folder / "run.json").read_text()).get("best_step", 0) < 50
    ):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    report = [sys.executable, "-m", "fine_tune", "report", str(folder)]
    subprocess.run(report, cwd=REPOSITORY, check=True)
    check(browser, folder / "report.html", tmp_path, ("running", "still going"))
    running.send_signal(signal.SIGKILL)
    running.wait()
    subprocess.run(report, cwd=REPOSITORY, check=True)
    check(browser, folder / "report.html", tmp_path, ("killed", "no process has it any more"))
    done = fit(tmp_path, "--config", folder / "config.yaml", "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    check(
        browser,
        folder / "report.html",
        tmp_path,
        ("finished", "Resumed: at step", "gsm8k_train.jsonl", "MIT"),
    )


def test_hostile_text_in_a_real_browser(
    browser: Any, command_line: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "lightning_logs" / "hostile" / "version_0"
    folder.mkdir(parents=True)
    texts = [
        "<script>alert(1)</script>",
        "<img src=http://evil.example/x onerror=alert(1)>",
        "=cmd()",
        "\x1b[31m",
        "x" * 900,
    ]
    (folder / "run.json").write_text(
        json.dumps({"status": "finished", "step": 1, "best_step": 1, "best": texts[0]})
    )
    (folder / "config.yaml").write_text(
        json.dumps({"purpose": " ".join(texts), "data": {"path": texts[4]}})
    )
    answers = [
        {"stage": "after x", "row_id": i, "prompt": t, "expected": t, "answer": t}
        for i, t in enumerate(texts)
    ]
    (folder / "generations.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    assert command_line("report", folder).code == 0
    check(
        browser,
        folder / "report.html",
        tmp_path,
        ("<script>alert(1)</script>", "'=cmd()", "\\x1b[31m"),
    )
