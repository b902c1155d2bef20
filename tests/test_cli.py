"""The command line: what it prints, and that every mistake of a user is one line and exit status 2."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.configs import random_config
from support.reference import build_reference, reference_greedy, save_reference
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.cli import main
from qwen_moe_jax.errors import CheckpointNotFoundError

REPOSITORY = Path(__file__).resolve().parents[1]
ABACUS = REPOSITORY / "checkpoints" / "abacus"
SEED = 0  # Gated DeltaNet and attention 3:1, default rope, untied
PROMPT = "one"  # short, so that with or without a chat around it one compiled shape fits
NEW_TOKENS = 6


def _character_tokenizer(size: int) -> Tokenizer:
    """One token a character, so that ids and text say the same: ASCII, then any letters up to `size`."""
    characters = ["<unk>", "\n", *map(chr, range(32, 127))]
    characters += [chr(0x4E00 + i) for i in range(size - len(characters))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


CONFIG = random_config(SEED) | {"vocab_size": 131}
TOKENIZER = _character_tokenizer(CONFIG["vocab_size"])


@pytest.fixture(scope="module")
def reference():
    return build_reference(CONFIG, SEED)


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory) -> str:
    folder = save_reference(reference, tmp_path_factory.mktemp("cli") / "tiny")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return str(folder)


def expected_text(reference, prompt: str) -> str:
    return TOKENIZER.decode(reference_greedy(reference, TOKENIZER.encode(prompt).ids, NEW_TOKENS))


def generate(checkpoint: str, prompt: str, *options: str) -> int:
    """Runs the command in this process."""
    arguments = ["--model", checkpoint, prompt, "--max-new-tokens", str(NEW_TOKENS)]
    return main(["generate", *arguments, *options])


def test_generate_raw_prints_the_references_continuation(checkpoint, reference, capsys):
    assert generate(checkpoint, PROMPT, "--raw") == 0
    assert capsys.readouterr().out == expected_text(reference, PROMPT) + "\n"


def test_generate_puts_the_prompt_and_the_system_message_into_the_chat_template(
    checkpoint, reference, capsys
):
    assert generate(checkpoint, PROMPT, "--system", "ab") == 0
    assert capsys.readouterr().out == expected_text(reference, f"sabu{PROMPT}>") + "\n"


def test_generate_reads_a_converted_checkpoint_and_prints_the_same(checkpoint, reference, tmp_path, capsys):
    orbax = tmp_path / "orbax"
    assert main(["convert", checkpoint, str(orbax)]) == 0
    assert "4 layers" in capsys.readouterr().out
    assert generate(str(orbax), PROMPT, "--raw") == 0
    assert capsys.readouterr().out == expected_text(reference, PROMPT) + "\n"


def test_sampling_options_reach_the_sampler_and_stop_ends_the_text(checkpoint, reference, capsys):
    # top_k 1 at any temperature is greedy, so the sampled text is known
    greedy = expected_text(reference, PROMPT)
    options = ("--raw", "--do-sample", "--top-k", "1", "--temperature", "3", "--seed", "7")
    assert generate(checkpoint, PROMPT, *options, "--stop", greedy[-2:]) == 0
    assert capsys.readouterr().out == greedy[: greedy.find(greedy[-2:])] + "\n"


def test_inspect_counts_the_parameters_of_the_reference(checkpoint, reference, capsys):
    assert main(["inspect", checkpoint]) == 0
    out = capsys.readouterr().out
    count = sum(weight.numel() for weight in reference.parameters())
    assert str(count) in re.sub(r"[,_ ](?=\d{3})", "", out)


TINY = "CHECKPOINT"  # stands for the fixture's folder in the table below
GENERATE = ("generate", "--model", TINY, "hello")
MISTAKES = {
    "no such folder": (("generate", "--model", "no/such/folder", "hello"), "no/such/folder does not exist"),
    "no such folder to evaluate": (("eval", "--model", "nowhere"), "nowhere does not exist"),
    "no such folder to inspect": (("inspect", "nowhere"), "nowhere does not exist"),
    "no such folder to convert": (("convert", "nowhere", "elsewhere"), "nowhere does not exist"),
    "a file": (("inspect", __file__), "is a file"),
    "folder without config.json": (("inspect", str(Path(__file__).parent)), "config.json"),
    "wrong dtype": ((*GENERATE, "--dtype", "float16"), "dtype is 'float16'"),
    "no dtype": ((*GENERATE, "--dtype", "quick"), "dtype is 'quick'"),
    "empty prompt": (("generate", "--model", TINY, ""), "prompt is empty"),
    "blank prompt": (("generate", "--model", TINY, " \n"), "prompt is empty"),
    "empty raw prompt": (("generate", "--model", TINY, "", "--raw"), "prompt is empty"),
    "system without chat": ((*GENERATE, "--raw", "--system", "x"), "--system"),
    "temperature without sampling": ((*GENERATE, "--temperature", "0.5"), "do_sample"),
    "negative temperature": ((*GENERATE, "--do-sample", "--temperature", "-1"), "temperature is -1.0"),
    "top-p above one": ((*GENERATE, "--do-sample", "--top-p", "1.5"), "top_p is 1.5"),
    "negative top-k": ((*GENERATE, "--do-sample", "--top-k", "-2"), "top_k is -2"),
    "top-k that is no number": ((*GENERATE, "--top-k", "many"), "'many'"),
    "no new tokens": ((*GENERATE, "--max-new-tokens", "0"), "max_new_tokens is 0"),
    "more tokens than the context": ((*GENERATE, "--max-new-tokens", "4096"), "exceed the context of 512"),
    "prompt longer than the context": (("generate", "--model", TINY, "x" * 600), "context holds 512"),
    "negative seed": ((*GENERATE, "--seed", "-1"), "seed is -1"),
    "empty stop": ((*GENERATE, "--stop", ""), "stop_strings"),
    "unknown option": ((*GENERATE, "--beams", "4"), "--beams"),
    "shortened option": ((*GENERATE, "--temp", "4"), "--temp"),
    "unknown command": (("translate", "x"), "translate"),
    "no command": ((), "COMMAND"),
    "port that is none": (("serve", "--model", TINY, "--port", "70000"), "--port is 70000"),
    "host that is none": (("serve", "--model", TINY, "--host", "no.such.host"), "cannot be listened at"),
    "no queue": (("serve", "--model", TINY, "--max-queue", "0"), "--max-queue is 0"),
    "no problems": (("eval", "--model", TINY, "--problems", "0"), "--problems is 0"),
    "context of zero": (("inspect", TINY, "--context", "0"), "context"),
    "unknown device": (("inspect", TINY, "--device", "mi100"), "mi300x, mi325x, mi355x, h100"),
    "existing destination": (("convert", TINY, TINY), "exists and is not an empty folder"),
    "destination that is a file": (("convert", TINY, __file__), "exists and is not an empty folder"),
}


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(checkpoint, arguments, named, capsys):
    arguments = [checkpoint if argument == TINY else argument for argument in arguments]
    try:
        status = main(arguments)
    except SystemExit as end:  # from argparse
        status = end.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("qwen-moe-jax: ")
    assert named in captured.err


def test_debug_raises_the_error_itself():
    with pytest.raises(CheckpointNotFoundError, match="nowhere does not exist"):
        main(["inspect", "nowhere", "--debug"])


def run_module(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen_moe_jax.cli", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONIOENCODING": "utf-8"},
        check=False,
    )


def test_the_command_in_a_process_of_its_own(checkpoint, reference, tmp_path):
    """Output on stdout alone, a compilation cache in the user's cache folder, and the status of errors."""
    done = run_module(
        *("generate", "--model", checkpoint, "--raw", "--max-new-tokens", str(NEW_TOKENS), PROMPT),
        cache=tmp_path,
    )
    assert done.returncode == 0
    built = r"(qwen-moe-jax: building CPU kernels \(\w+\), once \.\.\. [\d.]+ s\n)?"
    assert re.fullmatch(built, done.stderr)  # the cache was empty
    assert done.stdout == expected_text(reference, PROMPT) + "\n"
    assert any((tmp_path / "qwen_moe_jax").rglob("*"))

    wrong = run_module("inspect", "nowhere", cache=tmp_path)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    traced = run_module("inspect", "nowhere", "--debug", cache=tmp_path)
    assert traced.returncode != 0
    assert "Traceback" in traced.stderr


