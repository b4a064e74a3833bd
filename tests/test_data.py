"""Data: documents, the split, tokenizers, the token cache, and every source of text."""

import bz2
import collections
import csv
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import subprocess
import sys

import harness
import numpy as np
import pytest

import reproduce_zo_paper as zo


def config_of(tmp_path, **flags) -> zo.Config:
    own = {"cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe:300", "block_size": 8, "batch_size": 2}
    return zo.Config(**own | {name: str(value) if name == "dataset" else value for name, value in flags.items()})


def corpus_of(tmp_path, **flags) -> zo.Corpus:
    return harness.corpus(config_of(tmp_path, **flags))


def texts_in(corpus: zo.Corpus, split: str) -> list[str]:
    """The documents of a split, read back from its tokens."""
    tokens = corpus.tokens[split].tolist()
    text = corpus.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert not tokens or text.endswith(zo.END_OF_TEXT)
    return text.split(zo.END_OF_TEXT)[:-1]


def is_split_of(corpus: zo.Corpus, texts: list[str]) -> bool:
    """Whether the corpus is these documents, in this order, each in its split."""
    validation = [text for text in texts if zo.is_validation(text)]
    train = [text for text in texts if not zo.is_validation(text)]
    return (texts_in(corpus, "train"), texts_in(corpus, "validation")) == (train, validation)


def sentences(count: int = 120) -> list[str]:
    """Documents with letters of several scripts, quotes, commas and line breaks."""
    pick = random.Random(0)
    words = ["night,", '"day"', "été", "東京", "ice\nwater", "\t", "end.", "Ελλάδα", "naïve", "🙂", "and so", "on;"]
    return [f"document {number} " + " ".join(pick.choices(words, k=30)) for number in range(count)]


# ---- embedded text and the split -------------------------------------------------------------------------------------


def test_the_embedded_text_is_english_passages_in_a_fixed_order_that_mixes_its_years():
    passages = zo.embedded_passages()
    lengths = np.array([len(passage.split()) for passage in passages])
    assert 3000 < len(passages) < 6000
    assert 450 < np.median(lengths) < 700
    assert sum(map(len, passages)) > 10_000_000
    assert all(" the " in passage for passage in passages if len(passage.split()) > 400)
    assert passages == sorted(passages, key=lambda text: hashlib.sha256(text.encode()).digest())
    validation = [text for text in passages if zo.is_validation(text)]
    assert abs(len(validation) / len(passages) - 1 / 20) < 5 * (0.05 * 0.95 / len(passages)) ** 0.5


def test_the_split_is_a_function_of_the_text_alone(tmp_path):
    """Splits share no document; what corpus.json counts is what is there; more documents begin with the fewer."""
    corpus, wanted = corpus_of(tmp_path, max_samples=60), zo.embedded_passages()[:60]
    assert is_split_of(corpus, wanted)
    assert texts_in(corpus, "validation")
    expected = int.from_bytes(hashlib.sha256(wanted[17].encode()).digest()[8:12], "big") % 20 == 0
    assert zo.is_validation(wanted[17]) == expected
    for split in ("train", "validation"):
        texts = texts_in(corpus, split)
        counts = {"documents": len(texts), "tokens": len(corpus.tokens[split]), "bytes": len("".join(texts).encode())}
        assert {name: corpus.about[name][split] for name in counts} == counts
    assert corpus.frequencies.tolist() == np.bincount(corpus.tokens["train"], minlength=300).tolist()


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    return zo.wrapped_tokenizer(zo.gpt2_tokenizer())


def test_gpt2_encodes_as_gpt2_does_and_loses_nothing(gpt2):
    known = {
        "Hello world": [15496, 995],
        "Hello, world!": [15496, 11, 995, 0],
        " the": [262],
        "The quick brown fox jumps over the lazy dog.": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
        "<|endoftext|>": [50256],
        "\n\n": [628],
    }
    assert {text: gpt2.encode(text) for text in known} == known
    assert len(gpt2) == 50257
    assert gpt2.eos_token_id == 50256
    for text in sentences(20):
        assert gpt2.decode(gpt2.encode(text), clean_up_tokenization_spaces=False) == text


