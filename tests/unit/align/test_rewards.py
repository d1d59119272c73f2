"""Rewards: verifiers, functions that fail, weights."""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from luban.align.rewards.base import Answer, Rewards, identity, open_rewards
from luban.align.rewards.function import FunctionReward
from luban.align.rewards.guarded import GuardedReward, combine, split_name
from luban.align.rewards.judge import JudgeReward
from luban.align.rewards.verifiers import GSM8K, Pattern, UnitTests, last_number
from luban.core.errors import ConfigError, DataError, TrainingError, UsageError
from luban.evals.judges.base import Grade


def answer(text: str, **row) -> Answer:
    return Answer(row=row, text=text, prompt_ids=[1], ids=[2])


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7", "7"), ("#### 1,234", "1234"), ("it is 12.50 dollars", "12.50"), ("-3", "-3"), ("no", None)],
)
def test_the_final_number_of_an_answer(text, number):
    assert str(last_number(text)) == str(number)


def test_gsm8k_compares_numbers():
    right = "She has 5 + 7 = <<5+7=12>>12. #### 12"
    texts = ["so it is 12", "12 of 13", "#### 12.0", "none"]
    assert GSM8K().scores([answer(text, answer=right) for text in texts]) == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(DataError, match="every row"):
        GSM8K().scores([answer("1")])


def sigmoid(score: float) -> float:
    return 1 / (1 + np.exp(-score))


class Fixed:
    """A reward model whose scores stand in the rows."""

    def __init__(self, name: str):
        self.name = name

    def scores(self, answers):
        return [each.row[self.name] for each in answers]


def test_the_safety_models_score_counts_where_the_prompt_is_tagged_or_the_answer_is_unsafe():
    rng = np.random.default_rng()
    safety, helpfulness, tagged = rng.normal(0, 3, 200), rng.normal(0, 3, 200), rng.random(200) < 0.3
    wanted = [s if t or sigmoid(s) < 0.15 else h for s, h, t in zip(safety, helpfulness, tagged, strict=True)]
    assert combine(safety, helpfulness, tagged).tolist() == wanted
    rows = [answer("x", s=s, h=h, unsafe=bool(t)) for s, h, t in zip(safety, helpfulness, tagged, strict=True)]
    reward = GuardedReward(Fixed("s"), Fixed("h"))  # type: ignore[arg-type]
    assert reward.scores(rows) == wanted and reward.name == "h_guarded"
    assert GuardedReward(Fixed("s"), Fixed("h"), 0.999999).scores([answer("x", s=1.0, h=5.0)]) == [1.0]  # type: ignore[arg-type]


def test_guarded_rewards_are_named_by_their_models(tmp_path):
    assert split_name("guarded:a/s:b/h") == ("a/s", "b/h", 0.15) and split_name("guarded:s:h:0.3")[2] == 0.3
    for wrong in ("guarded:s", "guarded:s::0.1", "guarded:s:h:x", "guarded:s:h:0.1:2"):
        with pytest.raises(UsageError, match="guarded:SAFETY:HELPFULNESS"):
            split_name(wrong)
    with pytest.raises(UsageError, match="between 0 and 1"):
        GuardedReward(Fixed("s"), Fixed("h"), 1.5)  # type: ignore[arg-type]
    (tmp_path / "s").write_text("one")
    before = identity(f"guarded:{tmp_path / 's'}:h")
    assert before == identity(f"guarded:{tmp_path / 's'}:h") != identity(f"guarded:{tmp_path / 'other'}:h")


def test_a_judges_grade_is_a_reward():
    (reward,) = open_rewards(["judge:rule:longest"], [], None, "policy", "cpu", 1.0).rewards  # type: ignore[arg-type]
    said = [answer("four", prompt="q"), answer("eleven more", prompt=[{"role": "user", "content": "q"}])]
    assert reward.scores(said) == [4.0, 11.0] and reward.name == "judge_rule_longest"
    (reward,) = open_rewards(["judge:rule:reference"], [], None, "policy", "cpu", 1.0).rewards  # type: ignore[arg-type]
    assert reward.scores([answer("red", prompt="q", reference="red"), answer("red", prompt="q")]) == [1.0, 0.0]
    with pytest.raises(UsageError, match="names no judge"):
        open_rewards(["judge:"], [], None, "policy", "cpu", 1.0)  # type: ignore[arg-type]


def test_a_judge_reads_the_whole_conversation_and_one_without_a_grade_is_named():
    class Asked:
        name, read = "judge", []

        def grade(self, answers):
            self.read += answers
            return [Grade(grade=None, text="I would rather not") for _ in answers]

    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(TrainingError, match=r"judge gave no grade to the answer 'd': it said 'I would rather not'"):
        JudgeReward(Asked()).scores([answer("d", messages=talk)])  # type: ignore[arg-type]
    assert Asked.read[0].prompt == "user: a\n\nassistant: b\n\nuser: c"


