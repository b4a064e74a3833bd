"""Scores that have no gradient: what they are, measured by queries and as evaluations; what is refused."""

import json

import harness
import numpy as np
import pytest
import torch
from test_examples import COLUMNS, choices, corpus, write

import reproduce_zo_paper as zo

WORDS = (" yes", " no", " perhaps so")


@pytest.fixture
def flags(tmp_path) -> dict:
    """Which of three words follows depends on the prompt."""
    content = [{"question": "ab"[n % 2] + " or" * (n % 5) + f" {n}?", "answer": WORDS[n % 3]} for n in range(160)]
    file = write(tmp_path / "choice.jsonl", content)
    return COLUMNS | {"dataset": file, "block_size": 32, "max_samples": 1000, "batch_size": 4, "learning_rate": 1e-3}


class Case:
    def __init__(self, runs, workers, **flags):
        self.corpus, self.model = corpus(runs, **flags), harness.llama("float64")
        self.model.resize_token_embeddings(300)
        self.model.double()
        self.plain = zo.Objective(self.model, workers)

    def scored(self, name: str) -> zo.Objective:
        return zo.scored(self.plain, self.corpus, name)

    def right(self, prompt, own, options) -> bool:
        """Whether of the options, one at a time, the completion has the lowest loss after the prompt."""
        losses = {}
        for option in options:
            odds = torch.log_softmax(self.model(torch.tensor([[*map(int, prompt), *option]])).logits[0], -1)
            losses[option] = -sum(odds[len(prompt) + i - 1, token].item() for i, token in enumerate(option))
        return min(losses, key=losses.get) == tuple(own)


def test_accuracy_is_the_choice_of_lowest_summed_loss(runs, flags, workers):
    """By hand: each prompt with each of the words, one at a time."""
    case = Case(runs, workers, **flags)
    metric, words = case.scored("accuracy"), case.corpus.completions
    assert len(words) == 3
    chosen = [case.right(*example, words) for example in case.corpus.examples("train", np.arange(12))]
    assert 0 < sum(chosen) < 12  # else this says little
    found = metric.losses(*metric.sequences(case.corpus, "train", np.arange(12))).item()
    assert found == pytest.approx(-np.mean(chosen))
    parts = [metric.sequences(case.corpus, "train", np.arange(lo, lo + 3)) for lo in (0, 3, 6, 9)]
    shares = [-metric.losses(*part).item() for part in parts]
    assert np.mean(shares) == pytest.approx(np.mean(chosen))
    rows = case.corpus.validation_rows
    each = [-metric.losses(*metric.sequences(case.corpus, "validation", rows[[n]])).item() for n in range(len(rows))]
    assert zo.validation_score(metric, case.corpus) == pytest.approx(np.mean(each))