def test_bpe_has_the_size_asked_for_is_trained_on_training_documents_and_loses_nothing(tmp_path, monkeypatch):
    seen, trained = [], zo.trained_tokenizer
    monkeypatch.setattr(zo, "trained_tokenizer", lambda texts, size: trained(iter(seen.extend(texts) or seen), size))
    corpus = corpus_of(tmp_path, tokenizer="bpe:600", max_samples=30)
    assert len(corpus.tokenizer) == 600
    assert "".join(seen) == "".join(text for text in zo.embedded_passages()[:30] if not zo.is_validation(text))
    for text in sentences(20):
        assert corpus.tokenizer.decode(corpus.tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_a_tokenizer_from_a_folder(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path / "tokenizer")
    corpus = corpus_of(tmp_path, tokenizer=str(tmp_path / "tokenizer"), max_samples=40)
    assert corpus.tokenizer.encode("Hello world") == [15496, 995]
    assert is_split_of(corpus, zo.embedded_passages()[:40])


# ---- long documents --------------------------------------------------------------------------------------------------

BETWEEN = {"blanks": [" "], "double blanks": ["  "], "lines": ["\n"]}
BETWEEN["all kinds"] = [" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n"]


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_long_documents_have_the_tokens_of_encoding_them_whole(tmp_path, gpt2, between):
    """They are encoded in pieces."""
    pick = random.Random(1)
    words = ["night,", "été", "東京", "don't", "end.", "Ελλάδα", "1,000", "🙂", "e\u0301", "and", "so", "forth"]
    texts = ["".join(pick.choice(words) + pick.choice(between) for _ in range(20_000)) + "end", *sentences(40)]
    pieces = list(zo.pieces_of(texts[0]))
    assert len(pieces) > 2
    assert "".join(pieces) == texts[0]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    for tokenizer in ("gpt2", "bpe:300"):
        corpus = corpus_of(tmp_path, dataset=tmp_path / "a.jsonl", tokenizer=tokenizer)
        for split in ("train", "validation"):
            own = [text + zo.END_OF_TEXT for text in texts if zo.is_validation(text) == (split == "validation")]
            assert corpus.tokens[split].tolist() == [token for text in own for token in corpus.tokenizer.encode(text)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "megabytes"), [("a.txt", 200), ("a.jsonl", 40)])
