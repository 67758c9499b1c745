"""``chat`` in a real terminal: a conversation with every command, a comparison, Ctrl-C in the middle of an answer."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import REPOSITORY, CommandLine, write_rows
from peft import PeftModel
from preference_runs import LORA
from small_models import save_small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.commands.chat_model import ChatModel
from fine_tune.commands.chat_output import shown
from fine_tune.modules.decoding import Answer, Decoder
from fine_tune.runs.run_folder import RunFolder
from fine_tune.sampling import Sampling

WORDS = ["Berapa", "jumlah", "ibu", "kota", "negara", "provinsi", "tahun", "mata", "uang"]
MOST, LONG = 300, 2_000


class Screen:
    """A command in a terminal of its own.

    Args:
        command: What runs in it.
        size: Columns and rows.
    """

    def __init__(self, command: list[str], folder: Path, size: tuple[int, int] = (100, 50)) -> None:
        self.socket = folder / f"tmux-{random.randrange(10**9)}"
        x, y = map(str, size)
        self._tmux(
            "new-session", "-d", "-x", x, "-y", y, shlex.join(command) + "; echo ended $?; cat"
        )

    def text(self) -> str:
        return self._tmux("capture-pane", "-p", "-J", "-S", "-200")

    def type(self, line: str) -> None:
        self._tmux("send-keys", "-l", line)
        self.press("Enter")

    def press(self, key: str) -> None:
        self._tmux("send-keys", key)

    def wait_for(self, what: Callable[[str], bool], seconds: float = 100) -> str:
        end = time.monotonic() + seconds
        while not what(text := self.text()):
            assert time.monotonic() < end, text
            time.sleep(0.02)
        return text

    def say(self, line: str) -> str:
        """Type a line, wait for the next prompt, and return what stands between."""
        before = self.text().count("you> ")
        self.type(line)
        text = self.wait_for(lambda now: now.count("you> ") > before)
        return text.split("you> ")[-2].partition("\n")[2]

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *args: str) -> str:
        command = ["tmux", "-S", str(self.socket), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of sure answers, many of which end soon and some never."""
    folder = tmp_path_factory.mktemp("talker") / "llama"
    model: Any = save_small_model(folder, initializer_range=0.2, max_position_embeddings=4096)
    stops = [model.config.eos_token_id, *range(7, model.config.vocab_size, 25)]
    model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(command_line: CommandLine, talker: Path, tmp_path: Path) -> RunFolder:
    """A run that took a few steps on conversations, with LoRA."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": turns} for _ in range(8)])
    outcome = command_line(
        *("fit", "--model", "fine_tune.modules.SFT", "--model.model_name_or_path", talker),
        *(*LORA, "--model.optimizer.lr", "1e-2", "--data", "fine_tune.data.SFTData"),
        *("--data.path", file, "--data.split", "none", "--data.batch_size", "4"),
        *("--generations.rows", "0", "--early_stopping.patience", "null"),
    )
    assert outcome.code == 0, outcome.err
    return outcome.run()


class Expected:
    """What the run's checkpoint answers, by transformers and peft alone."""

    def __init__(self, run: RunFolder, talker: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(talker)
        self.model: Any = PeftModel.from_pretrained(base, str(run.checkpoint("last"))).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(talker)
        self.stops = base.generation_config.eos_token_id

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def lengths(self, conversations: list[list[dict[str, str]]]) -> list[int]:
        """Return the tokens of the next answer in each conversation, at most ``MOST``."""
        asked = [self.prompt(turns) for turns in conversations]
        answers = [Answer(i, ids, MOST, random.Random(0)) for i, ids in enumerate(asked)]
        decoder = Decoder(self.model, self.stops, 0, Sampling(), 2**20)
        with torch.inference_mode():
            ended = {a.key: len(a.written) for a in decoder.write(answers, pytest.fail)}
        return [ended[i] for i in range(len(asked))]

    def answer(self, turns: list[dict[str, str]], *, base: bool = False) -> str:
        ids = torch.tensor([self.prompt(turns)])
        with torch.inference_mode(), self.model.disable_adapter() if base else torch.no_grad():
            written = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MOST,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=self.stops,
            )[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(written) if token in self.stops), len(written))
        return str(self.tokenizer.decode(written[:end], skip_special_tokens=True)).strip()


