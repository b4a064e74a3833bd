"""Prompts with completions, and chats: what is predicted, how they are cut, padded, refused, trained on, resumed."""

import json
from pathlib import Path

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

ADJECTIVES = ("small", "large", "old", "new", "blue", "warm and very, very pleasant", "cold")


def rows(count: int = 160) -> list[dict]:
    """Prompts of many lengths; their completions are of one word or of many."""
    asked = [f"{n}: is it {ADJECTIVES[n % 7]}? " * (1 + n % 3) for n in range(count)]
    return [{"question": asked[n], "answer": f" {ADJECTIVES[n * 3 % 7]} {n}"} for n in range(count)]


def write(path, content: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return path


COLUMNS = {"prompt_column": "question", "completion_column": "answer"}


@pytest.fixture
def flags(tmp_path) -> dict:
    return COLUMNS | {"dataset": write(tmp_path / "qa.jsonl", rows()), "block_size": 64, "max_samples": 1000}


def corpus(runs, **flags) -> zo.Corpus:
    given = runs.flags(**flags)
    return harness.corpus(zo.Config(**{n: str(v) if isinstance(v, Path) else v for n, v in given.items() if v}))


def test_completions_are_predicted_and_nothing_else(runs, flags):
    """Every token of every example once, in its split; an end of text is the last one."""
    found, texts = corpus(runs, **flags), {}
    for split in ("train", "validation"):
        for at in range(len(found.index[split])):
            (ids,), (labels,) = found.sequences(split, np.array([at]))
            begin = int((labels != zo.IGNORE_INDEX).nonzero()[0])
            assert torch.equal(ids[begin:], labels[begin:])
            assert (labels[:begin] == zo.IGNORE_INDEX).all()
            assert ids[-1] == found.tokenizer.eos_token_id
            parts = found.tokenizer.decode(ids[:begin]), found.tokenizer.decode(ids[begin:-1])
            texts[parts] = split
            assert rows()[found.index[split][at, 3] - 1] == dict(zip(("question", "answer"), parts))
    assert set(texts) == {(row["question"], row["answer"]) for row in rows()}
    assert texts == {parts: "validation" if zo.is_validation("\0".join(parts)) else "train" for parts in texts}
    assert found.about["documents"] == {split: len(found.index[split]) for split in ("train", "validation")}
    size = sum(len(answer.encode()) for (_, answer), split in texts.items() if split == "validation")
    assert found.about["bytes"]["validation"] == size
    every = [np.array([at]) for at in range(len(found.index["validation"]))]
    predicted = sum(int((found.sequences("validation", at)[1] >= 0).sum()) for at in every)
    assert found.bits_per_byte(1.0) == pytest.approx(predicted / size / np.log(2))


def test_padding_changes_no_loss_and_every_token_weighs_the_same(runs, flags, workers):
    """The loss of a batch and of the validation are those of examples one by one, made by hand."""
    found, model = corpus(runs, **flags), harness.llama("float64")
    model.resize_token_embeddings(300)
    objective = zo.Objective(model.double(), workers)

    def by_hand(split: str, numbers) -> tuple[float, int]:
        total, count = 0.0, 0
        for number in numbers:
            (ids,), (labels,) = found.sequences(split, np.array([number]))
            own = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
            total, count = total - own[labels[1:] >= 0].sum().item(), count + int((labels[1:] >= 0).sum())
        return total / count, count

    numbers = np.array([3, 4, 5, 9])
    ids, labels = found.sequences("train", numbers)
    lengths = [int(found.sequences("train", np.array([n]))[0].shape[1]) for n in numbers]
    assert ids.shape == labels.shape == (4, max(lengths))
    assert len(set(lengths)) > 1  # something is padded
    assert objective.losses(ids, labels).item() == pytest.approx(by_hand("train", numbers)[0], rel=1e-10)
    validation = by_hand("validation", found.validation_rows)[0]
    assert zo.validation_loss(objective, found) == pytest.approx(validation, rel=1e-10)
    ids[labels < 0] = torch.where(torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None], 7, ids)[labels < 0]
    assert objective.losses(ids, labels).item() == pytest.approx(by_hand("train", numbers)[0], rel=1e-10)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_is_refused_with_its_row(
    runs, flags, failure, tmp_path
):
    whole = corpus(runs, **flags)
    size = max(int(np.diff(index)[:, 1].max()) for index in whole.index.values()) + 1
    short = corpus(runs, **flags | {"block_size": size})
    assert short.longest == size < whole.longest <= 64
    for at in range(len(whole.index["train"])):
        (long_ids, long_labels), (ids, labels) = (c.sequences("train", np.array([at])) for c in (whole, short))
        assert torch.equal(ids, long_ids[:, -size:])
        assert torch.equal(labels, long_labels[:, -size:])
    start, end = max((line[1:3].tolist() for line in whole.index["train"]), key=lambda line: line[1] - line[0])
    line = failure("the completion in row", runs.code, **flags | {"block_size": end - start})
    numbers = [int(each[3]) for index in whole.index.values() for each in index if each[2] - each[1] >= end - start]
    assert f"row {numbers[0]} has {end - start} tokens, too many for --block_size {end - start}" in line


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def chat(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def test_the_last_message_of_a_chat_is_predicted_by_the_template(runs, tmp_path, failure):
    chats = [chat(row["question"], row["answer"]) for row in rows()]
    file = write(tmp_path / "chats.jsonl", [{"messages": each} for each in chats])
    tokenizer = zo.wrapped_tokenizer(zo.trained_tokenizer([r["question"] + r["answer"] for r in rows()], 300))
    flags = {"dataset": file, "completion_column": "messages", "block_size": 128, "max_samples": 1000}
    flags["tokenizer"] = tmp_path / "tokenizer"
    tokenizer.save_pretrained(flags["tokenizer"])
    failure("the tokenizer has no chat template", runs.code, **flags)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(flags["tokenizer"])
    found = corpus(runs, **flags)
    for at in range(20):
        (ids,), (labels,) = found.sequences("train", np.array([at]))
        user, answer = chats[found.index["train"][at, 3] - 1]
        begin = int((labels >= 0).nonzero()[0])
        assert found.tokenizer.decode(ids[:begin]) == f"<user>{user['content']}</s>\n<assistant>"
        assert found.tokenizer.decode(ids[begin:]) == f"{answer['content']}</s>\n{zo.END_OF_TEXT}"
    tokenizer.chat_template = TEMPLATE.replace("</s>", "</m>")
    tokenizer.save_pretrained(flags["tokenizer"])
    assert corpus(runs, **flags).folder != found.folder


KINDS = {
    "in place": {},
    "batched": {"parallel_q_computation": True, "direction": "lowrank", "optimizer": "adam"},
    "distinct": {"query_data": "distinct"},
    "feedback": {"direction": "feedback", "query_budget_q": 1, "optimizer": "adam", "epsilon": None},
    "FO": {"mode": "FO", "optimizer": "adam"},
    "Instruct": {"mode": "Instruct", "bp_interval": 3, "head": "closed_form"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_examples_learn_resume_and_are_replayed(kind, runs, flags):
    own = flags | {"batch_size": 4, "learning_rate": 1e-3} | KINDS[kind]
    whole = runs.goes_on(6, **own)
    found = harness.corpus(zo.read_config(whole))
    counted = np.cumsum([found.batch(step)[0].numel() for step in range(6)]).tolist()
    assert [int(row["data_tokens"]) for row in harness.metrics(whole)] == [0, *counted]
    assert len(set(np.diff([0, *counted]))) > 1  # batches are as wide as their longest
    first, *_, last = harness.column(whole, "val_loss")
    assert last < first


def test_two_processes_agree_on_examples(runs, flags):
    own = flags | {"num_threads": 1, "batch_size": 4}
    assert harness.differences(runs.train("one", **own), runs.train_ranks(2, "two", **own)) == []


def test_odd_files_and_flags_are_refused_in_a_line(runs, flags, failure, errors, tmp_path):
    odd = write(tmp_path / "odd.jsonl", [*rows(), {"question": "q", "answer": 7}])
    columns = "its columns are question, answer"
    cases = [
        ({"completion_column": "reply"}, f"no column 'reply'; {columns}; choose with"),
        ({"completion_column": None, "prompt_column": None}, f"no column 'text'; {columns}"),
        ({"dataset": odd}, "7 (int) in column 'answer', not text"),
        ({"text_column": "question"}, "--text_column: has no effect without --dataset of a file, folder or hub"),
    ]
    for given, says in cases:
        failure(says, runs.code, **flags | given)
    assert all("has no effect without --dataset" in line for line in errors(harness.argv(**COLUMNS))[1])
    blank = [*rows(), {"question": "nothing to say", "answer": " "}, {"question": None, "answer": "all by itself"}]
    found = corpus(runs, **flags | {"dataset": write(tmp_path / "blank.jsonl", blank)})
    assert sum(found.about["documents"].values()) == len(blank) - 1


def choices(count: int = 160) -> list[dict]:
    """Each row has two to four options of its own, of many lengths; the second is the answer."""
    options = [[f" {ADJECTIVES[(n + at) % 7]} {n}" for at in range(2 + n % 3)] for n in range(count)]
    return [{"question": f"{n}:", "answer": own[1], "choices": own} for n, own in enumerate(options)]


def test_every_example_is_shown_with_its_own_options_first_its_completion(runs, tmp_path):
    file = write(tmp_path / "choices.jsonl", choices())
    flags = COLUMNS | {"dataset": file, "block_size": 64, "max_samples": 1000, "eval_metric": "accuracy"}
    found = corpus(runs, **flags, options_column="choices")
    assert found.most_options == 4
    for split in ("train", "validation"):
        for at in range(len(found.index[split])):
            row = choices()[found.index[split][at, 3] - 1]
            (plain,), _ = found.sequences(split, np.array([at]))
            ids, labels = found.choices(split, np.array([at]))
            assert len(ids) == 4
            parts = []
            for own, label in zip(ids, labels):
                begin, end = int((label >= 0).nonzero()[0]), int((label >= 0).nonzero()[-1]) + 1
                assert own[end - 1] == found.tokenizer.eos_token_id
                parts.append(tuple(map(found.tokenizer.decode, (own[:begin], own[begin : end - 1]))))
            assert {prompt for prompt, _ in parts} == {row["question"]}
            assert parts[0][1] == row["answer"]
            assert {option for _, option in parts} == set(row["choices"])
            assert torch.equal(ids[0][: len(plain)], plain)
    assert found.longest >= max(found.choices("train", np.array([at]))[0].shape[1] for at in range(found.blocks))
    # what is trained on and counted is the same without options
    plain = corpus(runs, **flags | {"eval_metric": "f1"})
    assert plain.about["predicted"] == found.about["predicted"]
    assert plain.about["bytes"] == found.about["bytes"]
    assert all(torch.equal(*pair) for pair in zip(plain.batch(3), found.batch(3)))


def templated(tmp_path, content: list[dict], template: str = TEMPLATE) -> dict:
    """Flags of chats with options, and of a tokenizer with a template."""
    tokenizer = zo.wrapped_tokenizer(zo.trained_tokenizer(["which? left right"], 300))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = {"dataset": write(tmp_path / "chats.jsonl", content), "tokenizer": tmp_path / "tokenizer"}
    flags |= {"completion_column": "messages", "options_column": "choices", "eval_metric": "accuracy"}
    return flags | {"block_size": 128, "max_samples": 1000}


def test_options_of_chats_go_through_the_template(runs, tmp_path):
    said = [" left", " right"]
    content = [{"messages": chat("which?", said[n % 2]), "choices": said} for n in range(160)]
    found = corpus(runs, **templated(tmp_path, content))
    texts = [found.tokenizer.decode(label[label >= 0]) for label in found.choices("train", np.array([0]))[1]]
    assert sorted(texts) == [f"{text}</s>\n{zo.END_OF_TEXT}" for text in said]


def test_options_that_are_the_same_as_tokens_are_refused(runs, tmp_path, failure):
    """A template that strips what it is given makes one of two."""
    content = [{"messages": chat("which?", "left"), "choices": ["left", " left"]}] * 80
    template = "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}"
    failure("has options that are the same as tokens", runs.code, **templated(tmp_path, content, template))


def test_a_completion_may_go_without_an_end_of_text(runs, flags):
    with_end, without = corpus(runs, **flags), corpus(runs, **flags, without_eos=True)
    for at in range(20):
        (ids, labels), (own, own_labels) = (each.sequences("train", np.array([at])) for each in (with_end, without))
        assert torch.equal(ids[:, :-1], own)
        assert torch.equal(labels[:, :-1], own_labels)
    assert with_end.about["predicted"]["train"] - without.about["predicted"]["train"] == with_end.blocks


ROWS = [{"question": f"{n}:", "answer": f" {'ab'[n % 2]}", "own": [" a", " b"]} for n in range(80)]
CHOSEN, BY_CHOICE = {"eval_metric": "accuracy"}, {"options_column": "own", "eval_metric": "accuracy"}
NO_END, NO_LIST = {"without_eos": True}, "row 8: no list of two or more texts in the column 'own': "
ALONE = "row 8: one token in all, of which nothing can be predicted"
REFUSED = {  # what is in row 8
    "one option": ({"own": [" a"]}, BY_CHOICE, f'{NO_LIST}[" a"]'),
    "a blank option": ({"own": [" b", ""]}, BY_CHOICE, NO_LIST),
    "no options": ({"own": None}, BY_CHOICE, NO_LIST),
    "a number": ({"own": [" b", 3]}, BY_CHOICE, NO_LIST),
    "another completion": ({"own": [" a", " c"]}, BY_CHOICE, "row 8: the completion ' b' is none of its options"),
    "a long option": ({"own": [" b", " large" * 60]}, BY_CHOICE, "the option in row 8 has "),
    "no prompt": ({"question": ""}, BY_CHOICE, "row 8 has no prompt: they can't be compared"),
    "no column": ({}, CHOSEN | {"options_column": "chioces"}, "no column 'chioces'; its columns are question, answer"),
    "one token": ({"question": "", "answer": "x"}, NO_END, ALONE),
    "a beginning": ({"answer": " a a"}, CHOSEN | NO_END, "of ' a' and ' a a' the shorter one always"),
    "an option's beginning": ({"own": [" b", " b b"]}, BY_CHOICE | NO_END, "row 8: of ' b' and"),
}


@pytest.mark.parametrize(("changed", "given", "says"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_measured_is_refused_by_its_row(runs, tmp_path, failure, changed, given, says):
    content = [*ROWS[:7], ROWS[7] | changed, *ROWS[8:]]
    flags = COLUMNS | {"dataset": write(tmp_path / "rows.jsonl", content), "block_size": 32, "max_samples": 1000}
    failure(says, runs.code, **flags, **given)


def test_options_change_nothing_that_is_trained(runs, tmp_path):
    """Aligned looks at the frequencies of tokens; options are not among them."""
    flags = COLUMNS | {"dataset": write(tmp_path / "choices.jsonl", choices()), "block_size": 32, "max_samples": 1000}
    flags |= {"direction": "aligned", "max_steps": 2}
    with_options = runs.train("options", **flags, options_column="choices", eval_metric="accuracy")
    assert harness.same_weights(with_options, runs.train("none", **flags, eval_metric="exact_match"))


def test_another_metric_may_be_asked_for_on_a_resume(runs, tmp_path):
    flags = COLUMNS | {"dataset": write(tmp_path / "choices.jsonl", choices()), "block_size": 32, "max_samples": 1000}
    run = runs.train(**flags, options_column="choices", eval_metric="accuracy", max_steps=4, save_interval=2)
    assert runs.resume(run, max_steps=6, eval_metric="exact_match") == 0
    assert "resuming from step 4" in (run / "train.log").read_text()
