"""Boards against loops over all activations: what fires, contexts, histograms, φ, what is chosen."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evals
from evals import Setup, dashboards
from evals.cache import Cache
from evals.dashboards import Asked, Beside, chosen, passages, sweeps
from evals.model import language_model
from runs import features
from tests import small_run
from tests.evals.test_core import VOCABULARY, FakeLM, Signed, TopK, texts, trained

R, T = 64, 32  # of kind tiny


@pytest.fixture(autouse=True)
def no_passages(monkeypatch):
    """The built-in passages are read by a tokenizer of words, which the stand-in has not."""
    monkeypatch.setattr(passages, "heard", lambda *about: [])


class Words:
    """Token 12 is the word "12"."""

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return [" ".join(map(str, row)) for row in rows]


class LM(FakeLM):
    reads_text, dtype = True, torch.float32

    def __init__(self):
        super().__init__()
        self.tokenizer = Words()


def setup_of(folder, lm=None, n_texts=400, limit_gb=1.0, most_gb=math.inf, **more):
    return Setup(lm or LM(), 0, "blocks.0.hook_resid_post", {}, lambda: texts(n_texts), str(n_texts),
                 Cache(folder, limit_gb, most_gb), SimpleNamespace(kind="tiny"), 0, print, **more)


def one_board(setup, sae, asked=None):
    return dashboards.boards({"layer_0": (setup, sae)}, {"layer_0": asked or Asked()}, print)["layer_0"]


def short(value):
    return float(f"{value:.4g}")


def by_hand(setup, sae):
    """(rows of tokens, {(row, place): {feature: activation}} where features are looked at), from the texts on."""
    rows, row = [], [0]
    for text in setup.texts():
        for token in [0, *map(int, text.split())] if len(row) > 1 else map(int, text.split()):
            row.append(token)
            if len(row) == T:
                rows.append(row)
                row = [0]
    rows, acts = rows[:R], {}
    for r, tokens in enumerate(rows):
        x_TD = LM().residual(torch.tensor([tokens]), 0)[0]
        z_TF = sae.encode(x_TD).tolist()
        for t, token in enumerate(tokens):
            if token > 1 and (setup.max_norm is None or float(x_TD[t].norm()) <= setup.max_norm):
                acts[r, t] = {f: z for f, z in enumerate(z_TF[t]) if z}
    return rows, acts


@pytest.mark.parametrize("SAE, max_norm", [(TopK, None), (Signed, 12.0)])
def test_a_board_is_what_loops_find(tmp_path, SAE, max_norm):
    """Fails if a figure of a board, or a context, is not that of all activations, one after the other."""
    setup, sae = setup_of(tmp_path, max_norm=max_norm), trained(SAE)
    board, (rows, acts) = one_board(setup, sae), by_hand(setup, sae)
    F, N = 24, len(acts)
    assert board["text"] == {"dataset": "", "tokens": N, "rows": R, "context": T}
    assert board["either_sign"] == (SAE is Signed)
    if max_norm:
        assert 0.3 * R * T < N < 0.8 * R * T
    fired = [[at for at in acts if f in acts[at]] for f in range(F)]
    values = [[acts[at][f] for at in fired[f]] for f in range(F)]
    largest = [max(v, key=abs, default=0.0) for v in values]
    assert board["list"]["density"] == [float(f"{len(at) / N:.8g}") for at in fired]
    assert board["list"]["max"] == pytest.approx(largest, rel=1e-3)
    peaks = [max(at, key=lambda place, f=f: abs(acts[place][f]), default=None) for f, at in enumerate(fired)]
    tokens = [board["vocab"][number] if number >= 0 else None for number in board["list"]["peak"]]
    assert tokens == [at and str(rows[at[0]][at[1]]) for at in peaks]
    l0 = board["health"]["l0"]
    assert sum(l0["counts"]) == N
    for low, high, count in zip(l0["edges"], l0["edges"][1:], l0["counts"]):
        assert count == sum(low <= len(active) < high for active in acts.values())
    W_FD = sae.W_dec.double().numpy()
    cosine = np.abs(W_FD @ W_FD.T) if SAE is Signed else W_FD @ W_FD.T
    np.fill_diagonal(cosine, -1)
    assert board["list"]["own_nearest"] == cosine.argmax(1).tolist()
    assert board["list"]["own_cosine"] == pytest.approx(cosine.max(1), rel=1e-3)

    assert set(board["features"]) == {str(f) for f in range(F) if fired[f]}  # fewer than are chosen of an SAE
    firing = np.array([[f in acts[at] for at in acts] for f in range(F)], dtype=float)
    logits = (sae.W_dec @ LM().U_DV).tolist()
    for f, dashboard in ((int(name), dashboard) for name, dashboard in board["features"].items()):
        low, high = min(0, *values[f]), max(0, *values[f])
        assert dashboard["histogram"]["counts"] == np.histogram(values[f], 50, (low, high))[0].tolist()
        assert dashboard["histogram"]["edges"][0] == short(low) and dashboard["histogram"]["edges"][-1] == short(high)
        phi = {g: np.corrcoef(firing[f], firing[g])[0, 1] for g in range(F)
               if g != f and 0 < firing[g].sum() < N and firing[f].sum() < N}
        expected = sorted((p for p in phi.values() if p > 0), reverse=True)[:5]
        assert [p for _, p in dashboard["cofiring"]] == pytest.approx(expected, rel=1e-3)
        assert all(phi[g] == pytest.approx(p, rel=1e-3) for g, p in dashboard["cofiring"])
        in_order = sorted(range(VOCABULARY), key=lambda i: logits[f][i])
        assert [token for token, _ in dashboard["logits"]["top"]] == [str(i) for i in in_order[:-11:-1]]
        assert [token for token, _ in dashboard["logits"]["bottom"]] == [str(i) for i in in_order[:10]]
        assert sum(dashboard["logits"]["counts"]) == VOCABULARY
        check_contexts(board, dashboard, rows, acts, f, fired[f], largest[f])


def check_contexts(board, dashboard, rows, acts, f, fired, largest):
    groups = {group["name"]: group for group in dashboard["groups"]}

    def stands_at(context, t):
        r, low, high = context["row"], max(1, t - 10), min(T, t + 11)
        found = {i - low: short(acts[r, i][f]) for i in range(low, high) if f in acts.get((r, i), {})}
        return (context["peak"] == t - low and context["cut"] == [low > 1, high < T]
                and [int(board["vocab"][i]) for i in context["tokens"]] == rows[r][low:high]
                and dict(map(tuple, context["values"])) == pytest.approx(found, rel=1e-3))

    for group in groups.values():
        for context in group["contexts"]:
            assert any(stands_at(context, t) for r, t in fired if r == context["row"])
    best = {}
    for r, t in sorted(fired, key=lambda at: -abs(acts[at][f])):
        best.setdefault(r, (r, t))
    more = [at for at in sorted(fired, key=lambda at: -abs(acts[at][f])) if at not in best.values()]
    expected = sorted((list(best.values()) + more)[:20] if len(best) < 20 else list(best.values())[:20],
                      key=lambda at: -abs(acts[at][f]))
    shown = [dict(map(tuple, c["values"]))[c["peak"]] for c in groups["top"]["contexts"]]
    assert shown == pytest.approx([acts[at][f] for at in expected], rel=1e-3)
    assert [groups["top"]["from"], groups["top"]["to"]] == [abs(shown[-1]), abs(shown[0])]
    for number in range(1, 11):
        within = [at for at in fired if number - 1 < abs(acts[at][f]) / abs(largest) * 10 <= number]
        group = groups.get(f"interval {number}", {"contexts": []})
        assert len(group["contexts"]) == min(5, len(within))
        if within:
            ends = [short(abs(largest) * end / 10) for end in (number - 1, number)]
            assert [group["from"], group["to"]] == pytest.approx(ends)
            for context in group["contexts"]:
                value = dict(map(tuple, context["values"]))[context["peak"]]
                assert ends[0] * 0.999 <= abs(value) <= ends[1] * 1.001


def test_of_an_interval_any_place_is_drawn():
    """Fails if contexts of an interval are its first, or its strongest, or the same places for all features."""
    R_all, per_row, C = 50, 20, 30
    look = sweeps.Look.nothing(list(range(C)), sweeps.Seen.nothing(C), "cpu")
    look.high_C = torch.ones(C)
    look.together_CF = None
    x_rTD = torch.linspace(0.05, 0.95, R_all * per_row)[:, None].expand(-1, C).reshape(R_all, per_row, C)
    sae = SimpleNamespace(encode=lambda x: x.clone(), W_dec=torch.eye(C))
    setup = SimpleNamespace(lm=SimpleNamespace(device="cpu"), fits={}, config={}, seed=0)
    parts = [sweeps.Part(first, x_rTD[first:first + 7], torch.ones(len(x_rTD[first:first + 7]), per_row, dtype=bool))
             for first in range(0, R_all, 7)]
    text = SimpleNamespace(setup=setup, tokens_RT=torch.zeros(R_all, per_row), parts=lambda: iter(parts))
    sweeps.second(text, {"": look}, {"": sae})
    in_fifth = look.drawn.at(sweeps.interval(look, look.drawn) == 5)
    assert in_fifth.c_E.bincount().tolist() == [5 for _ in range(C)]
    rank_E = (in_fifth.value_E - 0.4) / 0.1
    assert abs(float(rank_E.mean()) - 0.5) < 0.1 and float(rank_E.std()) == pytest.approx(12**-0.5, abs=0.05)
    assert len({tuple(in_fifth.place_E[in_fifth.c_E == c].tolist()) for c in range(C)}) > 0.9 * C


def test_a_peak_is_the_first_of_equal_ones(monkeypatch):
    """Fails if the place of the largest magnitude is that of a later equal one, or misses a sign, a part or a row."""
    R_all, per_row, F = 23, 9, 40
    monkeypatch.setitem(sweeps.AT_ONCE, "cpu", 2 * per_row * F)
    x_RTF = torch.randint(-3, 4, (R_all, per_row, F), generator=torch.Generator().manual_seed(0)).float()
    x_RTF[..., 0], x_RTF[..., 1], x_RTF[..., 2] = 0.0, math.nan, -x_RTF[..., 3]
    x_RTF[20, 3, 4] = -9.0
    body_RT = torch.arange(R_all * per_row).view(R_all, per_row) % 5 > 0
    sae = SimpleNamespace(encode=torch.clone, decode=torch.clone, W_dec=torch.eye(F))
    setup = SimpleNamespace(lm=SimpleNamespace(device="cpu"), fits={}, config={}, seed=0)
    parts = [sweeps.Part(first, x_RTF[first:first + 7], body_RT[first:first + 7]) for first in range(0, R_all, 7)]
    text = SimpleNamespace(setup=setup, plain_RT=body_RT, parts=lambda: iter(parts))
    expected = []
    for f in range(F):
        best, largest = -1, 0.0
        for place, value in enumerate((x_RTF[..., f] * body_RT).flatten().tolist()):
            if abs(value) > largest:
                best, largest = place, abs(value)
        expected.append(best)
    assert sweeps.first(text, {"": sae})[""].place_F.tolist() == expected
    assert expected[:2] == [-1, -1] and expected[2] == expected[3] and expected[4] == 20 * per_row + 3


def turned(sae):
    """Its mirror image: all of its features fire with negative values alone."""
    return SimpleNamespace(encode=lambda x: -sae.encode(x), decode=lambda z: sae.decode(-z), W_dec=-sae.W_dec,
                           W_enc=None)


def test_a_turned_sae_is_the_same_below_0(tmp_path):
    """Fails if activations below 0 are left out, or ranked by sign."""
    sae = trained(TopK)
    board, other = one_board(setup_of(tmp_path), sae), one_board(setup_of(tmp_path), turned(sae))
    assert other["either_sign"] and other["list"]["max"] == [-value for value in board["list"]["max"]]
    assert other["health"] == board["health"] and list(other["features"]) == list(board["features"])
    for mirrored, dashboard in zip(other["features"].values(), board["features"].values()):
        assert mirrored["histogram"]["counts"] == dashboard["histogram"]["counts"][::-1]
        assert mirrored["histogram"]["edges"] == [-edge for edge in dashboard["histogram"]["edges"][::-1]]
        assert mirrored["logits"]["top"] == [[token, -value] for token, value in dashboard["logits"]["bottom"]]
        for group, theirs in zip(mirrored["groups"], dashboard["groups"], strict=True):
            assert [group["from"], group["to"]] == [theirs["from"], theirs["to"]]
            for context in group["contexts"]:
                context["values"] = [[place, -value] for place, value in context["values"]]
            assert group["contexts"] == theirs["contexts"]


def test_each_need_is_met():
    """Fails if a kind takes others than it says, a small share starves an SAE, or the first ones are of one kind."""
    F = 1000
    fired_F = torch.tensor([0, 1, *range(2, F)])  # 0 is silent
    cosine = [0.9 for _ in range(F)]
    for rank, feature in enumerate((500, 1, 0, 600)):
        cosine[feature] = 0.1 + rank / 10
    asked = Asked(classes={"a": [700, 701, 0], "b": [700, 710]}, letters={"s": [800, 801], "t": [0]},
                  explanations={900: ("words", 0.5), 0: ("nothing", 0.1)},
                  baseline=Beside("", "", None, [0 for _ in range(F)], cosine,
                                  new=[0, *range(1, F, 2), 500, 600, 50]))
    why = chosen.choose(asked, fired_F, 0, "layer_0", 1)
    of = {kind: [f for f, kinds in why.items() if kind in kinds] for kind in (*chosen.MOST, "explained")}
    assert set(of["densest"]) == set(range(940, 1000)) and set(of["rarest"]) == set(range(2, 42))
    assert {500, 1, 600} < set(of["new"]) and len(of["new"]) == 60 and len(of["random"]) == 80
    assert all(f % 2 or f in (500, 600, 50) for f in of["new"])
    few = dataclasses.replace(asked, baseline=dataclasses.replace(asked.baseline, new=[2, 600]))
    assert sum("new" in kinds for kinds in chosen.choose(few, fired_F, 0, "layer_0", 1).values()) == 2
    assert set(of["best probe"]) == {700, 701, 710} and set(of["absorbed letter"]) == {800, 801}
    assert of["explained"] == [900] and 0 not in why
    assert {999, 2, 700, 500, 800, 900} <= set(list(why)[:7])
    assert list(why) == list(chosen.choose(asked, fired_F, 0, "layer_0", 1))
    assert of["random"] != [f for f, kinds in chosen.choose(asked, fired_F, 1, "layer_0", 1).items()
                            if "random" in kinds]
    assert 40 <= len(chosen.choose(Asked(), fired_F, 0, "layer_0", 50)) < 60
    assert list(chosen.choose(Asked(), torch.tensor([0, 3, 0]), 0, "layer_0", 50)) == [1]


def test_one_pass_serves_all_saes(tmp_path, monkeypatch):
    """Fails if the model passes once for each SAE, a second board needs it again, or what lies in the cache decides."""
    lm, heard = LM(), []
    monkeypatch.setattr(passages, "heard", lambda *about: heard.append(about) or [])
    saes = {"a": trained(TopK), "b": trained(TopK, 1), "c": trained(Signed)}
    setup = setup_of(tmp_path, lm)
    found = dashboards.boards({name: (setup, sae) for name, sae in saes.items()}, {}, print)
    assert list(found) == ["a", "b", "c"] and lm.prefix_tokens == R * T and len(heard) == 1
    again = dashboards.boards({"b": (setup_of(tmp_path, lm), saes["b"])}, {}, print)
    assert lm.prefix_tokens == R * T and set(again["b"]["features"]) >= set(found["b"]["features"])
    assert again["b"]["list"] == found["b"]["list"]
    poor, lm = LM(), LM()
    of_poor = one_board(setup_of(tmp_path / "no_room", poor, limit_gb=0.0, most_gb=0.0), saes["a"])
    of_rich = one_board(setup_of(tmp_path / "room", lm), saes["a"])
    assert poor.prefix_tokens == 2 * R * T == 2 * lm.prefix_tokens
    assert json.dumps(of_poor) == json.dumps(of_rich)
    lm.dtype, lm.d_final = torch.bfloat16, 0  # in another arithmetic it gives other residuals
    one_board(setup_of(tmp_path / "room", lm), saes["a"])
    assert lm.prefix_tokens == 2 * R * T


def test_the_rows_of_core_do_not_pass_again(tmp_path, monkeypatch):
    """Fails if the model passes rows that core has kept, a board depends on that, or other rows are taken for them."""
    core = evals.load("core")
    monkeypatch.setitem(dashboards.text.PART, "cpu", 8 * T)
    config = core.CONFIG["tiny"] | {"n_eval_sparsity_variance_batches": 18}  # 36 rows: four whole parts, and some
    monkeypatch.setitem(core.CONFIG, "tiny", config)
    sae, lm = trained(TopK), LM()
    alone = one_board(setup_of(tmp_path / "alone"), sae)
    setup = setup_of(tmp_path / "core", lm)
    core.run(dataclasses.replace(setup, config=config), {"a": sae})
    passed = lm.prefix_tokens
    assert json.dumps(one_board(setup, sae)) == json.dumps(alone)
    assert lm.prefix_tokens == passed + (R - 32) * T
    for damaged in (tmp_path / "core").glob("core-*"):
        damaged.write_bytes(b"no entry")
    again = setup_of(tmp_path / "core", LM())
    assert json.dumps(one_board(again, sae)) == json.dumps(alone)
    monkeypatch.setitem(core.CONFIG, "tiny", config | {"context_size": T // 2})
    shorter = setup_of(tmp_path / "shorter")
    core.run(dataclasses.replace(shorter, config=core.CONFIG["tiny"]), {"a": sae})
    assert json.dumps(one_board(shorter, sae)) == json.dumps(alone)


def test_a_broken_sae_costs_no_other_its_board(tmp_path, capsys):
    """Fails if NaN in a decoder, code that ends or a board that is no JSON leaves other SAEs without boards."""
    def ends(x):
        raise RuntimeError("boom\nadvice")

    setup, sae, broken = setup_of(tmp_path), trained(TopK), trained(TopK)
    broken.sae.W_dec.data[5, 2] = math.nan
    nan, other = SimpleNamespace(encode=ends, decode=sae.decode, W_dec=sae.W_dec, W_enc=None), trained(Signed)
    found = dashboards.boards({"a": (setup, broken), "b": (setup, nan), "c": (setup, other)}, {}, print)
    assert list(found) == ["a", "c"]
    assert capsys.readouterr().out == "report: no feature dashboards of b: RuntimeError: boom\n"
    json.dumps(found, allow_nan=False)
    cosine = sae.W_dec.double().numpy() @ sae.W_dec.double().numpy().T
    np.fill_diagonal(cosine, -1)
    cosine[5], cosine[:, 5] = 0, 0
    kept = [f for f in range(24) if f != 5]
    assert [found["a"]["list"]["own_nearest"][f] for f in kept] == cosine[kept].argmax(1).tolist()
    assert found["a"]["list"]["own_cosine"] == pytest.approx(cosine.max(1), rel=1e-3)

    found["a"]["list"]["max"][0] = math.inf
    made = [file.name for board in found.values() for file in features._written(tmp_path, board, print)]
    assert made == ["c.json.gz"] and features.kept(tmp_path) == ["c"]
    assert "report: no feature dashboards of a: ValueError: " in capsys.readouterr().out


def test_the_nearest_of_list_and_dashboard_are_one(monkeypatch):
    """Fails if a dashboard takes the opposite direction for another where the list does not."""
    monkeypatch.setattr(features.stability, "folder_of", lambda run: None)
    monkeypatch.setattr(features.stability, "decoder", lambda folder: None)
    for ours, theirs in ((False, False), (True, False), (False, True)):
        run, other = (SimpleNamespace(name="", path="", section="", means={}, config={"either_sign": either})
                      for either in (ours, theirs))
        new = SimpleNamespace(baseline=other, nearest=[0, 0], cosine=[0.5, 0.9], index=[1], of=1,
                              fire=True)
        one = SimpleNamespace(run=run, new=lambda new=new: new)
        monkeypatch.setattr(features.stability, "firing", lambda run: [False, True])
        beside = features._baseline(one, {("", ""): (None, "none")}, "cpu")
        assert beside.absolute == (ours or theirs)
        assert (beside.new, beside.counted, beside.threshold) == ([1], [1], 0.7)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_baseline_stands_beside(tmp_path, absolute):
    """Fails if a feature's nearest ones of the baseline are others, or lack their contexts of the same text."""
    sae, other = trained(TopK), trained(TopK, 1)
    cosine_FG = (sae.W_dec @ other.W_dec.T).double()
    if absolute:
        cosine_FG = cosine_FG.abs()
    nearest = cosine_FG.argmax(1).tolist()
    beside = Beside("standard", "topk", 5.0, nearest, cosine_FG.amax(1).tolist(), other.W_dec, other,
                    absolute=absolute, new=[3, 7], counted=list(range(20)), threshold=0.7)
    board = one_board(setup_of(tmp_path), sae, Asked(baseline=beside))
    alone = one_board(setup_of(tmp_path), other)
    assert board["list"]["nearest"] == nearest
    assert board["list"]["new"] == [int(f in (3, 7)) for f in range(20)] + 4 * [None]
    assert board["baseline"]["new"] == {"count": 2, "of": 20, "threshold": 0.7}
    assert alone["list"]["new"] is None and alone["baseline"] is None
    assert set(board["baseline"]["features"]) == {str(nearest[int(f)]) for f in board["features"]}
    for f, dashboard in board["features"].items():
        expected = sorted(range(24), key=lambda g: -cosine_FG[int(f), g])[:3]
        assert [g for g, _ in dashboard["theirs"]] == expected
        theirs = board["baseline"]["features"][str(nearest[int(f)])]
        assert theirs["density"] == alone["list"]["density"][nearest[int(f)]] and theirs["why"] == []
        if theirs["density"]:
            assert [group["name"] for group in theirs["groups"]] == ["top"]
            own = alone["features"][str(nearest[int(f)])]
            assert theirs["histogram"] == own["histogram"] and theirs["logits"] == own["logits"]
            spelled = [[[b["vocab"][i] for i in c["tokens"]], c["values"]] for b, d in ((board, theirs), (alone, own))
                       for c in d["groups"][0]["contexts"][:10]]
            assert spelled[:len(spelled) // 2] == spelled[len(spelled) // 2:]


def test_too_little_text(tmp_path, capsys):
    """Fails if less text than wanted makes no board, or none at all an error."""
    board = one_board(setup_of(tmp_path, n_texts=40), trained(TopK))
    assert 3 < board["text"]["rows"] < R and board["features"]
    asked = {"layer_0": (setup_of(tmp_path, n_texts=2), trained(TopK))}
    assert dashboards.boards(asked, {}, print) == {}
    assert "report: no feature dashboards: the texts hold fewer than the 32 tokens" in capsys.readouterr().out


def test_a_density_gives_the_number_of_tokens():
    """Fails if so few digits of it are kept that the number of tokens on which a feature fires is another."""
    for tokens in (32_326, 8192 * 127):
        for fired in (1, 8_847, 20_011, tokens - 1):
            assert round(dashboards.rounded(fired / tokens, dashboards.DIGITS["density"]) * tokens) == fired


def test_a_model_without_text_or_head(tmp_path):
    """Fails if samples without a text get contexts, or a head for other widths logits."""
    setup = setup_of(tmp_path)
    setup.lm.d_final = 11
    assert all(dashboard["logits"] is None for dashboard in one_board(setup, trained(TopK))["features"].values())
    setup.lm.reads_text = False
    board = one_board(setup, trained(TopK))
    assert board["text"] is None and not board["features"] and not board["vocab"]
    assert sum(board["list"]["density"]) > 1 and board["health"]["norms"] and language_model.LanguageModel.reads_text


def test_a_run_keeps_its_boards(reference):
    """Fails if a run's board lacks what its evals chose, or is not the JSON that it was."""
    board = features.read(reference, "layer_2")
    assert features.kept(reference) == ["layer_2"] and board["sae"] == "layer_2" and board["variant"] == "topk"
    probes = json.loads(next((reference / "eval_results/sparse_probing").glob("*.json")).read_text())
    chose = probes["eval_result_unstructured"]["synthetic_results"]["sae_features_fixed_draw"]
    assert chose
    for name, selected in chose.items():
        shown = [int(f) for f, d in board["features"].items() if f"synthetic: {name}" in d["classes"]]
        assert set(shown) == {f for f in selected[:5] if board["list"]["density"][f]}
    assert any("best probe" in d["why"] for d in board["features"].values())


@pytest.mark.slow
def test_a_run_outlives_its_boards(cache, tmp_path, monkeypatch, capsys):
    """Fails if what goes wrong with dashboards costs a run, or leaves those of an earlier training."""
    def broken(*about):
        raise RuntimeError("boom\nadvice")

    monkeypatch.setattr(dashboards, "boards", broken)
    import experiment

    out = tmp_path / "run"
    assert experiment.main(small_run.command(out, cache, "--evals=none")) == 0
    assert "report: no feature dashboards: RuntimeError: boom\n" in capsys.readouterr().out
    assert (out / "report.html").exists() and features.kept(out) == []
    features.write(out, {"sae": "layer_2"})
    features.make(out, {}, [], print)
    assert features.kept(out) == []