@pytest.fixture
def screens(tmp_path: Path, run: RunFolder) -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def start(*more: str) -> Screen:
        chat = [sys.executable, "-m", "fine_tune", "chat", str(run.path), "--ckpt_path", "last"]
        chat += ["--temperature", "0", "--max_new_tokens", str(LONG), *more]
        environment = ["env", f"PYTHONPATH={REPOSITORY}", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1"]
        opened.append(Screen([*environment, *chat], tmp_path))
        return opened[-1]

    yield start
    for screen in opened:
        screen.close()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_conversation_a_comparison_and_ctrl_c_in_a_terminal(
    screens: Callable[..., Screen], run: RunFolder, talker: Path, tmp_path: Path
) -> None:
    screen, beside = screens(), screens("--compare")  # both start at once
    expected = Expected(run, talker)
    choose = random.Random(1)
    questions = [" ".join(choose.choices(WORDS, k=4)) for _ in range(100)]

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def assistant(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    def plain(text: str) -> str:
        return "".join(c for c in shown(text) if c.isalnum())

    system = {"role": "system", "content": "Jawab singkat."}
    alone = expected.lengths([[user(text)] for text in questions])
    with_system = expected.lengths([[system, user(text)] for text in questions])
    long = questions[alone.index(MOST)]
    first = next(
        q for q, *n in zip(questions, alone, with_system, strict=True) if 2 < min(n) <= max(n) < 60
    )
    answer = expected.answer([user(first)])
    before = [user(first), assistant(answer)]
    behind = expected.lengths([[*before, user(text)] for text in questions])
    second = next(q for q, n in zip(questions, behind, strict=True) if 2 < n < 60)
    screen.wait_for(lambda text: text.rstrip().endswith("you>"))
    assert "conversations by the model's chat template" in screen.text()
    # a conversation: the second question comes with the first and its answer
    assert plain(screen.say(first)) == plain(answer)
    history = [*before, user(second)]
    screen.say(second)
    assert "saved 1 row" in screen.say(f"/save {tmp_path / 'chat.jsonl'}")
    saved = json.loads((tmp_path / "chat.jsonl").read_text("utf-8"))["messages"]
    assert saved[:3] == history and saved[3]["content"] == expected.answer(history)
    assert "exists already" in screen.say(f"/save {tmp_path / 'chat.jsonl'}")
    # every command
    assert "taken back" in screen.say("/undo")
    assert "/temperature X" in screen.say("/help")
    assert "did you mean '/reset'?" in screen.say("/rest")
    assert "a number from 0 up" in screen.say("/temperature hot")
    assert "temperature 0" in screen.say("/temperature 0")
    assert plain(screen.say("/retry")).endswith(plain(answer))
    assert "system message set" in screen.say("/system Jawab singkat.")
    assert "the conversation is forgotten" in screen.say("/reset")
    screen.say(first)
    screen.say(f"/save {tmp_path / 'system.jsonl'}")
    saved = json.loads((tmp_path / "system.jsonl").read_text("utf-8"))["messages"]
    assert saved == [system, user(first), assistant(expected.answer([system, user(first)]))]
    screen.say("/system")
    screen.say("/reset")
    # Ctrl-C in the middle of an answer stops it, and the chat goes on
    prompts = screen.text().count("you> ")
    screen.type(long)
    begun = long + "\n"
    screen.wait_for(lambda text: len(text.partition(begun)[2]) > 20)
    screen.press("C-c")
    stopped = screen.wait_for(lambda text: text.count("you> ") > prompts)
    assert "(stopped)" in stopped
    screen.say(f"/save {tmp_path / 'stopped.jsonl'}")
    kept = json.loads((tmp_path / "stopped.jsonl").read_text("utf-8"))["messages"][-1]["content"]
    assert 0 < len(expected.tokenizer(kept)["input_ids"]) < LONG
    screen.say("/reset")
    assert plain(screen.say(first)) == plain(answer)
    screen.press("C-c")
    assert "ended 0" in screen.wait_for(lambda text: "ended" in text)
    # the same question before and after the run
    beside.wait_for(lambda text: text.rstrip().endswith("you>"))
    table = beside.say(first)
    assert "before this run" in table and "after it" in table
    rows = [line.split("│")[1:3] for line in table.splitlines() if line.count("│") == 3]
    columns = [plain("".join(row[side] for row in rows)) for side in (0, 1)]
    assert columns == [plain(expected.answer([user(first)], base=True)), plain(answer)]
    beside.type("/quit")
    assert "ended 0" in beside.wait_for(lambda text: "ended" in text)


def test_once_prints_the_answer_alone(
    command_line: CommandLine, talker: Path, tmp_path: Path
) -> None:
    """Of a model's folder; without a base there is nothing to compare with."""
    tokenizer: Any = AutoTokenizer.from_pretrained(talker)
    args = ["--temperature", "0", "--max_new_tokens", "30", "--once", "Berapa ibu kota"]
    outcome = command_line("chat", talker, *args)
    assert outcome.code == 0
    turns = [{"role": "user", "content": "Berapa ibu kota"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    model: Any = AutoModelForCausalLM.from_pretrained(talker)
    written = model.generate(**ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
    answer = written[ids["input_ids"].shape[1] :].tolist()
    stops = model.generation_config.eos_token_id
    answer = answer[: next((i for i, token in enumerate(answer) if token in stops), 30)]
    expected = shown(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    assert outcome.out.strip() == expected
    alone = command_line("chat", talker, *args, "--compare")
    assert alone.code == 2 and "a model alone has no base" in alone.err
    missing = command_line("chat", "nope", "--root", tmp_path, "--once", "a")
    assert missing.code == 2 and "no run 'nope'" in missing.err
    long = command_line("chat", "What is the capital of Indonesia? " * 20, "--root", tmp_path)
    assert long.code == 2 and "no run 'What is the capital" in long.err
    half = command_line("chat", talker, *args[:-1], "\ud800")
    assert half.code == 2 and "error: the question: half a character (\\ud800)" in half.err
    wrong = command_line("chat", talker, "--temperature", "-1", "--once", "a")
    assert wrong.code == 2 and "temperature: must be 0 or above" in wrong.err


@pytest.mark.parametrize("coding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_bytes_that_are_no_text_are_refused(talker: Path, coding: str) -> None:
    """Whatever Python makes of them, which the locale decides."""
    outcome = subprocess.run(
        [sys.executable, "-m", "fine_tune", "chat", str(talker), "--max_new_tokens", "3"],
        input=b"Berapa\nIbu kota \xff\n",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": coding},
        capture_output=True,
        check=False,
    )
    assert outcome.returncode == 2 and b"Traceback" not in outcome.stderr
    assert b"error: the question: not UTF-8 (byte 0xff at 9); convert it" in outcome.stderr
    assert outcome.stdout.count(b"\n") >= 1  # the question before it is answered


def test_a_prompt_run_asks_each_question_alone_in_its_template(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ["--data.prompt", "Soal: {question}"]
    run = command_line("fit", *fit_args, *template, "--trainer.max_steps", "2").run()
    lines = iter(["Berapa 1 + 1?", "Berapa 2 + 2?", "/system Singkat.", "/quit"])
    asked: list[list[int]] = []
    stream = ChatModel.stream

    def seen(self: ChatModel, ids: list[int], *args: Any, **kwargs: Any) -> Any:
        asked.append(ids)
        return stream(self, ids, *args, **kwargs)

    monkeypatch.setattr(ChatModel, "stream", seen)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    outcome = command_line("chat", run.path, "--max_new_tokens", "3")
    assert outcome.code == 0, outcome.err
    tokenizer: Any = AutoTokenizer.from_pretrained(run.checkpoint("last"))
    assert [tokenizer.decode(ids) for ids in asked] == [
        "Soal: Berapa 1 + 1?",
        "Soal: Berapa 2 + 2?",
    ]
    assert "each question alone" in outcome.err and "no system message" in outcome.err
    compared = command_line(
        *("chat", run.path, "--once", "Berapa 1 + 1?", "--max_new_tokens", "3", "--compare")
    )
    assert compared.code == 0, compared.err
    assert "before this run" in compared.out and "after it" in compared.out
