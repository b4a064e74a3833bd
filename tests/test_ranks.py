"""Many processes: the run of one process bit for bit, faults of any of them, a resume with another number."""

import os
import re
import signal
import subprocess
import sys
import time

import harness
import pytest
import torch

import reproduce_zo_paper as zo

BATCHED = {"parallel_q_computation": True, "parallel_batch_size": 2}
DISTINCT = {"query_data": "distinct", "batch_size": 6, "optimizer": "adam", "direction": "rademacher"}
FEEDBACK = {"direction": "feedback", "optimizer": "adam"}
INSTRUCT = {"mode": "Instruct", "bp_interval": 3, "query_budget_q": 3}
RUNS = {
    "in place": {"query_budget_q": 5},
    "batched low rank": {"query_budget_q": 5, "direction": "lowrank", **BATCHED},
    "batched dense, distinct, adam": {"query_budget_q": 6, **DISTINCT, **BATCHED},
    "dense updates shared": {"query_budget_q": 65, "direction": "kronecker", "weight_decay": 0.1, "max_steps": 2},
    "bfloat16 updates shared": {"query_budget_q": 64, "weights": "bfloat16", "max_steps": 2, **BATCHED},
    "aligned": {"query_budget_q": 4, "direction": "aligned", "rank": 2},
    "feedback, fewer queries than ranks": {"query_budget_q": 1, **FEEDBACK},
    "feedback, block": {"query_budget_q": 0, **FEEDBACK},
    "feedback, branch": {"query_budget_q": 3, "carry": "branch", **FEEDBACK},
    "feedback, stream": {"query_budget_q": 3, "carry": "stream", **FEEDBACK},
    "closed form alone": {"query_budget_q": 0, "direction": "gaussian", "head": "closed_form"},
    "backpropagation": {"mode": "FO", "optimizer": "mudamw"},
    "Instruct, gaussian": {"direction": "gaussian", **INSTRUCT},
    "Instruct, feedback": {"direction": "feedback", **INSTRUCT},
    "layerwise": {"scope": "layerwise", "stage_steps": "2,1", "query_budget_q": 3, "max_steps": None},
}


def codes(children) -> list[int]:
    return [child.wait() for child in children]


@pytest.mark.parametrize(("kind", "count"), [*((kind, 2) for kind in RUNS), ("batched low rank", 3), ("in place", 4)])
def test_many_ranks_are_one_process_bit_for_bit(runs, kind, count):
    one = runs.train("one", **{"num_threads": 1} | RUNS[kind])
    many = runs.train_ranks(count, "many", sync_check_interval=1, **RUNS[kind])
    assert harness.differences(one, many) == []