def test_greedy_continuations_do_not_depend_on_the_batch(runs, flags, workers):
    case = Case(runs, workers, **flags | {"max_new_tokens": 5, "eval_metric": "f1"})
    metric = case.scored("f1")
    prompts = [prompt for prompt, _ in zo.parts_of(*case.corpus.sequences("train", np.arange(9)))]
    assert len({len(prompt) for prompt in prompts}) > 1
    together, end = metric.continued(prompts, set()), case.corpus.tokenizer.eos_token_id
    for prompt, found in zip(prompts, together):
        row = list(prompt)
        for _ in range(5):
            row.append(int(case.model(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == end:
                break
        expected = row[len(prompt) :]
        assert (found + [end] * 5)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "shared"),
    [
        ("The cat!", "cat", 1, 1),
        ("a dog", "the cat", 0, 0),
        ("one two three", "two three four five", 0, 4 / 7),
        ("", "", 1, 1),
        ("", "word", 0, 0),
        ("no no", "no", 0, 2 / 3),
    ],
)
def test_words_are_compared_without_case_punctuation_and_articles(answer, reference, exact, shared):
    assert zo.exact_match(["?"], [answer], [reference]) == [exact]
    assert zo.f1(["?"], [answer], [reference]) == [pytest.approx(shared)]


SCORE_FILE = """
import json
from pathlib import Path

def lengths(prompts, answers, references):
    with open(Path(__file__).with_suffix(".calls"), "a") as file:
        file.write(json.dumps([prompts, answers, references]) + chr(10))
    return [-len(answer) / 10 for answer in answers]

def broken(prompts, answers, references):
    return [1 / 0 for _ in answers]

def short(prompts, answers, references):
    return [0.5]

def odd(prompts, answers, references):
    return [float("nan")] * len(answers)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "score.py").write_text(SCORE_FILE)
    return tmp_path / "score.py"


def test_a_function_of_a_file_is_given_texts_and_its_errors_are_a_line(runs, flags, file, failure):
    run = runs.train(**flags, objective=f"{file}:lengths", max_new_tokens=3, max_steps=2)
    calls = [json.loads(line) for line in file.with_suffix(".calls").read_text().splitlines()]
    assert all(len(texts) == len(answers) for call in calls for texts in call for answers in call)
    assert all(reference in [word.strip() for word in WORDS] for *_, references in calls for reference in references)
    assert all(prompt.endswith("?") for prompts, *_ in calls for prompt in prompts)
    validated = -(-len(harness.corpus(zo.read_config(run)).validation_rows) // 4)  # calls of a validation
    lengths = [len(answer) / 10 for _, answers, _ in calls[:validated] for answer in answers]
    assert -harness.column(run, "val_score")[0] == pytest.approx(np.mean(lengths), abs=1e-6)
    cases = {"broken": "ZeroDivisionError: division by zero (line 11)", "odd": "no finite number for each"}
    for name, says in (cases | {"short": "returned [0.5] for 4 answers", "gone": "no function of that name"}).items():
        failure(says, runs.code, name, **flags, objective=f"{file}:{name}", max_new_tokens=3)
    file.write_text("import nothing_of_that_name")
    failure("ModuleNotFoundError", runs.code, "gone", **flags, objective=f"{file}:lengths")


KINDS = {
    "accuracy, batched": {"objective": "accuracy", "parallel_q_computation": True, "direction": "lowrank"},
    "accuracy, last block": {"objective": "accuracy", "scope": "blocks:1-1"},
    "f1": {"objective": "f1", "max_new_tokens": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_queries_on_scores_resume_are_replayed_and_shared_among_processes(kind, runs, flags):
    own = flags | {"epsilon": 0.1, "query_budget_q": 3, "num_threads": 1} | KINDS[kind]
    whole = runs.goes_on(5, **own)
    assert harness.differences(whole, runs.train_ranks(2, "two", **own, max_steps=5)) == []
    rows = harness.metrics(whole)
    assert all(-1 <= float(row["loss"]) <= 0 for row in rows[1:])
    assert all(0 <= float(row["val_score"]) <= 1 for row in rows if row["val_loss"])
    assert kind == "f1" or any(c != 0 for line in harness.journal(whole) for c in line["projected_grads"])


def test_both_paths_measure_the_same_accuracy(runs, flags, workers, small_blocks):
    case = Case(runs, workers, **flags)
    metric, tensors = case.scored("accuracy"), zo.trainable_tensors(case.model.named_parameters())
    batch = zo.query_batch(*metric.sequences(case.corpus, "train", np.arange(6)), 4, "shared")
    for family in (zo.Gaussian(), zo.LowRank(2)):
        queries = zo.Queries(family, 0, 0, 4, 0.05)
        one, *others = (zo.query_losses(metric, tensors, batch, queries, group) for group in (0, 1, 3))
        assert all(np.array_equal(one, other) for other in others)
        assert len(np.unique(one)) > 1


def test_a_metric_is_validated_chosen_by_drawn_and_compared(runs, flags, capsys):
    """The best checkpoint is that of the highest score, not of the lowest loss."""
    runs.pictures = True
    run = runs.train(**flags, eval_metric="accuracy", max_steps=12, eval_interval=1, epsilon=1e-2, optimizer="adam")
    rows = [row for row in harness.metrics(run) if row["val_loss"]]
    assert len(rows) == 13
    scores = [float(row["val_score"]) for row in rows]
    assert json.loads((run / "finished.json").read_text())["val_score"] == scores[-1]
    best = run / "checkpoints" / "best"
    ranks = [(-score, float(row["val_loss"])) for score, row in zip(scores, rows)]
    assert ranks.index(min(ranks)) > 0
    assert json.loads((best / "state.json").read_text())["step"] == ranks.index(min(ranks))
    log = (run / "train.log").read_text()
    assert f"accuracy {scores[0]:.4f} at the start; best {max(scores):.4f}; last {scores[-1]:.4f}" in log
    capsys.readouterr()
    assert runs.main(["--compare", str(run), "--log_dir", str(run.parent)]) == 0
    assert "best score" in capsys.readouterr().out


def test_what_has_no_gradient_is_refused_where_one_is_needed(runs, flags, errors, tmp_path):
    score = {"objective": "accuracy"}
    gradient, no_examples = "a score has no gradient", {"dataset": "embedded", **dict.fromkeys(COLUMNS)}
    cases = [
        ({"mode": "FO"} | score, "--objective: has no effect without queries"),
        ({"mode": "Calibrate", "bp_interval": 2} | score, gradient),
        ({"direction": "feedback"} | score, "--objective"),
        ({"head": "closed_form"} | score, gradient),
        ({"scope": "layerwise"} | score, gradient),
        ({"objective": "f1", "parallel_q_computation": True}, "leave out --parallel_q_computation"),
        ({"objective": "acuracy"}, "--objective acuracy: must be one of loss, accuracy, exact_match, f1, or FILE.py"),
        ({"eval_metric": "gone.py:score"}, "--eval_metric gone.py:score: must be one of accuracy"),
        ({"eval_metric": "f1", **no_examples}, "scores are of prompts with completions"),
        ({"max_new_tokens": 3, **score}, "--max_new_tokens: has no effect without"),
    ]
    for given, says in cases:
        code, lines = errors(harness.argv(**runs.flags(**flags | given)))
        assert (code, any(says in line for line in lines)) == (2, True), (given, lines)
    many = write(tmp_path / "many.jsonl", [{"question": "q", "answer": f" {n}"} for n in range(200)])
    code, lines = errors(harness.argv(**runs.flags(**flags | score | {"dataset": many})))
    assert (code, "a choice between 2 to 100 completions, and 200 occur" in lines[-1]) == (2, True)


def test_queries_on_a_score_reach_farther():
    assert [zo.Config(objective=name).epsilon for name in ("loss", "accuracy", "f1")] == [1e-3, 1e-2, 1e-2]
    assert zo.Config(objective="accuracy").eval_metric == "accuracy"
    assert zo.Config(objective="f1", epsilon=0.5).epsilon == 0.5


def test_accuracy_can_be_learned_from_queries_alone(runs, flags, tmp_path):
    """Two words, one after each of two prompts: what is chosen at random at first is right at the end."""
    content = [{"question": f"{n}{'ab'[n % 2]}", "answer": (" left", " right")[n % 2]} for n in range(200)]
    own = {"dataset": write(tmp_path / "two.jsonl", content), "objective": "accuracy", "epsilon": 0.03}
    own |= {"query_budget_q": 8, "parallel_q_computation": True, "direction": "lowrank", "optimizer": "adam"}
    run = runs.train(**flags | own | {"learning_rate": 1e-2, "batch_size": 16, "max_steps": 20, "eval_interval": 20})
    first, *_, last = harness.column(run, "val_score")
    assert last > first + 0.2


def test_a_resumed_run_has_the_same_best_checkpoint(runs, flags, file):
    """Where the score is the same at every validation, and has no end as a decimal, the loss decides."""
    file.write_text("def third(prompts, answers, references):\n    return [1 / 3] * len(answers)\n")
    own = flags | {"eval_metric": f"{file}:third", "eval_interval": 1, "learning_rate": 1e-2, "max_new_tokens": 1}
    whole, run = runs.train("whole", **own, max_steps=6), runs.train("part", **own, max_steps=3)
    assert runs.resume(run, max_steps=6) == 0
    one, other = ((path / "checkpoints" / "best" / "model.safetensors").read_bytes() for path in (whole, run))
    assert one == other
    assert harness.differences(whole, run) == []


def test_another_function_of_the_same_name_is_noticed(runs, flags, file, failure):
    run = runs.train(**flags, objective=f"{file}:lengths", max_new_tokens=2, max_steps=2)
    file.write_text(SCORE_FILE + "# changed")
    failure(file, runs.resume, run, max_steps=4)


def test_tokens_are_counted_with_every_option_and_continuation(runs, flags):
    for given in ({"objective": "accuracy"}, {"objective": "f1", "max_new_tokens": 3}):
        run = runs.train(given["objective"], **flags | given | {"max_steps": 1})
        found = harness.corpus(zo.read_config(run))
        (ids, labels), row, options = found.batch(0), harness.metrics(run)[-1], found.completions
        longest = max(len(prompt) for prompt, _ in zo.parts_of(ids, labels)) + max(map(len, options))
        each = 3 * len(ids) * longest if given["objective"] == "accuracy" else ids.numel() + 3 * len(ids)
        assert int(row["data_tokens"]) == ids.numel()
        assert int(row["forward_tokens"]) == 4 * each  # two queries, two passes each


def test_weights_that_are_not_finite_are_not_taken_for_wrong_answers(runs, flags, workers):
    case = Case(runs, workers, **flags)
    metric = case.scored("accuracy")
    case.model.model.norm.weight.data[0] = float("nan")
    assert metric.losses(*metric.sequences(case.corpus, "train", case.corpus.rows(0))).isnan().all()


def test_the_models_own_wishes_do_not_change_what_is_greedy(runs, flags, workers):
    case = Case(runs, workers, **flags | {"max_new_tokens": 4, "eval_metric": "f1"})
    metric, prompts = case.scored("f1"), [[5, 6, 7], [8, 9]]
    plain = metric.continued(prompts, set())
    case.model.generation_config.no_repeat_ngram_size = 1
    case.model.generation_config.suppress_tokens = [row[0] for row in plain]
    assert metric.continued(prompts, set()) == plain
    assert case.model.generation_config.no_repeat_ngram_size == 1
    stopped = metric.continued([[5, 6, 7]], {plain[0][1]})[0]
    assert stopped == plain[0][: plain[0].index(plain[0][1]) + 1]  # an end of a template


def test_the_unigram_loss_is_of_the_completions(runs, flags):
    found = corpus(runs, **flags)
    words = [own for _, own in zo.parts_of(*found.sequences("train", np.arange(found.blocks)))]
    counts = np.bincount(np.concatenate(words), minlength=300) + 1.0
    predicted = np.concatenate([own for _, own in zo.parts_of(*found.sequences("validation", found.validation_rows))])
    assert found.unigram_loss() == pytest.approx(-np.log(counts / counts.sum())[predicted].mean())


@pytest.mark.parametrize("batched", [False, True])
def test_options_of_a_row_are_chosen_from_resumed_and_replayed_bitwise(runs, tmp_path, workers, batched):
    """Accuracy by hand, of each prompt with each of the row's options."""
    flags = COLUMNS | {"dataset": write(tmp_path / "choices.jsonl", choices()), "block_size": 32, "max_samples": 1000}
    flags |= {"options_column": "choices", "objective": "accuracy", "batch_size": 4, "learning_rate": 1e-2}
    case = Case(runs, workers, **flags)
    examples, metric = case.corpus.examples("train", np.arange(16)), case.scored("accuracy")
    chosen = [case.right(*each, case.corpus.options("train", at)) for at, each in enumerate(examples)]
    found = metric.losses(*metric.sequences(case.corpus, "train", np.arange(16))).item()
    assert 0 < sum(chosen) < 16
    assert found == pytest.approx(-np.mean(chosen))
    runs.goes_on(5, **flags, query_budget_q=4, parallel_q_computation=batched)
