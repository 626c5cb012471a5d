"""Stream statistics against the same figures computed at once, in numpy, from all vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dartprune.evaluation.study.measures import TOKEN_MEASURES, WINDOW_MEASURES, Trajectory, against, top_dimensions

H, TOP, WINDOW, BEFORE, STEPS, PROMPT = 40, 5, 4, 8, 20, 7


def naive(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    top = [set(np.argsort(-np.abs(v))[:TOP]) for v in (a, b)]
    return [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        np.linalg.norm(a - b),
        np.linalg.norm(a) / np.linalg.norm(b),
        len(top[0] & top[1]) / TOP,
    ]


def test_against_a_loop():
    a, b = torch.randn(3, 2, H), torch.randn(3, 2, H)
    got = against(a, b, TOP)
    for i in range(3):
        for j in range(2):
            assert got[i, j].tolist() == pytest.approx(naive(a[i, j].numpy(), b[i, j].numpy()), rel=1e-5)


def test_a_trajectory_against_all_vectors_at_once():
    points, lines = 2, 3
    prompt = torch.randn(points, lines, PROMPT, H)
    own = torch.randn(points, lines, STEPS, H) + 0.5
    dense = own + 0.3 * torch.randn(points, lines, STEPS, H)
    path = Trajectory(WINDOW, BEFORE, TOP)
    padding = torch.full((points, lines, 2, H), torch.nan)
    real = torch.ones(lines, PROMPT + 2, dtype=torch.bool)
    real[:, :2] = False
    path.begin(torch.cat((padding, prompt), dim=2), real)
    tokens, windows = [], []
    for t in range(STEPS):
        token, window = path.step(own[:, :, t], dense[:, :, t])
        tokens.append(token)
        assert (window is not None) == ((t + 1) % WINDOW == 0)
        windows += [window] if window is not None else []
    assert len(TOKEN_MEASURES) == tokens[0].shape[-1] and len(WINDOW_MEASURES) == windows[0].shape[-1]
    for p in range(points):
        for b in range(lines):
            # the first token of a text is no part of the centroid
            first = np.concatenate((prompt[p, b, 1:].numpy(), own[p, b, :BEFORE].numpy()))
            mine, theirs = own[p, b].numpy(), dense[p, b].numpy()
            for t in range(STEPS):
                centroid = first[: PROMPT - 1 + min(t, BEFORE)].mean(0)
                expected = naive(mine[t], centroid) + naive(mine[t], theirs[t])
                assert tokens[t][p, b].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            means = mine.reshape(-1, WINDOW, H).mean(1)
            for w in range(STEPS // WINDOW):
                centroid = first[: PROMPT - 1 + min(w * WINDOW, BEFORE)].mean(0)
                other = theirs[w * WINDOW : (w + 1) * WINDOW].mean(0)
                got = windows[w][p, b].tolist()
                assert got[:8] == pytest.approx(naive(means[w], centroid) + naive(means[w], other), rel=1e-4, abs=1e-5)
                if w:
                    assert got[8] == pytest.approx(naive(means[w], means[w - 1])[0], rel=1e-4)
                else:
                    assert np.isnan(got[8])


def test_the_state_does_not_grow():
    path = Trajectory(WINDOW, BEFORE, TOP)
    path.begin(torch.randn(1, 2, PROMPT, H), torch.ones(2, PROMPT, dtype=torch.bool))
    held = []
    for _ in range(10 * WINDOW):
        path.step(torch.randn(1, 2, H), torch.randn(1, 2, H))
        held.append(path.bytes_held())
    assert len(set(held[WINDOW:])) == 1


def test_few_dimensions_have_a_smaller_top():
    assert top_dimensions(4096, 100) == 100 and top_dimensions(192, 100) == 24 and top_dimensions(4, 100) == 1
