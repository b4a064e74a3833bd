"""Many processes: the run of one process bit for bit, faults of any of them, and a run that goes on with another number."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

RUNS = {
    "in place, q 5": {"query_budget_q": 5},
    "batched low rank": {"query_budget_q": 5, "direction": "lowrank", "parallel_q_computation": True, "parallel_batch_size": 2},
    "batched dense, distinct, adam": {
        **{"query_budget_q": 6, "query_data": "distinct", "batch_size": 6, "optimizer": "adam"},
        **{"parallel_q_computation": True, "parallel_batch_size": 2, "direction": "rademacher"},
    },
    "aligned": {"query_budget_q": 4, "direction": "aligned", "rank": 2},
    "feedback, fewer queries than ranks": {"query_budget_q": 1, "direction": "feedback", "rank": 4, "optimizer": "adam"},
    "closed form alone": {"query_budget_q": 0, "direction": "gaussian", "head": "closed_form"},
    "backpropagation": {"mode": "FO", "optimizer": "mudamw", "query_budget_q": None},
    "Instruct, guided": {"mode": "Instruct", "bp_interval": 3, "query_budget_q": 3, "optimizer": "adam"},
    "Instruct, guess": {"mode": "Instruct", "bp_interval": 3, "query_budget_q": 3, "direction": "feedback", "rank": 4},
    "layerwise": {"scope": "layerwise", "stage_steps": "3,2", "query_budget_q": 3, "max_steps": None, "save_interval": 5},
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_two_ranks_are_one_process_bit_for_bit(runs, flags):
    one = runs.train("one", **{"num_threads": 1} | flags)
    two = runs.train_ranks(2, "two", sync_check_interval=1, **flags)
    assert harness.differences(one, two) == []


@pytest.mark.parametrize("count", [3, 4])
def test_any_number_of_ranks_is_one_process_bit_for_bit(runs, count):
    flags = {"query_budget_q": 5, "parallel_q_computation": True, "parallel_batch_size": 2}
    one = runs.train("one", num_threads=1, **flags)
    many = runs.train_ranks(count, "many", **flags)
    assert harness.differences(one, many) == []


def test_every_query_has_one_rank():
    for size in range(1, 9):
        for q in range(20):
            shares = []
            for rank in range(size):
                ranks = zo.Ranks(zo.Stop())
                ranks.size = size
                shares.append(list(ranks.share(q, rank)))
            assert list(itertools.chain(*shares)) == list(range(q))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_travels_in_a_step_is_what_was_measured(runs):
    sent = {}
    for q in (2, 8):
        for size in (32, 64):
            children = runs.ranks(2, f"q{q}_{size}", query_budget_q=q, block_size=size)
            assert [child.wait() for child in children] == [0, 0]
            sent[q, size] = int(re.search(r"rank 0 told the others (\d+) bytes a step", children[0].output())[1])
    assert sent[2, 32] == sent[2, 64] == 8 * (1 + 2 * 1)  # the losses of one query, a signal
    assert sent[8, 32] == sent[8, 64] == 8 * (1 + 2 * 4)


# ---- faults ----------------------------------------------------------------------------------------------------------

LONG = {"max_steps": 30, "save_interval": 10, "query_budget_q": 3, "rank_timeout": 5}
SLOWLY = ("slow_steps", 0.01)


def under_way(runs, children, name: str = "logs") -> None:
    """Waits till a few steps are in the journal."""
    size = zo.Journal(None, LONG["query_budget_q"], "").dtype.itemsize
    children[0].until(lambda: harness.records(runs.folder / name, size) > 11)


def errors_of(children) -> list[str]:
    return [line for child in children for line in child.output().splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]
)
def test_a_rank_that_is_gone_or_hangs_stops_the_other_and_the_run_goes_on(runs, victim, number):
    whole = runs.train("whole", **LONG, num_threads=1)
    children = runs.ranks(2, faults={0: SLOWLY, 1: SLOWLY}, **LONG)
    under_way(runs, children)
    children[victim].send(number)
    assert children[1 - victim].wait() == 5
    told = errors_of(children)
    what = "gone" if number == signal.SIGKILL else r"silent for 5 s \(--rank_timeout\)"
    assert len(told) == 1, told
    assert re.search(rf"error: step \d+: another rank is {what}; .*--resume", told[0])
    children[victim].kill()
    run = harness.only_run(runs.folder / "logs")
    resumed = harness.ranks(3, harness.argv(resume=run), runs.folder / "resumed.out", dict.fromkeys(range(3), SLOWLY))
    resumed[0].until(lambda: len(zo.Journal(run / "journal.bin", 3, zo.read_config(run).identity).records) > 18)
    resumed[2].send(signal.SIGTERM)
    assert [child.wait() for child in resumed] == [143] * 3
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


def test_ranks_with_other_weights_stop_with_one_line(runs):
    children = runs.ranks(3, faults={2: ("other_weights", 4)}, **LONG, sync_check_interval=3)
    assert [child.wait() for child in children] == [5] * 3
    (line,) = errors_of(children)
    assert line.startswith("error: step 6: other weights on rank 2 than on rank 0")


def test_weights_are_compared_before_a_checkpoint_and_at_the_end(runs):
    for name, step, found in (("saved", 7, 10), ("ended", 27, 30)):
        children = runs.ranks(2, name, faults={1: ("other_weights", step)}, **LONG, sync_check_interval=1000)
        assert [child.wait() for child in children] == [5] * 2
        (line,) = errors_of(children)
        assert line.startswith(f"error: step {found}: other weights on rank 1")
        run = harness.only_run(runs.folder / name)
        assert not (run / "checkpoints" / f"step_{found:08d}").exists()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs):
    children = runs.ranks(2, faults={0: SLOWLY}, **LONG)
    under_way(runs, children)
    children[1].send(signal.SIGTERM)
    assert [child.wait() for child in children] == [143, 143]
    run = harness.only_run(runs.folder / "logs")
    whole = runs.train("whole", **LONG, num_threads=1)
    assert harness.last_checkpoint(run).name in re.sub(r"step (\d+)", lambda m: f"step_{int(m[1]):08d}", children[0].output())
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


def test_a_run_of_one_process_goes_on_with_two(runs):
    flags = {"mode": "Instruct", "bp_interval": 4, "query_budget_q": 3, "optimizer": "adam", "max_steps": 12, "num_threads": 1}
    whole = runs.train("whole", **flags)
    stopped = runs.train("logs", **flags | {"max_steps": 8})
    children = harness.ranks(2, harness.argv(resume=stopped, max_steps=12), runs.folder / "resumed.out", {})
    assert [child.wait() for child in children] == [0, 0], [child.output() for child in children]
    assert harness.differences(whole, stopped) == []


def test_a_loss_that_is_no_number_on_one_rank_stops_all_with_one_line(runs):
    children = runs.ranks(2, faults={1: ("nan_losses", 5)}, **LONG)
    assert [child.wait() for child in children] == [3, 3]
    (line,) = errors_of(children)
    assert line.startswith("error: step 5, query 1: the losses at theta +- epsilon z are nan and nan; nothing was updated")


def test_a_full_disk_on_rank_0_stops_both_with_its_line(runs):
    children = runs.ranks(2, faults={0: ("full_disk_in_journal", 4)}, **LONG)
    assert [child.wait() for child in children] == [4, 5]
    (line,) = errors_of(children)
    assert "journal.bin: can't be written" in line


def test_wrong_flags_and_other_flags_are_said_once(runs):
    children = runs.ranks(2, mode="Magic")
    assert [child.wait() for child in children] == [2, 2]
    assert errors_of(children) == [
        "error: --mode Magic: must be one of FO, ZO, Instruct, Calibrate" + zo.nearest("Magic", zo.MODES),
    ]
    (one, words) = (harness.free_port(), [harness.argv(**runs.flags("two", seed=seed)) for seed in (0, 1)])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one)}
    children = [harness.Child(words[n], runs.folder / f"two.{n}", (), common | {"RANK": str(n)}) for n in (0, 1)]
    assert [child.wait() for child in children] == [2, 2]
    assert errors_of(children) == ["error: rank 1 is not like rank 0: --seed 1, there 0"]
    assert not (runs.folder / "two").exists() or not list((runs.folder / "two").iterdir())


def test_a_fault_of_one_rank_is_said_by_its_number(runs):
    words = harness.argv(**runs.flags())
    port = str(harness.free_port())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [words, [*words, "--dataset", str(runs.folder / "missing.txt"), "--epsilon", "0"]]
    children = [harness.Child(each[n], runs.folder / f"one.{n}", (), common | {"RANK": str(n)}) for n in (0, 1)]
    assert [child.wait() for child in children] == [2, 2]
    first, second = sorted(errors_of(children))
    assert first.startswith("error: rank 1: --dataset")
    assert second.startswith("error: rank 1: --epsilon 0")


def test_other_tokens_are_refused_and_leave_no_run_behind(runs):
    """Two machines, each with a text file of its own in the same place."""
    homes = [runs.folder / name for name in ("a", "b")]
    for home, words in zip(homes, ("some words and more\n\n", "other words, not these\n\n")):
        home.mkdir()
        (home / "text.txt").write_text("".join(f"{n} {words}" * 9 for n in range(300)))
    flags = runs.flags("logs", dataset="text.txt", max_samples=None, tokenizer="gpt2", num_threads=1)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port())}
    children = [
        harness.Child(harness.argv(**flags), runs.folder / f"two.{n}", ("in_folder", str(homes[n])), common | {"RANK": str(n)})
        for n in (0, 1)
    ]
    assert [child.wait() for child in children] == [2, 2]
    (line,) = errors_of(children)
    assert line.startswith("error: rank 1 is not like rank 0: tokens ")
    assert list((runs.folder / "logs").iterdir()) == []


def test_a_run_directory_is_needed_by_rank_0_alone(runs):
    whole = runs.train("whole", max_steps=6, num_threads=1)
    run = runs.train("logs", max_steps=4, num_threads=1)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port())}
    (runs.folder / "elsewhere").mkdir()
    words = [harness.argv(resume=os.path.relpath(run, runs.folder), max_steps=6)] * 2
    homes = [runs.folder, runs.folder / "elsewhere"]
    children = [
        harness.Child(words[n], runs.folder / f"two.{n}", ("in_folder", str(homes[n])), common | {"RANK": str(n)}) for n in (0, 1)
    ]
    assert [child.wait() for child in children] == [0, 0], [child.output() for child in children]
    assert set(harness.differences(whole, run)) <= {"metrics.csv"}


def test_a_second_signal_ends_a_rank_that_waits_for_another(runs):
    children = runs.ranks(2, faults={0: SLOWLY, 1: SLOWLY}, **LONG | {"rank_timeout": 100})
    under_way(runs, children)
    children[1].send(signal.SIGSTOP)
    time.sleep(0.5)
    children[0].send(signal.SIGTERM)
    time.sleep(1.5)  # longer than what torchrun passes on twice
    children[0].send(signal.SIGTERM)
    assert children[0].wait(10) == 143
    children[1].kill()


@pytest.mark.parametrize("flags", [{"dry_run": True}, {"replay": "RUN"}], ids=["dry_run", "replay"])
def test_what_one_process_does_is_refused_to_more(runs, flags):
    run = runs.train("one", num_threads=1)
    words = harness.argv(**{name: run if value == "RUN" else value for name, value in flags.items()})
    children = harness.ranks(2, words, runs.folder / "refused.out", {})
    assert [child.wait() for child in children] == [2, 2]
    assert errors_of(children) == ["error: --replay, --dry_run, --compare: one process is enough; start it without torchrun"]


def test_torchrun_starts_it(runs):
    one = runs.train("one", num_threads=1)
    code = "import sys, harness; harness.shrink(); sys.exit(harness.zo.main(sys.argv[1:]))"
    start = runs.folder / "start.py"
    start.write_text(f"import sys; sys.path[:0] = [{str(harness.HERE)!r}, {str(harness.ROOT)!r}]\n{code}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(harness.free_port())]
    words = harness.argv(**runs.flags("two", num_threads=1))
    done = subprocess.run([*command, str(start), *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert harness.differences(one, harness.only_run(runs.folder / "two")) == []


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_a_sample_of_the_weights_shows_a_change_that_stays(tiny_llama, monkeypatch):
    monkeypatch.setattr(zo, "SAMPLED_WEIGHTS", 64)
    before = [zo.sample_digest(tiny_llama, 0, step) for step in range(40)]
    assert before == [zo.sample_digest(tiny_llama, 0, step) for step in range(40)]
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, :6] += 1e-6
    seen = [zo.sample_digest(tiny_llama, 0, step) != digest for step, digest in enumerate(before)]
    assert 0 < np.mean(seen) < 1  # 64 of 960 weights, 6 of them changed: about one step in three


def test_threads_are_shared_out_to_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(zo.os, "sched_getaffinity", lambda _: set(range(10)), raising=False)
    ranks = zo.Ranks(zo.Stop())
    assert zo.cpu_threads(zo.Config(), ranks) is None
    ranks.size, ranks.local_size = 6, 3
    assert zo.cpu_threads(zo.Config(), ranks) == 3
    assert zo.cpu_threads(zo.Config(num_threads=7), ranks) == 7
