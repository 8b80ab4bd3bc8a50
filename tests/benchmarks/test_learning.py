"""The learning study runs, goes on where it was, and its report says what the runs say."""

import json

import pytest
import torch

from benchmarks import learning


def test_a_fixed_grouping_is_the_one_asked_for():
    learnt = [[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 0]]
    widths = (4, 4, 4)
    assert learning.fixed("all shared", widths, [], 0) == [[0] * 4] * 3
    assert learning.fixed("all split", widths, [], 0) == [[1, 1, 2, 2]] * 3
    assert learning.fixed("learnt", widths, learnt, 0) == learnt
    within = learning.fixed("shuffled within layers", widths, learnt, 3)
    assert [sorted(groups) for groups in within] == [sorted(groups) for groups in learnt]
    for seed in range(6):
        among = learning.fixed("shuffled among layers", widths, learnt, seed)
        assert sorted(among) == sorted(learnt)
        assert all(a != b for a, b in zip(among, learnt, strict=True))


@pytest.mark.parametrize("kind", learning.TEACHERS)
def test_teachers_are_alike_different_or_look_elsewhere(kind):
    data = learning.Data(learning.Problem(kind), 0)
    x, y = data.batch()
    assert torch.equal(y[:, 0], y[:, 1]) == (kind == "identical")
    x[:, 1] = 0  # the second channel
    changed = torch.cat([data.teachers[0](x[:, :1]), data.teachers[1](x[:, data.second : data.second + 1])], 1)
    changed = (changed - data.mean) / data.deviation
    assert torch.allclose(changed[:, 1], y[:, 1], atol=1e-5) == (kind != "disjoint")


def test_all_groupings_up_to_the_order_of_kernels():
    assert len(learning.GROUPINGS) == 10


def test_runs_are_not_repeated_and_reported(tmp_path, monkeypatch):
    calls = []

    def train(problem, seed, *estimator, grouping=None, learnt=99):
        """As if the loss were the number of kernels that are not shared."""
        calls.append(seed)
        grouping = grouping or [[0, 1, 2] * (1 if learnt == 1 else 4)] * (1 if learnt == 1 else 3)
        loss = sum(group > 0 for groups in grouping for group in groups) + 1e-3 * (seed % 3)
        return {"loss": loss, "p": [[0.5, 0.25, 0.25]] * 3, "grouping": grouping}

    monkeypatch.setattr(learning, "train", train)
    for _ in range(2):
        for what in ("teachers", "exhaustive"):
            runs = learning.Runs(tmp_path / f"{what}.jsonl")
            for _ in getattr(learning, what)(runs, 2, 1):
                pass
    expected = 3 * 2 * (2 + 6 * 4) + 6 * (10 * 3 + 6 * 2)
    assert len(calls) == expected
    monkeypatch.setattr("sys.argv", ["learning", "report", str(tmp_path), str(tmp_path / "learning.md")])
    learning.main()
    text = (tmp_path / "learning.md").read_text()
    assert "| identical | (all shared) | | | | 0.001 (0.001) | | |" in text
    assert "(0, 0, 0) | 0.67 (0.00), 0/2" in text  # two of three kernels apart: regret 2/3
    assert "0/12 = 0%" in text
    assert (tmp_path / "learning.png").stat().st_size > 10000
    assert len(json.loads((tmp_path / "teachers.jsonl").read_text().splitlines()[0])["key"]) == 3


def test_it_learns():
    """A few steps of the real thing: p moves, the loss falls."""
    problem = learning.Problem("different", (4, 4), steps=60)
    first = learning.train(problem._replace(steps=1), 0, "straight_through")
    found = learning.train(problem, 0, "straight_through")
    assert found["loss"] < first["loss"] < 3
    assert max(abs(value - 1 / 3) for layer in found["p"] for value in layer) > 0.02