def test_what_travels_in_a_step_is_what_was_measured(runs):
    """The losses of its queries, whatever the batch's size."""
    for q, size in ((2, 32), (8, 64)):
        children = runs.ranks(2, f"q{q}_{size}", query_budget_q=q, block_size=size)
        assert codes(children) == [0, 0]
        sent = int(re.search(r"rank 0 sent the others (\d+) bytes a step", children[0].output())[1])
        assert sent == 8 * 2 * (q // 2)


def test_large_dense_updates_are_made_in_parts_and_others_by_every_rank(tiny_llama, workers):
    tensors = zo.trainable_tensors(tiny_llama.named_parameters())
    ranks = zo.Ranks()
    ranks.size = 3

    def owners(q: int, family: str = "gaussian", optimizer: str = "sgd") -> list:
        queries = zo.Queries(zo.DIRECTIONS[family](), 0, 0, q, 1e-3)
        return zo.shared_out(tensors, queries, zo.Optimizer(optimizer, tensors, workers), ranks)

    assert set(owners(100)) == set(owners(128, optimizer="adam")) == {None}
    assert {owner for t, owner in zip(tensors, owners(128, "lowrank")) if t.parameter.ndim == 2} == {None}
    sizes = [sum(t.parameter.numel() for t, owner in zip(tensors, owners(128)) if owner == rank) for rank in range(3)]
    assert sum(sizes) == sum(t.parameter.numel() for t in tensors)
    assert max(sizes) < 0.5 * sum(sizes)


# ---- faults ----------------------------------------------------------------------------------------------------------

LONG = {"max_steps": 30, "save_interval": 10, "query_budget_q": 3, "rank_timeout": 4}
SLOWLY = ("slow_steps", 0.01)


@pytest.fixture(scope="module")
def long_run(module_runs):
    """The run of one process."""
    return module_runs.train("long", **LONG, num_threads=1)


def under_way(runs, children) -> None:
    """Waits till a few steps are in the journal."""
    children[0].until(lambda: harness.records(runs.folder / "logs") > 11)


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_rank_that_is_gone_or_hangs_stops_the_other_and_the_run_goes_on(runs, long_run, victim, number):
    """With three ranks, and then with one."""
    children = runs.ranks(2, faults={0: SLOWLY, 1: SLOWLY}, **LONG)
    under_way(runs, children)
    children[victim].send(number)
    assert children[1 - victim].wait() == 5
    told = harness.errors_of(*children)
    what = "gone" if number == signal.SIGKILL else r"silent for 4 s \(--rank_timeout\)"
    assert len(told) == 1, told
    assert re.search(rf"error: step \d+: another rank is {what}; .*--resume", told[0])
    children[victim].kill()
    run = harness.only_run(runs.folder / "logs")
    if victim == 1:
        again = harness.ranks(3, harness.argv(resume=run), runs.folder / "resumed.out", dict.fromkeys(range(3), SLOWLY))
        again[0].until(lambda: harness.records(runs.folder / "logs") > 18)
        again[2].send(signal.SIGTERM)
        assert codes(again) == [143] * 3
    runs.complete(run, long_run)


@pytest.mark.parametrize(("count", "drifted", "interval", "found"), [(3, 4, 3, 6), (2, 7, 1000, 10), (2, 27, 1000, 30)])
def test_ranks_with_other_weights_stop_with_one_line(runs, count, drifted, interval, found):
    """Every sync_check_interval steps, before a checkpoint, and at the end."""
    children = runs.ranks(count, faults={count - 1: ("other_weights", drifted)}, **LONG, sync_check_interval=interval)
    assert codes(children) == [5] * count
    (line,) = harness.errors_of(*children)
    assert line.startswith(f"error: step {found}: other weights on rank {count - 1} than on rank 0")
    assert not (harness.only_run(runs.folder / "logs") / "checkpoints" / f"step_{found:08d}").exists()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs, long_run):
    children = runs.ranks(2, faults={0: SLOWLY}, **LONG)
    under_way(runs, children)
    children[1].send(signal.SIGTERM)
    assert codes(children) == [143, 143]
    run = harness.only_run(runs.folder / "logs")
    stopped = int(re.search(r"stopped after step (\d+)", children[0].output())[1])
    assert harness.last_checkpoint(run).name == f"step_{stopped:08d}"
    assert len(harness.journal(run)) == stopped
    runs.complete(run, long_run)


FAULTS = {
    "no number": (
        {1: ("nan_losses", 5)},
        [3, 3],
        "step 5, query 1: the losses .* are nan and nan; nothing was updated",
    ),
    "full disk": ({0: ("full_disk_in_journal", 4)}, [4, 5], r"\S+journal.jsonl: can't be written"),
}


