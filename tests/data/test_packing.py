"""Instructions packed by whole examples: the rows, the batches, and the place of a run in them."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run

from llamajax.config import freeze
from llamajax.corpus.inspection.directory_inspection import inspect
from llamajax.corpus.inspection.inspect_options import InspectOptions
from llamajax.data import (
    Ledger,
    Position,
    check_ledger,
    eval_batches,
    left_out,
    open_stages,
    sample_ids,
    tokens_reached,
    train_batches,
    with_packing,
    with_stages,
)
from llamajax.data.batches import make_batch
from llamajax.data.packing import EXAMPLES, WINDOWS, ExampleRows, Examples, fill_rows
from llamajax.errors import UserError
from llamajax.replaying.document_losses import document_losses
from llamajax.training.place_in_data import stage_warnings

BOS, EOS = 256, 257
T = 60


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, str]]:
    """Prompts and answers of 2 to 240 tokens, over three blocks; many have the same length."""
    rng = np.random.default_rng(7)
    sizes = [tuple(s) for s in rng.integers(0, 25, (400, 2))] + [(80, 90), (30, 28), (31, 28)]
    letters = "".join(chr(97 + c) for c in rng.integers(0, 26, 20_000))
    starts = np.cumsum([0, *(a + b for a, b in sizes)])
    return [
        (letters[s : s + a], letters[s + a : s + a + b + 1])
        for s, (a, b) in zip(starts, sizes, strict=False)
    ]


@pytest.fixture
def chats(prepared, opened, examples):
    """The mixture of the examples, with what a test changes of the config."""
    lines = [{"prompt": a, "completion": b} for a, b in examples]
    path = prepared("chats", lines, "--format=instructions", "--validation_fraction=0.2")
    return lambda split="train", **changes: opened(path, split=split, seq_len=T, **changes)


def position(mixture, **changes):
    settings = {"batch_size": 4, "seq_len": T, "mixture_hash": mixture.hash} | changes
    return Position.start(**settings)


def answers(lengths):
    """Examples of these lengths of which every token carries loss."""
    ends = np.cumsum(lengths)
    return Examples(lengths, np.stack([ends - lengths, ends], axis=1))


def sizes_of(source):
    """The tokens of each example, and how many carry loss."""
    found = source.examples
    return found.lengths, found.loss_tokens(found.starts, found.starts + found.lengths)


def one_by_one(sizes, capacity, *, evenly):
    """The rooms left after each piece in turn went into the row with the most, or least, room."""
    rooms = [capacity] * (-(-sum(sizes) // capacity) if evenly else 0)
    for size in sizes:
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[(max if evenly else min)(fitting)[1]] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@pytest.mark.parametrize("evenly", [True, False])
def test_rows_are_those_of_one_piece_after_the_other(evenly):
    rng = np.random.default_rng(1)
    for _ in range(100):
        capacity = int(rng.integers(3, 50))
        sizes = np.sort(rng.integers(1, capacity + 1, rng.integers(1, 60)))[::-1]
        rows = fill_rows(sizes, capacity, evenly=evenly)
        expected = one_by_one(sizes.tolist(), capacity, evenly=evenly)
        left = capacity - np.bincount(rows, sizes, minlength=len(expected))
        assert sorted(left.tolist()) == expected


def test_rows_hold_about_as_many_examples_unless_that_takes_many_more_rows():
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 1, 20_000)).astype(np.int64) + 2
    rows = ExampleRows(answers(lengths), 4096, "key")
    counts = [len(rows.pieces(n)) for n in range(900)]
    assert np.percentile(counts, 99) < 1.5 * np.mean(counts)
    assert rows.efficiency > 0.98
    mixed = np.array([20, 50] * 500)  # one of 50 and two of 20 in a row leave room for neither
    assert ExampleRows(answers(mixed), 99, "key").efficiency == 1


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_example_is_whole_in_one_row_and_each_target_counts_once(
    chats, examples, split, mask_documents
):
    mixture = chats(split, mask_documents=mask_documents)
    (samples,) = mixture.samples(T, EXAMPLES)
    if split == "train":
        batches = train_batches(
            {mixture.hash: mixture},
            position(mixture, batch_size=samples.count),
            first_step=0,
            rows=range,
            num_threads=0,
            prefetch=0,
        )
        batches = [next(batches)]
    else:
        batches = eval_batches(mixture, batch_size=7, seq_len=T, packing=EXAMPLES, rows=range(7))
    whole = {
        (BOS, *a.encode(), *b.encode(), EOS): len(b) + 1
        for a, b in examples
        if len(a) + len(b) + 2 <= T + 1
    }
    found, targets, held = [], 0, 0
    for batch in batches:
        targets += batch["loss_mask"].sum()
        held += (batch["segment_ids"] > 0).sum()
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
        if not mask_documents:
            assert batch["segment_ids"].max() == 1
            continue
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                here = np.flatnonzero(batch["segment_ids"][row] == segment)
                assert batch["positions"][row, here].tolist() == list(range(len(here)))
                text = (*batch["tokens"][row, here].tolist(), int(batch["targets"][row, here[-1]]))
                text = text if text[-1] == EOS else text[:-1]  # of the next example
                if text in whole:
                    assert batch["loss_mask"][row, here].sum() == whole[text]
                    found.append(text)
    (source,) = mixture.sources
    assert targets == source.num_loss_tokens
    assert held / (samples.count * T) == pytest.approx(samples.efficiency)
    cut = mixture.packing_facts(T, EXAMPLES)["cut_examples_share"] * source.stats["documents"]
    if mask_documents:
        assert source.stats["documents"] - round(cut) == len(found) == len(set(found))
    targets_of_pieces = [  # of a long prompt the pieces without an answer are left out
        source.examples.loss_tokens(first + 1, first + size)
        for number in range(samples.count)
        for first, size in samples.pieces(number)
    ]
    assert min(targets_of_pieces) > 0
    assert sum(targets_of_pieces) == targets


def test_manifest_and_run_have_the_same_figures(chats, examples):
    mixture = chats()
    for length, facts in mixture.sources[0].stats["packing"].items():
        now = mixture.packing_facts(int(length), EXAMPLES)
        assert facts["cut_examples_share"] == 0
        assert now == {"packing": EXAMPLES} | facts
    path = mixture.sources[0].path
    inspected = inspect(InspectOptions(inspect=str(path), seq_len=1024), lambda *_: None)
    train = inspected["splits"]["train"]
    assert train["packing"] == {"seq_len": 1024} | mixture.sources[0].stats["packing"]["1024"]
    assert {(part["begins"], part["ends"]) for part in train["samples"]} == {
        ("document", "with it")
    }
    facts = mixture.packing_facts(T, EXAMPLES)
    lengths, learned = sizes_of(mixture.sources[0])
    assert facts["cut_examples_share"] == pytest.approx((lengths > T + 1).mean())
    assert facts["cut_loss_share"] == pytest.approx(learned[lengths > T + 1].sum() / learned.sum())
    starts = np.cumsum(lengths) - lengths
    windows = [
        not any(first <= s and s + n - 1 <= first + T for first in range(0, starts[-1] + 1, T))
        for s, n in zip(starts, lengths, strict=True)
    ]
    assert mixture.packing_facts(T, WINDOWS)["cut_examples_share"] == np.mean(windows)


def test_the_inspection_shows_an_example_that_fills_a_row_whole(prepared):
    lines = [{"prompt": "q" * 10, "completion": "a" * 10}]  # 22 tokens
    path = prepared("one", lines, "--format=instructions")
    (part,) = inspect(InspectOptions(inspect=str(path), seq_len=21), lambda *_: None)["splits"][
        "train"
    ]["samples"]
    assert (part["length"], part["ends"]) == (22, "with it")


def test_rows_are_a_function_of_lengths_length_and_seed():
    lengths = answers(np.random.default_rng(3).integers(2, 90, 500))
    digest = ExampleRows(lengths, T, "a").digest
    # Changes only if runs that began before cannot go on: the ledger refuses them.
    assert digest.hex() == "b11b4afd1189129c689f1047f5c20553"
    assert digest == ExampleRows(lengths, T, "a").digest != ExampleRows(lengths, T, "b").digest
    one, other = (ExampleRows(lengths, T, key) for key in "ab")
    assert one.count == other.count
    first = [sorted(rows.pieces(n)[:, 1]) for rows in (one, other) for n in range(one.count)]
    assert sorted(map(tuple, first[: one.count])) == sorted(map(tuple, first[one.count :]))


def test_a_run_that_began_with_windows_goes_on_with_them(chats):
    mixture, by_hash = chats(), {chats().hash: chats()}
    saved = position(mixture, packing=WINDOWS).to_json()
    del saved["segments"][0]["packing"]  # as of an earlier release
    old = Position.from_json(saved)
    stages = [(0, {"batch_size": 4, "seq_len": T, "mixture_hash": mixture.hash})]
    auto = with_packing(stages, by_hash, "auto", old)
    assert with_stages(old, auto, by_hash, step=5) == old
    # Asked for, whole examples begin after the share of the epoch that was read.
    reached = tokens_reached(old, by_hash, 5)
    assert list(reached.values()) == [5 * 4 * T]
    new = with_stages(old, with_packing(stages, by_hash, EXAMPLES, old), by_hash, step=5)
    segment = new.segment(5)
    (rows,) = mixture.samples(T, EXAMPLES)
    assert (new.segment(4).packing, segment.packing) == (WINDOWS, EXAMPLES)
    assert segment.starts[0] == -(-5 * 4 * T * rows.count // mixture.num_tokens)
    assert tokens_reached(new, by_hash, 5) == reached


def test_text_read_before_says_nothing_about_instructions(chats, prepared, opened):
    chat, text = chats(), opened(prepared("text", ["abc " * 900]))
    sizes = {"batch_size": 4, "seq_len": T}
    stages = [(0, sizes | {"mixture_hash": text.hash}), (5, sizes | {"mixture_hash": chat.hash})]
    by_hash = {mixture.hash: mixture for mixture in (chat, text)}
    old = position(text, packing=WINDOWS)  # of an earlier release, or with data.packing=windows
    assert [each["packing"] for _, each in with_packing(stages, by_hash, "auto", old)] == [
        WINDOWS,
        EXAMPLES,
    ]
    # Nor does the setting change anything of text, in place after an earlier stage.
    alone = {text.hash: text}
    later = dataclasses.replace(old.segments[0], first_step=5, starts=(7,))
    read = old.extended(later)
    for setting in ("auto", EXAMPLES, WINDOWS):
        again = with_packing(stages[:1], alone, setting, read)
        assert with_stages(read, again, alone, step=8) == read
    # Where the data is not there any more, the run says what it takes.
    config = tiny_run.get_config("unused")
    with_chat = {chat.hash: chat}
    saved = dataclasses.replace(old, reached=tokens_reached(old, by_hash, 5))
    again = with_packing(stages[1:], with_chat, "auto", saved)
    place = with_stages(saved, again, with_chat, step=5)
    assert place.segment(5).packing == EXAMPLES
    (line,) = stage_warnings(freeze(config), place, with_chat, step=5)
    assert "data.packing=windows cuts them" in line
    assert not list(stage_warnings(freeze(config), place, with_chat, step=6))
    unknown = with_stages(old, again, with_chat, step=5)
    _, line = stage_warnings(freeze(config), unknown, with_chat, step=5)
    assert "of an earlier release, does not say of which sources" in line


def test_another_length_keeps_the_epochs(chats):
    mixture, by_hash = chats(), {chats().hash: chats()}
    before, longer = (mixture.samples(length, EXAMPLES)[0] for length in (T, 150))
    place = position(mixture, batch_size=before.count)
    settings = {"batch_size": 4, "seq_len": 150, "mixture_hash": mixture.hash}
    place = with_stages(place, [(0, settings)], by_hash, step=2)
    assert place.segment(2).starts == (2 * longer.count,)
    for count in range(3 * before.count):
        assert before.after(before.tokens(count)) == count


def test_stages_and_rollbacks_go_on_in_the_rows_of_a_source(chats, prepared, opened):
    alone, text = chats(), prepared("text", ["abc " * 900])
    paths = text, alone.sources[0].path
    mixtures = [opened(*paths, weights=w, seq_len=T) for w in ((0.2, 0.8), (0.7, 0.3))]
    by_hash = {mixture.hash: mixture for mixture in mixtures}
    stages = [
        (step, {"batch_size": 4, "seq_len": T, "mixture_hash": mixture.hash})
        for step, mixture in zip((0, 6), mixtures, strict=True)
    ]
    whole = with_stages(Position.start(**stages[0][1]), stages, by_hash, step=0)
    segment, reached = left_out(whole, by_hash, to_step=4, at_step=8, borders=(6,))
    after = Position((*whole.until(4).segments, segment), reached)
    after = with_stages(after, stages, by_hash, step=4)
    read = [(whole, step) for step in range(8)] + [(after, step) for step in range(4, 12)]
    found = []
    for place, step in read:
        mixture = by_hash[place.segment(step).mixture_hash]
        for number in sample_ids(mixture, place, step):
            source, row, _ = mixture.locate(int(number), T, EXAMPLES)
            found += [row] * source.masked
    assert found == [alone.order(T, EXAMPLES)[i] for i in range(len(found))]


def test_the_ledger_knows_the_rows(chats):
    mixture = chats()
    by_hash, place = {mixture.hash: mixture}, position(mixture)
    ledger = Ledger(by_hash, place, step=0, saved=None)
    for step in (1, 2, 3):
        ledger.add(step)
    saved = json.loads(json.dumps(ledger.to_json()))
    assert check_ledger(saved, by_hash, place, step=3) == 3
    other = chats()
    other.samples(T, EXAMPLES)[0] = ExampleRows(other.sources[0].examples, T, "other")
    with pytest.raises(UserError, match="are not those that this run read"):
        check_ledger(saved, {other.hash: other}, place, step=3)


def test_replay_names_examples_by_their_place_in_the_stream(chats):
    mixture, ids = chats(), list(range(4))
    samples = [mixture.locate(number, T, EXAMPLES) for number in ids]
    batch = make_batch(samples, T, mask_documents=True)
    nll_BT = np.where(batch["loss_mask"], np.random.default_rng(0).random((4, T)), 0)
    lengths, learned = sizes_of(mixture.sources[0])
    expected = dict(zip((np.cumsum(lengths) - lengths).tolist(), learned.tolist(), strict=True))
    found = document_losses(ids, samples, batch, nll_BT).largest
    whole = [part for part in found if part.first_token in expected]
    assert len(whole) > 2
    for part in whole:
        assert part.first_token in samples[part.row].pieces[:, 0]
        assert part.token_ids[0] == BOS
        assert part.num_targets == expected[part.first_token]


def test_whole_examples_of_text_are_refused(prepared):
    config = tiny_run.get_config(str(prepared("text", ["some text"] * 40)))
    config.data.packing = EXAMPLES
    with pytest.raises(
        UserError, match=r"data\.packing = examples is for instructions, and .*text"
    ):
        list(open_stages(freeze(config)))
