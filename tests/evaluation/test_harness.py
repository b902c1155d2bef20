"""The harness gives the same numbers for this library's model as for its own `hf` model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.problems import CHECKPOINT
from support.servers import serving

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.evaluation.word_problems import held_out

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval", reason="the harness is an extra: eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from qwen_moe_jax.cli import main  # noqa: E402
from qwen_moe_jax.errors import InputError  # noqa: E402
from qwen_moe_jax.evaluation.harness import QwenMoeHarness  # noqa: E402

# Log-likelihoods of about -20 to -500 in float32, by other sums.
TOLERANCE = 1e-4
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} The answer is",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "reply": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 60},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "regex_pattern": "answer is (\\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks made from the word problems."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for problem in held_out(8, 3):
        near = [problem.answer + delta for delta in (1, 0, 2, 7)]
        line = {"question": problem.question, "answer": str(problem.answer), "label": 1}
        lines.append(json.dumps(line | {"choices": [f" {n}." for n in near]}))
    (folder / "problems.jsonl").write_text("\n".join(lines))
    for name, task in TASKS.items():
        whole: dict[str, Any] = {
            "task": f"words_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "problems.jsonl")}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return folder


def results(model: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model,
        tasks=[f"words_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return found


def test_every_kind_of_task_gives_the_numbers_of_the_harness_own_model(tasks: Path) -> None:
    torch.set_num_threads(1)
    ours = QwenMoeHarness(QwenMoe.from_pretrained(CHECKPOINT, dtype="float32"), max_length=64 + 60)
    theirs = HFLM(pretrained=str(CHECKPOINT), dtype="float32", device="cpu", batch_size=1, max_length=64 + 60)
    for chat in (False, True):
        mine = results(ours, tasks, apply_chat_template=chat)
        wanted = results(theirs, tasks, apply_chat_template=chat)
        for task, metrics in wanted["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    assert mine["results"][task][metric] == pytest.approx(value, rel=TOLERANCE), metric
        for task, samples in wanted["samples"].items():
            for sample, own in zip(samples, mine["samples"][task], strict=True):
                assert own["arguments"] == sample["arguments"]
                for reply, expected in zip(own["resps"], sample["resps"], strict=True):
                    compare(reply[0], expected[0])
    assert wanted["results"]["words_reply"]["exact_match,last-number"] > 0.8  # as a chat it knows


def compare(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, (tuple, list)):
        assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE)
        assert ours[1] == theirs[1]
    else:
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_the_command_line_runs_a_task(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "qwen_moe_jax", "--model_args", f"path={CHECKPOINT},dtype=float32"]
    arguments += ["--tasks", "words_choose", "--include_path", str(tasks), "--limit", "2"]
    assert main(["lm-eval", *arguments]) == 0
    assert "words_choose" in capsys.readouterr().out


def test_what_the_harness_cannot_be_given_is_said() -> None:
    with pytest.raises(InputError, match="give --model_args path=PATH"):
        QwenMoeHarness()


def test_the_server_gives_the_adapter_s_numbers_to_the_harness_own_client(tasks: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = QwenMoe.from_pretrained(CHECKPOINT, dtype="float32")
    mine = results(QwenMoeHarness(model, max_length=124), tasks)
    with serving(model) as (address, _):
        client = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model="abacus",
            tokenizer=str(CHECKPOINT),
            tokenizer_backend="huggingface",
            max_length=124,
        )
        found = results(client, tasks)
    for task, metrics in mine["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=TOLERANCE), (task, metric)
    for task, samples in mine["samples"].items():
        for sample, own in zip(samples, found["samples"][task], strict=True):
            for reply, expected in zip(own["resps"], sample["resps"], strict=True):
                compare(reply[0], expected[0])
