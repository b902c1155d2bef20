"""`generate --input --output`: every prompt gets one whole line, whenever the process ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.cli import main
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.json_lines import Replies, read_prompts

QUESTIONS = [f"Tom has {n} apples. Anna gives him 7 more. How many has Tom now?" for n in range(30)]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_messages_and_options_get_what_generate_gives(tmp_path, capsys):
    model = QwenMoe.from_pretrained(CHECKPOINT)
    chat = [{"role": "user", "content": QUESTIONS[12]}]
    source = write_lines(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": QUESTIONS[12]},
            {"id": "chat", "messages": chat, "options": {"max_new_tokens": 3}},
            {"id": 7, "prompt": [5, 6, 7], "options": {"do_sample": True, "num_return_sequences": 2}},
        ],
    )
    target = tmp_path / "replies.jsonl"
    command = ["generate", "--model", str(CHECKPOINT), "--input", str(source), "--output", str(target)]
    assert main([*command, "--max-new-tokens", "20"]) == 0
    assert "wrote 3 replies" in capsys.readouterr().out
    found = {line["id"]: line for line in read_lines(target)}
    assert found[1]["text"] == model.generate(chat, max_new_tokens=20).texts[0]
    assert found["chat"]["finish_reason"] == "length"
    assert found["chat"]["usage"]["generated_tokens"] == 3
    expected = model.generate([[5, 6, 7]], max_new_tokens=20, do_sample=True, num_return_sequences=2)
    assert found[7]["texts"] == expected.texts
    before = target.read_bytes()
    assert main([*command, "--max-new-tokens", "20"]) == 0
    assert "wrote 0 replies" in capsys.readouterr().out
    assert target.read_bytes() == before


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_without_a_doubled_or_torn_line(tmp_path):
    lines = [{"id": f"q{n}", "prompt": QUESTIONS[n % 30]} for n in range(400)]
    source = write_lines(tmp_path / "prompts.jsonl", lines)
    target = tmp_path / "replies.jsonl"
    command = [sys.executable, "-m", "qwen_moe_jax.cli", "generate", "--model", str(CHECKPOINT)]
    command += ["--input", str(source), "--output", str(target), "--max-rows", "8"]
    for kill in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        size = target.stat().st_size if target.exists() else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if target.exists() and target.stat().st_size > size + 500 * (kill + 1):
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.002)
        process.wait()
        if kill == 1:  # as if it had been torn in the middle of a line
            with target.open("r+b") as file:
                file.truncate(target.stat().st_size - 3)
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    found = read_lines(target)
    assert sorted(line["id"] for line in found) == sorted(line["id"] for line in lines)
    by_id = {line["id"]: line["text"] for line in found}
    for n in range(370):
        assert by_id[f"q{n}"] == by_id[f"q{n % 30}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 1 of .* is no JSON"),
        ("[1]\n", "line 1 of .* is a list"),
        ('{"prompt": "a", "temperature": 1}\n', "has the key 'temperature'; expected id, prompt"),
        ('{"prompt": "a", "messages": []}\n', "has both prompt and messages"),
        ('{"id": 3}\n', "has neither prompt and messages"),
        ('{"prompt": "a", "id": 1.5}\n', r"has the id 1\.5"),
        ('{"prompt": "a", "options": 3}\n', "has options of type int"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}\n', "line 2 of .* has the id 2, as line 1 has"),
        ("\n\n", "holds no prompts"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_options_that_generate_refuses_are_refused_before_anything_runs(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "options": {"top_p": 3}}])
    target = tmp_path / "b.jsonl"
    command = ["generate", "--model", str(CHECKPOINT), "--input", str(source), "--output", str(target)]
    assert main([*command, "--do-sample"]) == 2
    assert f"line 2 of {source}: top_p is 3" in capsys.readouterr().err
    assert target.read_bytes() == b""


def test_replies_of_something_else_are_not_touched(tmp_path):
    prompts = read_prompts(write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}]))
    other = tmp_path / "b.jsonl"
    for text, message in (('{"id": "x"}\n', "a reply to 'x', which is not in"), ("hello\n", "is no reply")):
        other.write_text(text)
        with pytest.raises(InputError, match=message):
            Replies(other, prompts)
        assert other.read_text() == text


def test_two_processes_do_not_write_to_one_file(tmp_path):
    prompts = read_prompts(write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}]))
    with (
        Replies(tmp_path / "b.jsonl", prompts),
        pytest.raises(InputError, match="another process writes to"),
    ):
        Replies(tmp_path / "b.jsonl", prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes a prompt, or --input"),
        (["a", "--input", "x"], "takes a prompt, or --input"),
        (["--input", "x"], "--input and --output go together"),
        (["a", "--output", "x"], "--input and --output go together"),
    ],
)
def test_wrong_command_lines_are_one_sentence(arguments, message, capsys):
    assert main(["generate", "--model", str(CHECKPOINT), *arguments]) == 2
    assert message in capsys.readouterr().err