def test_help_names_every_command_and_explains_its_options(tmp_path, capsys):
    done = run_module("--help", cache=tmp_path)
    assert done.returncode == 0
    for command in ("generate", "eval", "check", "inspect", "convert", "quantize"):
        assert command in done.stdout
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "--debug" in capsys.readouterr().out


def _readme_command_and_answer() -> tuple[list[str], str]:
    """The README's first command (what follows the installation) and the block that shows its answer."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    command, answer = re.findall(r"```(?:sh)?\n(.*?)```", text, flags=re.DOTALL)[:2]
    return shlex.split(command.split("&&")[-1]), answer


def test_the_readmes_command_prints_the_readmes_answer(monkeypatch, capsys):
    (program, *arguments), answer = _readme_command_and_answer()
    assert program.endswith("qwen-moe-jax")
    monkeypatch.chdir(REPOSITORY)
    assert main(arguments) == 0
    assert capsys.readouterr().out == answer


def test_eval_of_the_trained_checkpoint_prints_a_high_accuracy_and_every_mistake(capsys):
    total = 40
    arguments = ["--problems", str(total), "--batch-size", str(total), "--show-mistakes", str(total)]
    assert main(["eval", "--model", str(ABACUS), "--dtype", "float32", *arguments]) == 0
    out = capsys.readouterr().out
    line = r"accuracy on seen templates with new numbers: \S+ % \((\d+) of 40; 95 % confidence \S+ to"
    right = int(re.match(line, out).group(1))
    assert out.count("expected: ") == total - right
    # at the accuracy stated in checkpoints/README.md, 40 draws fall this low less than once in 10^4
    assert right >= 0.75 * total


@pytest.mark.slow
def test_generate_on_a_mesh_prints_what_one_device_does(checkpoint, reference, capsys):
    mesh = [
        "--expert",
        "2",
        "--tensor",
        "2",
        "--shared-expert",
        "prescaled",
        "--expert-dispatch",
        "all_to_all",
    ]
    assert generate(checkpoint, PROMPT, "--raw", "--dtype", "float32", *mesh) == 0
    assert capsys.readouterr().out == expected_text(reference, PROMPT) + "\n"
    assert generate(checkpoint, PROMPT, "--raw", "--expert", "9") == 2
    assert "needs 9 devices, and there are 8" in capsys.readouterr().err


def test_a_chat_in_the_terminal_goes_on_with_what_was_said(monkeypatch, capsys):
    first, second = "Tom has 12 apples. He eats 7 of them. How many are left?", "And now?"
    lines = [first, "", second, "/undo", second, "/new", first, "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(ABACUS), "--dtype", "float32", "--draft-tokens", "0"]) == 0
    model = QwenMoe.from_pretrained(ABACUS, dtype="float32", draft_tokens=0)
    said = [{"role": "user", "content": first}]
    one = model.generate(said)
    two = model.generate([*said, one.messages[0], {"role": "user", "content": second}])
    replies = [one.texts[0], two.texts[0], two.texts[0], one.texts[0]]
    assert capsys.readouterr().out.splitlines() == replies


@pytest.mark.slow
def test_a_server_that_is_told_to_end_finishes_what_runs(tmp_path):
    command = [sys.executable, "-m", "qwen_moe_jax.cli", "serve", "--model", str(ABACUS), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if "http://" in line)
    address = re.search(r"http://\S+", line)[0]
    body = {"model": ABACUS.name, "prompt": "12 + 7", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{address}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        texts = [json.loads(x[6:])["choices"][0] for x in lines if x.startswith("data: {")]
    assert texts[-1]["finish_reason"] == "length"
    assert process.wait(30) == 0