@pytest.mark.parametrize(("faults", "wanted", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_one_rank_stops_all_with_one_line(runs, faults, wanted, words):
    children = runs.ranks(2, faults=faults, **LONG)
    assert codes(children) == wanted
    (line,) = harness.errors_of(*children)
    assert re.match(f"error: {words}", line)


OTHER = {
    "wrong on both": ([["--mode", "Magic"]] * 2, ["--mode Magic: must be one of FO, ZO, Instruct, Calibrate"]),
    "another seed": ([[], ["--seed", "1"]], ["rank 1 is not like rank 0: --seed 1, there 0"]),
    "wrong on one": ([[], ["--dataset", "no.txt", "--epsilon", "0"]], ["rank 1: --dataset", "rank 1: --epsilon 0"]),
}


@pytest.mark.parametrize(("more", "said"), OTHER.values(), ids=OTHER)
def test_wrong_flags_and_other_flags_are_said_once(runs, more, said):
    words = harness.argv(**runs.flags())
    children = harness.ranks(2, [[*words, *more[n]] for n in (0, 1)], runs.folder / "two.out", {})
    assert codes(children) == [2, 2]
    found = sorted(harness.errors_of(*children))
    assert len(found) == len(said)
    assert all(line.startswith(f"error: {start}") for line, start in zip(found, said))
    assert not list((runs.folder / "logs").glob("*"))


def in_folders(*folders) -> dict[int, tuple]:
    """Ranks on machines of their own, as it were."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    return {n: ("in_folder", str(folder)) for n, folder in enumerate(folders)}


def test_other_tokens_are_refused_and_leave_no_run_behind(runs):
    """Two machines, each with a text file of its own in the same place."""
    faults = in_folders(runs.folder / "a", runs.folder / "b")
    for name in ("a", "b"):
        (runs.folder / name / "text.txt").write_text("".join(f"{n} words of {name}\n\n" * 9 for n in range(300)))
    children = runs.ranks(2, faults=faults, dataset="text.txt", max_samples=None, tokenizer="gpt2")
    assert codes(children) == [2, 2]
    (line,) = harness.errors_of(*children)
    assert line.startswith("error: rank 1 is not like rank 0: tokens ")
    assert list((runs.folder / "logs").iterdir()) == []


def test_a_run_directory_is_needed_by_rank_0_alone(runs):
    """A run of one process goes on with two."""
    flags = RUNS["Instruct, gaussian"] | {"optimizer": "adam", "eval_interval": 2, "num_threads": 1}
    whole, run = runs.train("whole", **flags, max_steps=7), runs.train(**flags, max_steps=4)
    words = harness.argv(resume=os.path.relpath(run, runs.folder), max_steps=7)
    children = harness.ranks(2, words, runs.folder / "two.out", in_folders(runs.folder, runs.folder / "elsewhere"))
    assert codes(children) == [0, 0], [child.output() for child in children]
    assert harness.differences(whole, run) == []


def test_a_second_signal_ends_a_rank_that_waits_for_another(runs):
    children = runs.ranks(2, faults={0: SLOWLY, 1: SLOWLY}, **LONG | {"rank_timeout": 100})
    under_way(runs, children)
    children[1].send(signal.SIGSTOP)
    children[0].send(signal.SIGTERM)
    children[0].until(lambda: "once more: at once" in children[0].output())
    time.sleep(1.2)  # longer than what torchrun passes on twice
    children[0].send(signal.SIGTERM)
    assert children[0].wait(20) == 143
    children[1].kill()


def test_what_one_process_does_is_refused_to_more(runs):
    run = runs.train("one", num_threads=1)
    for number, flags in enumerate([{"dry_run": True}, {"replay": run}]):
        children = harness.ranks(2, harness.argv(**flags), runs.folder / f"refused{number}.out", {})
        assert codes(children) == [2, 2]
        (line,) = harness.errors_of(*children)
        assert line == "error: --replay, --dry_run, --compare: one process is enough; start it without torchrun"


@pytest.mark.skipif(harness.DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two devices")
def test_torchrun_starts_it(runs):
    one = runs.train("one", num_threads=1)
    code = "import sys, pytest, harness; harness.shrink(pytest.MonkeyPatch()); sys.exit(harness.zo.main(sys.argv[1:]))"
    start = runs.folder / "start.py"
    start.write_text(f"import sys; sys.path[:0] = [{str(harness.HERE)!r}, {str(harness.ROOT)!r}]\n{code}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(harness.free_port())]
    words = harness.argv(**runs.flags("two", num_threads=1))
    done = subprocess.run([*command, str(start), *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert harness.differences(one, harness.only_run(runs.folder / "two")) == []


def test_threads_are_shared_out_to_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(zo.os, "sched_getaffinity", lambda _: set(range(10)), raising=False)
    ranks = zo.Ranks()
    assert zo.cpu_threads(zo.Config(), ranks) is None
    ranks.size, ranks.local_size = 6, 3
    assert zo.cpu_threads(zo.Config(), ranks) == 3
    assert zo.cpu_threads(zo.Config(num_threads=7), ranks) == 7