def test_memory_does_not_grow_much_with_the_longest_line(tmp_path, name, megabytes):
    words = " ".join(zo.embedded_passages()[:200]).replace("\n", " ").replace('"', "").replace("\\", "") + " "
    text = words * (megabytes * 10**6 // len(words.encode()) + 1)
    (tmp_path / name).write_text(json.dumps({"text": text}) + "\n" if name == "a.jsonl" else text, "utf-8")
    code = (
        "import resource, sys, reproduce_zo_paper as zo; code = zo.main(sys.argv[1:]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    flags = {"dataset": tmp_path / name, "tokenizer": "gpt2"}
    flags |= {"cache_dir": tmp_path / "cache", "log_dir": tmp_path / "logs"}
    command = [sys.executable, "-c", code, *harness.argv(**flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT, check=True)
    code, peak = map(int, done.stdout.splitlines()[-1].split())
    assert code == 2  # one document is no training and validation, but its tokens were made
    assert "tokenizing" in done.stdout
    assert peak < 1200, f"{peak} MiB"


# ---- sources of text -------------------------------------------------------------------------------------------------


def write(path, texts: list, column: str = "text") -> None:
    """The texts as a file of the kind that its name says."""
    rows = [{"id": number, column: text} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    compressed = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with compressed(path, "wt", newline="", encoding="utf-8") as file:
        if ".jsonl" in path.name:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif ".csv" in path.name:
            csv.writer(file).writerows([rows[0], *map(dict.values, rows)])
        else:
            file.write(json.dumps(rows) if ".json" in path.name else "\n\n".join(texts))


KINDS_OF_FILE = ("a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.bz2", "a.txt.xz")


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_local_files_are_used_whole_or_up_to_max_samples_and_read_again_when_they_change(tmp_path, name):
    texts = [text.replace("\n", " ") for text in sentences()] if ".txt" in name else sentences()
    own = {} if ".txt" in name else {"text_column": "story"}
    write(tmp_path / name, texts, "story")
    assert is_split_of(corpus_of(tmp_path, dataset=tmp_path / name, max_samples=100, **own), texts[:100])
    assert is_split_of(corpus_of(tmp_path, dataset=tmp_path / name, **own), texts)
    changed = [text + " more" for text in texts]
    write(tmp_path / name, changed, "story")
    assert is_split_of(corpus_of(tmp_path, dataset=tmp_path / name, **own), changed)


def test_a_folder_of_files_in_the_order_of_their_names(tmp_path):
    texts = sentences(120)
    (tmp_path / "set" / "more").mkdir(parents=True)
    write(tmp_path / "set" / "b.jsonl", texts[60:])
    write(tmp_path / "set" / "a.jsonl", texts[:30])
    write(tmp_path / "set" / "more" / "c.jsonl", [])
    write(tmp_path / "set" / "a2.jsonl", texts[30:60])
    (tmp_path / "set" / "README.md").write_text("not data")
    assert is_split_of(corpus_of(tmp_path, dataset=tmp_path / "set"), texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_empty_texts_are_left_out_and_counted_in_the_log(tmp_path, caplog, name):
    texts = sentences(100)
    empty = ["", "   ", "\n"] + ([None] if name != "a.csv" else [])
    write(tmp_path / name, [*texts[:50], *empty, *texts[50:]])
    caplog.set_level("INFO", "reproduce_zo_paper")
    assert is_split_of(corpus_of(tmp_path, dataset=tmp_path / name), texts)
    assert re.search(rf"\b{len(empty)} empty texts", caplog.text)


def test_a_hub_data_set_is_streamed_and_no_more_read_than_used(tmp_path, monkeypatch):
    """Any id, with its configuration, split and column, or a name."""
    asked, read = [], []

    def load_dataset(*args, streaming, **kwargs):
        assert streaming
        asked.append((args, kwargs))
        return ({kwargs["split"]: f"text {read.append(number) or number}"} for number in range(10**9))

    monkeypatch.setattr(zo.datasets, "load_dataset", load_dataset)
    flags = ["--dataset", "someone/stories", "--dataset_config", "en", "--dataset_split", "dev", "--text_column", "dev"]
    config, _ = zo.parse_config(flags)
    assert list(zo.documents(config.source)) == [f"text {number}" for number in range(zo.HUB_SAMPLES)]
    assert asked == [(("someone/stories", "en"), {"split": "dev"})]
    read.clear()
    assert len(list(zo.documents(config_of(tmp_path, dataset="c4", text_column="train", max_samples=30).source))) == 30
    assert len(read) <= 31
    assert asked[1] == (("allenai/c4", "en"), {"split": "train"})


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_batches_are_the_training_blocks_each_once_an_epoch_and_validation_is_spread_over_its_split(tmp_path):
    corpus = corpus_of(tmp_path, max_samples=100, block_size=16, batch_size=3, eval_samples=5)
    tokens = corpus.tokens["train"].tolist()
    blocks = [tuple(tokens[lo : lo + 16]) for lo in range(0, len(tokens) - 15, 16)]
    epoch = [tuple(row) for step in range(len(blocks) // 3) for row in corpus.batch(step)[0].tolist()]
    assert not collections.Counter(epoch) - collections.Counter(blocks)
    last = len(corpus.tokens["validation"]) // 16 - 1
    assert (corpus.validation_rows[0], corpus.validation_rows[-1], len(set(corpus.validation_rows))) == (0, last, 5)
    every = corpus_of(tmp_path, max_samples=100, block_size=16, eval_samples=10**6)
    assert every.validation_rows.tolist() == list(range(last + 1))


# ---- the cache (that it is damaged: test_attacks.py) -----------------------------------------------------------------


def test_the_cache_is_used_again_and_only_for_the_same_corpus(tmp_path, monkeypatch):
    config = config_of(tmp_path, max_samples=30)
    first = harness.corpus(config)
    for changed in ({"max_samples": 31}, {"tokenizer": "bpe:301"}):
        assert harness.corpus(dataclasses.replace(config, **changed)).folder != first.folder
    monkeypatch.setattr(zo, "write_corpus", None)  # a second tokenization would fail
    for free in ({}, {"seed": 5}, {"block_size": 4}, {"batch_size": 1}):
        assert harness.corpus(dataclasses.replace(config, **free)).folder == first.folder


def test_what_a_killed_process_left_is_not_used_and_cleared_away(tmp_path, monkeypatch):
    """A kill in the middle of tokenizing, and what an earlier one left."""
    config = config_of(tmp_path, max_samples=30)
    whole = harness.corpus(config)
    train = whole.tokens["train"].tolist()
    os.rename(whole.folder, tmp_path / "away")
    left = whole.folder.with_name(whole.folder.name.replace("tokens", "partial"))
    left.mkdir()
    (left / "train.bin").write_bytes(b"torn")

    def killed(*args):
        (args[-1] / "train.bin").write_bytes(b"torn")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zo, "write_corpus", killed)
        with pytest.raises(KeyboardInterrupt):
            harness.corpus(config)
    assert not whole.folder.exists()
    assert harness.corpus(config).tokens["train"].tolist() == train
    assert {path.name for path in config.cache.iterdir() if path.name[0] != "."} == {whole.folder.name}


def test_two_processes_at_once_build_the_same_cache(runs, tmp_path):
    """Neither fails, and both train on the same tokens; one that waits says so."""
    children = [runs.start(name, cache_dir=tmp_path / "fresh", max_steps=2) for name in ("one", "two")]
    assert [child.wait() for child in children] == [0, 0], [child.output() for child in children]
    one, two = (harness.only_run(tmp_path / name) for name in ("one", "two"))
    assert harness.differences(one, two) == []
    assert [path.name[:7] for path in (tmp_path / "fresh").iterdir() if path.name[0] != "."] == ["tokens-"]
