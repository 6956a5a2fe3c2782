"""Passes of a fixed shape run on over the ends of blocks: no row twice, none filled up but at the run's end.

The compiled block's stand-in rounds by what a row's place and the other rows of its pass are, as kernels may.
"""

import itertools
import json
import math
import time

import pytest
import torch

import experiment
from evals.cache import Cache
from evals.model import memory
from evals.model.language_model import run_block
from tests.evals.stand_ins import collected
from tests.evals.test_language_model import Words, small_blocks
from variants.kit.contexts import Attention

LAYERS = [1, 2]
SHAPES = {"longer than a pass": (256, 7), "shorter than a pass": (64, 16), "of just one pass": (64, 5)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def run(cache, request):
    block_tokens, rows = request.param
    return run_of(cache, block_tokens, rows)


def run_of(cache, block_tokens=256, rows=7):
    settings, lm = small_blocks(cache, f"--block_tokens={block_tokens}", f"--lm_batch_size={rows}", "--layers=1,2")
    lm.compiled = by_place
    return settings, lm


def by_place(block, h_BTD, *args, **kwargs):
    out_BTD = run_block(block, h_BTD, *args, **kwargs)
    place_B11 = torch.arange(len(out_BTD))[:, None, None]
    return out_BTD * (1 + 1e-6 * place_B11) + 1e-6 * out_BTD.mean()


def blocks_of(settings, lm, store, stream=None, first=0, wanted=(), driven=0):
    """The run's blocks from `first` on, and the cursor with which each could be continued from.

    While one is there, so many passes of the next are driven, as training does, and the one after that is tokenised.
    """
    stream = stream or experiment.token_stream(Words(2000), lm, settings)
    found, cursors = [], []
    for b, block, ahead in experiment.activation_blocks(settings, lm, stream, store, first, list(wanted)):
        passed = list(itertools.islice(ahead, driven))
        until = time.monotonic() + 5
        while passed and stream.next < min(b + 3, len(stream.plan)) and time.monotonic() < until:
            time.sleep(0.01)
        given = dict(stream.cursors)
        found.append(block)
        cursors.append(json.loads(json.dumps(given[max(number for number in given if number <= b)])))
    return found, cursors


def watch(lm, monkeypatch):
    """Rows in each compiled pass, and the tokens of those that were asked for."""
    shapes, asked, compiled, training_residuals = [], [], lm.compiled, lm.training_residuals

    def noted(block, h_BTD, *args, **kwargs):
        out_BTD = compiled(block, h_BTD, *args, **kwargs)
        if block is lm.blocks[0]:
            shapes.append(len(h_BTD))
        return out_BTD

    def asked_for(tokens_BT, layers, rows):
        x = training_residuals(tokens_BT, layers, rows)
        asked.extend(tokens_BT.tolist())
        return x

    monkeypatch.setattr(lm, "compiled", noted)
    monkeypatch.setattr(lm, "training_residuals", asked_for)
    return shapes, asked


def rows_of(settings, lm):
    """Every row of the run, in order."""
    stream = experiment.token_stream(Words(2000), lm, settings)
    return [row for b in range(len(stream.plan)) for row in stream.block(b)[0].tolist()]


def plain_blocks(settings, lm):
    """The run's blocks by passes that end with each block, of the model as it is."""
    lm.compiled, compiled = None, lm.compiled
    stream = experiment.token_stream(Words(2000), lm, settings)
    found = [collected(settings, lm, *stream.block(b)[:2], LAYERS, []) for b in range(len(stream.plan))]
    lm.compiled = compiled
    return found


def assert_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def test_every_row_is_passed_once_and_only_the_last_pass_is_filled_up(run, tmp_path, monkeypatch):
    """Fails if a block's last pass is filled up, rows that were taken ahead are passed again, or left out."""
    settings, lm = run
    rows = rows_of(settings, lm)
    shapes, asked = watch(lm, monkeypatch)
    blocks_of(settings, lm, Cache(tmp_path, 0))
    assert asked == rows
    assert shapes == [settings.lm_batch_size] * math.ceil(len(rows) / settings.lm_batch_size)


def test_passes_of_the_next_block_are_driven_in_between(run, tmp_path, monkeypatch):
    """Fails if driving gives no pass, passes a row twice, or is offered where blocks are kept or memory has no room."""
    settings, lm = run
    rows = rows_of(settings, lm)
    shapes, asked = watch(lm, monkeypatch)

    def most_driven(store):
        stream, most = experiment.token_stream(Words(2000), lm, settings), 0
        for _, _, ahead in experiment.activation_blocks(settings, lm, stream, store, 0, []):
            most = max(most, sum(1 for _ in ahead))
        return most

    assert most_driven(Cache(tmp_path / "none", 0)) > 0
    assert asked == rows and len(shapes) == math.ceil(len(rows) / settings.lm_batch_size)
    assert most_driven(Cache(tmp_path / "keeps", 1)) == 0
    monkeypatch.setattr(memory, "free_memory", lambda device: 0.0)
    assert most_driven(Cache(tmp_path / "none", 0)) == 0


def test_blocks_hold_what_passes_of_their_own_would_give(run, tmp_path):
    """Fails if what is carried over goes to another row or layer, or BOS positions are counted with another block."""
    settings, lm = run
    lm.compiled = run_block
    found, _ = blocks_of(settings, lm, Cache(tmp_path, 0))
    assert_close(found, plain_blocks(settings, lm))


@pytest.mark.parametrize("driven", [0, 1, 10**6])
def test_a_resume_at_each_block_changes_no_bit(run, tmp_path, driven):
    """Fails if the rows taken ahead are not in the cursor, or are passed at another place or beside other rows.

    Also where passes of the next block were driven meanwhile, some or all: the cursor of this one is still there.
    """
    settings, lm = run
    whole, cursors = blocks_of(settings, lm, Cache(tmp_path, 0), driven=driven)
    assert len(whole) > 2
    assert_equal(whole, blocks_of(settings, lm, Cache(tmp_path, 0))[0])
    for b, cursor in enumerate(cursors):
        stream = experiment.token_stream(Words(2000), lm, settings, cursor)
        again, later = blocks_of(settings, lm, Cache(tmp_path, 0), stream, b)
        assert_equal(again, whole[b:])
        assert later[1:] == cursors[b + 1:]


def test_blocks_from_the_cache_change_no_bit_of_the_others(cache, tmp_path):
    """Fails if a block that follows a cached one begins with what was carried to another, or with nothing."""
    settings, lm = run_of(cache, 64, 7)
    store, keys = Cache(tmp_path, 1), []

    def noting(kind, depends_on, *others):
        keys.append(depends_on)
        return Cache.get(store, kind, depends_on, *others)

    store.get = noting
    whole, _ = blocks_of(settings, lm, store)
    assert len(whole) == len(keys) == 9
    for kept in ([0], [1], [0, 1, 2], [3, 5], range(0, 9, 2), range(8)):
        again = Cache(tmp_path, 1)
        for b in set(range(9)) - set(kept):
            again.forget("train", keys[b])
        assert_equal(blocks_of(settings, lm, again)[0], whole)
        assert len(again.hits) == len(kept)


def test_halving_the_batch_goes_on_over_the_ends_of_blocks(run, tmp_path, monkeypatch, capsys):
    """Fails if running out of memory loses rows that were to be carried over, or passes some twice."""
    settings, lm = run
    expected, rows = plain_blocks(settings, lm), rows_of(settings, lm)

    def small_card(block, h_BTD, *args, **kwargs):
        if len(h_BTD) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return run_block(block, h_BTD, *args, **kwargs)

    monkeypatch.setattr(lm, "compiled", small_card)
    shapes, asked = watch(lm, monkeypatch)
    found, _ = blocks_of(settings, lm, Cache(tmp_path, 0))
    assert_close(found, expected)
    assert asked == rows and max(shapes) <= 4 and "out of GPU memory" in capsys.readouterr().out


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_compiled_pass_given_up_on_the_way(run, tmp_path, monkeypatch, capsys, after):
    """Fails if what was carried over is lost, or used twice, where the plain pass takes over."""
    settings, lm = run
    expected, calls = plain_blocks(settings, lm), itertools.count()

    def breaks(block, h_BTD, *args, **kwargs):
        if next(calls) >= after * (max(LAYERS) + 1):
            raise RuntimeError("an illegal instruction")
        return run_block(block, h_BTD, *args, **kwargs)

    monkeypatch.setattr(lm, "compiled", breaks)
    found, _ = blocks_of(settings, lm, Cache(tmp_path, 0))
    assert lm.compiled is None and "going on without" in capsys.readouterr().out
    assert_close(found, expected)


def test_the_stream_gives_the_same_text_whatever_a_pass_holds(run):
    """Fails if looking ahead moves, repeats or drops a row, or reads on behind the run's end."""
    settings, lm = run
    carrying = experiment.token_stream(Words(2000), lm, settings)
    lm.compiled = None
    plain, rows = experiment.token_stream(Words(2000), lm, settings), rows_of(settings, lm)
    taken, P = 0, settings.lm_batch_size
    for b in range(len(plain.plan)):
        rows_RT, index_N, (before, after) = carrying.block(b)
        expected_RT, expected_N, none = plain.block(b)
        assert torch.equal(rows_RT, expected_RT) and torch.equal(index_N, expected_N)
        assert [len(part) for part in none] == [0, 0]
        end = taken + len(rows_RT)
        assert before.tolist() == rows[taken // P * P:taken]
        assert after.tolist() == rows[end:-(-end // P) * P]
        taken = end
    places = [stream.cursors[len(plain.plan)] for stream in (carrying, plain)]
    assert places[0] | dict(before=[]) == places[1]


def test_passes_that_give_attention_end_with_the_block(cache, tmp_path):
    """Fails if rows of other blocks come into a block's attention patterns, or a compiled pass is asked for them."""
    settings, lm = run_of(cache)
    wanted = [Attention(1, (0,), None)]
    stream = experiment.token_stream(Words(2000), lm, settings)
    found, _ = blocks_of(settings, lm, Cache(tmp_path, 0), wanted=wanted)
    for b, block in enumerate(found):
        rows_RT, index_N, _ = stream.block(b)
        x, patterns = lm.residuals_and_attention(rows_RT.long(), LAYERS, [1])
        torch.testing.assert_close(block[f"{wanted[0]}/attention_RATT"][:, 0], patterns[1], rtol=0, atol=2e-3)
        torch.testing.assert_close(block["x_1"], x[1].flatten(0, 1)[index_N], rtol=1e-4, atol=1e-4)


def test_entries_are_kept_apart_where_bits_may_differ(cache, tmp_path):
    """Fails if a row of another place in its pass is taken from the cache, or a CPU's entries are no longer found."""
    settings, lm = run_of(cache)
    compiled = {"compiled": True}
    for wanted, here, marks in (([], by_place, compiled | {"counted_from": "first row of the run"}), ([], None, {}),
                                ([Attention(1, (0,), None)], by_place, compiled)):
        store, lm.compiled = Cache(tmp_path, 1), here
        stream = experiment.token_stream(Words(2000), lm, settings)
        blocks_of(settings, lm, store, stream, wanted=wanted)
        of_all = dict(model=lm.digest, layers=LAYERS, data="words", context=16, keep_bos=False, lm_batch_size=7,
                      attention=[str(w) for w in wanted])
        for b in range(3):
            assert store.path("train", of_all | dict(plan=stream.plan[:b + 1]) | marks).exists()