def test_a_small_model_grades_by_likelihood_from_1_to_10(tiny_checkpoint):
    judge = f"judge:{tiny_checkpoint}"
    (reward,) = open_rewards([judge], [], None, "policy", "cpu", 1.0).rewards  # type: ignore[arg-type]
    scores = reward.scores([answer(text, prompt="q") for text in ("a", "b", "a")])
    assert all(1 <= score <= 10 for score in scores) and scores[0] == pytest.approx(scores[2], abs=1e-4)
    assert identity(judge) == identity(judge) != identity("judge:rule:longest")


def test_regular_expressions():
    assert Pattern(r"^\d+$").scores([answer("12"), answer("a")]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="no regular expression"):
        Pattern("(")


def test_unit_tests_run_in_a_bounded_process():
    tests = "assert add(1, 2) == 3"
    good, bad = "Here:\n```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b): return a - b"
    leaves = "import sys\ndef add(a, b): return 3\nsys.exit(0)"  # an early end is no pass
    large = "x = bytearray(1 << 33)\ndef add(a, b): return 3"
    texts = [good, bad, leaves, large]
    assert UnitTests(20.0).scores([answer(t, tests=tests) for t in texts]) == [1.0, 0.0, 0.0, 0.0]
    assert UnitTests(0.5).scores([answer("while True: pass", tests=tests)]) == [0.0]


def test_what_an_answer_starts_or_prints_ends_with_its_test(tmp_path):
    tests, left = "assert True", tmp_path / "pid"
    child = f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nopen({str(left)!r}, 'w').write(str(p.pid))"
    fakes = "import os\nprint('passed all', end='', flush=True)\nos._exit(0)"
    floods = "while True: print('x' * 1000000)"
    assert UnitTests(20.0).scores([answer(t, tests=tests) for t in (child, fakes, floods)]) == [1.0, 0.0, 0.0]
    state = Path(f"/proc/{left.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


class Scorer(BaseHTTPRequestHandler):
    """Scores by length; to an answer "few" with one number too few."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["answers"]
        scores = [len(each["answer"]) + each["row"]["more"] for each in asked]
        body = json.dumps({"scores": scores[asked[0]["answer"] == "few" :]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_an_endpoint_scores_answers_and_one_that_fails_is_named():
    with HTTPServer(("127.0.0.1", 0), Scorer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/score"
        reward = open_rewards([address], (), None, "policy", "cpu", 10.0)
        assert reward.scores([answer("abc", more=1), answer("", more=2)])[0].tolist() == [4.0, 2.0]
        with pytest.raises(TrainingError, match=f"{address} failed: 0 scores for 1 answers"):
            reward.scores([answer("few", more=1)])
        server.shutdown()
    with pytest.raises(TrainingError, match=f"{address} failed"):
        reward.scores([answer("abc", more=1)])


FUNCTION = """
import time
def good(prompt, answer, row):
    print("noise")
    return len(answer) + row["more"]
def broken(prompt, answer, row):
    raise KeyError("oh")
def slow(prompt, answer, row):
    time.sleep(60)
def nan(prompt, answer, row):
    return float("nan")
"""


def test_a_function_is_called_and_one_that_fails_is_named_and_bounded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTION)
    asked = [answer("abc", prompt="p", more=1)]
    good = FunctionReward(file, "good", 60.0)
    assert good.scores(asked * 2) == [4.0, 4.0]
    assert os.getpgid(good.process.pid) != os.getpgid(
        0
    )  # Ctrl-C at the terminal, which ends a step first, isn't for it
    good.close()
    for name, timeout, message in (("broken", 60.0, "raised KeyError"), ("slow", 0.3, "more than 0.3 s")):
        reward = FunctionReward(file, name, timeout)
        with pytest.raises(TrainingError, match=f"{name} of .*{message}"):
            reward.scores(asked)
        reward.close()
    nan = FunctionReward(file, "nan", 60.0)
    with pytest.raises(TrainingError, match="reward nan gave nan"):
        Rewards((nan,), (1.0,)).scores(asked)
    nan.close()
    with pytest.raises(ConfigError, match="no such function in the file, but good, broken, slow, nan"):
        FunctionReward(file, "other", 1.0)


def test_several_rewards_are_weighed_and_kept_apart():
    rewards = Rewards((Pattern("a"), GSM8K()), (0.5, 2.0))
    total, apart = rewards.scores([answer("a 1", answer="1"), answer("b 1", answer="1")])
    assert total.tolist() == [2.5, 2.0]
    assert {name: list(np.asarray(s)) for name, s in apart.items()} == {"regex": [1.0, 0.0], "gsm8k": [1.0, 1.0]}


def test_rewards_without_meaning_are_refused(tmp_path):
    for names, weights, error, message in (
        ((), (), UsageError, "no reward"),
        (("nowhere",), (), UsageError, "no reward 'nowhere'"),
        (("gsm8k",), (1.0, 2.0), ConfigError, "1 rewards need as many"),
        (("regex:a", "regex:b"), (), ConfigError, "same name"),
        ((f"{tmp_path}/none.py:f",), (), ConfigError, "no file"),
    ):
        with pytest.raises(error, match=message):
            open_rewards(names, weights, None, "policy", "cpu", 1.0)


def test_a_changed_function_is_another_reward(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("a = 1")
    first = identity(f"{file}:f")
    file.write_text("a = 2")
    assert identity(f"{file}:f") != first and identity("gsm8k") == "gsm8k"
