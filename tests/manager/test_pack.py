"""The packing score: as it is defined, whatever the caches do; what it learns; and the replay of a trace."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_manager.scheduler import pack
from casemate_manager.scheduler.bins import Bins
from casemate_manager.scheduler.mix import GPU_COUNT_EXPONENT, Mix, Shape, Weights
from casemate_manager.scheduler.pack import PackScore
from casemate_manager.scheduler.value import remainder_values, size_prices
from casemate_manager.simulation.cli import NODES_NAME, PODS_NAME, simulate
from casemate_manager.simulation.openb import TraceUnreadable, read_nodes, read_pods
from casemate_manager.simulation.replay import STRATEGIES, arrivals, feasible, replay
from casemate_manager.simulation.whole import WholeScheduler

DATA = Path(__file__).parent / "data"
NODES, PODS = DATA / "openb_nodes.csv.gz", DATA / "openb_pods.csv.gz"

SHAPES = [
    Shape((4000, 8000)),
    Shape((2000, 4000), 1, 320),
    Shape((2000, 4000), 1, 470),
    Shape((6000, 9000), 1, 810),
    Shape((8000, 30000), 1, 1000),
    Shape((8000, 16000), 1, 1000, 0b10),
    Shape((20000, 60000), 2, 1000),
    Shape((40000, 100000), 4, 1000),
    Shape((3000, 3000), 2, 300),
]


def small_bins(seed: int, count: int = 12) -> Bins:
    rng = np.random.default_rng(seed)
    gpus = rng.choice([0, 1, 2, 4], count)
    gpu = np.where(np.arange(4)[:, None] < gpus, 1000, 0)
    free = np.stack([rng.choice([8000, 32000, 96000], count), rng.choice([16000, 128000, 400000], count)])
    return Bins(free, gpu, rng.integers(0, 3, count))


class RecordingMix(Mix):
    """A mix that remembers the counts that the weights in use were made of."""

    frozen: Counter[Shape]

    def freeze(self, dimensions: int, gpus_per_bin: int) -> Weights:
        self.frozen = Counter(self._counts)
        return super().freeze(dimensions, gpus_per_bin)


def badness(score: PackScore, mix: RecordingMix, free: list[int], gpu: list[int], model: int) -> float:
    """The definition, term by term, as the module's docstring states it."""
    weights, total, whole = score._weights, sum(gpu), gpu.count(1000)
    shapes = mix.frozen.items()
    scale = sum(n * (s.gpu_milli / 1000) ** GPU_COUNT_EXPONENT for s, n in shapes) or 1.0
    bad = 0.0
    for shape, n in shapes:
        runs = all(need <= have for need, have in zip(shape.need, free, strict=True))
        runs = runs and (shape.models == 0 or bool(shape.models >> model & 1))
        if shape.share_milli < 1000 or shape.gpus == 1:
            used = sum(g for g in gpu if g >= shape.share_milli)
        else:
            used = 1000 * whole if whole >= shape.gpus else 0
        weight = n * (shape.gpu_milli / 1000) ** GPU_COUNT_EXPONENT / scale
        bad += pack.FRAGMENT * weight * (total - (used if runs else 0))
    for per_unit in weights.beside[0]:
        if per_unit:
            bad += pack.BESIDE * max(0.0, total - free[0] * per_unit)
    return bad - sum(float(weights.value[g]) for g in gpu)


def expected_rise(score: PackScore, mix: RecordingMix, bins: Bins, at: int, shape: Shape) -> float:
    free, gpu, model = bins.free[:, at].tolist(), bins.gpu[:, at].tolist(), int(bins.model[at])
    after = [have - need for have, need in zip(free, shape.need, strict=True)]
    if not feasible(bins, shape)[at]:
        return float("inf")
    before = badness(score, mix, free, gpu, model)
    if shape.gpus == 0:
        ways = [gpu]
    elif shape.share_milli == 1000:
        left = gpu.copy()
        for _ in range(shape.gpus):
            left[left.index(1000)] = 0
        ways = [left]
    else:
        ways = [
            [g - shape.share_milli * (k == j) for k, g in enumerate(gpu)]
            for j, g in enumerate(gpu)
            if g >= shape.share_milli
        ]
    best = min(badness(score, mix, after, way, model) for way in ways) - before
    return best + (float(score._scarcity[model]) * shape.gpu_milli if shape.gpus else 0.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_score_is_its_definition_after_any_changes(seed: int) -> None:
    """What the caches say after takes and gives is what the terms say, one by one."""
    rng = np.random.default_rng(seed)
    bins, mix = small_bins(seed), RecordingMix()
    score = PackScore(bins, mix, beside=(0,))
    held: list[tuple[int, Shape, tuple[int, ...]]] = []
    for step in range(120):
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        score.note(shape)
        if held and rng.random() < 0.3:
            bins.give(*held.pop(int(rng.integers(len(held)))))
        found = score.best(shape)
        assert (found is None) == (not feasible(bins, shape).any())
        if step % 10 == 0 and not (shape.gpus > 1 and shape.share_milli < 1000):
            rises = score.rises(shape)
            assert [round(float(x), 3) for x in rises] == [
                round(expected_rise(score, mix, bins, at, shape), 3) for at in range(len(rises))
            ]
        if found is not None:
            at, slots = found
            assert len(set(slots)) == shape.gpus
            bins.take(at, shape, slots)
            held.append((at, shape, slots))
            assert bins.free.min() >= 0 and bins.gpu.min() >= 0
    assert (bins.total == bins.gpu.sum(axis=0)).all() and (bins.whole == (bins.gpu == 1000).sum(axis=0)).all()


def test_remainders_are_worth_what_they_can_take() -> None:
    values = remainder_values({250: 100, 1000: 100})
    assert values[249] == 0 and values[250] > 0 and values[1000] == 1000 and values[0] == 0
    assert values[500] == pytest.approx(2 * values[250]) and values[750] == pytest.approx(3 * values[250])


def test_gaps_that_nobody_fills_are_worth_nothing() -> None:
    """Beside 810 lies 190, and far fewer ask for 150 than there are such gaps."""
    prices = size_prices({810: 1000, 150: 10, 1000: 1000})
    assert prices[150] == pytest.approx(0, abs=1) and prices[810] == pytest.approx(1000, rel=0.01)


@given(st.dictionaries(st.integers(10, 1000), st.floats(0.1, 1000), max_size=12))
@settings(max_examples=60, deadline=None)
def test_values_never_fall_and_never_exceed_a_gpu(demand: dict[int, float]) -> None:
    values = remainder_values(demand)
    assert values.shape == (1001,) and values[0] == 0 and values[1000] == 1000
    assert (np.diff(values) >= -1e-9).all() and values.max() <= 1000 + 1e-6


def test_a_mix_learns_from_arrivals_alone_and_keeps_old_shapes() -> None:
    mix = Mix()
    for _ in range(60):
        mix.note(Shape((1000, 2000), 1, 500))
    assert mix.due()
    weights = mix.freeze(3, 4)  # a dimension has come since
    assert weights.need.shape == (3, 1) and weights.need[2, 0] == 0 and not mix.due()
    assert weights.class_of[499] == 0 and weights.class_of[500] == 1


def excerpt(strategy: str, seed: int) -> tuple[list[Shape], Bins, object]:
    nodes = read_nodes(NODES)
    rng = np.random.default_rng(seed)
    order = arrivals(read_pods(PODS, nodes.models), nodes.gpu_milli, 1.3, rng)
    bins = nodes.bins()
    return order, bins, replay(bins, order, STRATEGIES[strategy](bins, rng), lambda: 0.0, 130)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_replay_places_within_capacity_and_counts_all(strategy: str) -> None:
    order, bins, result = excerpt(strategy, 1)
    assert result.placed + result.refused == len(order)  # type: ignore[attr-defined]
    assert bins.free.min() >= 0 and bins.gpu.min() >= 0
    curve = result.unallocated_pct  # type: ignore[attr-defined]
    assert len(curve) == 131 and curve[0] == 100 and all(a >= b for a, b in pairwise(curve))
    assert curve[130] == pytest.approx(100 * bins.total.sum() / read_nodes(NODES).gpu_milli)


def test_nothing_is_refused_that_fits_somewhere() -> None:
    nodes = read_nodes(NODES)
    rng = np.random.default_rng(3)
    order = arrivals(read_pods(PODS, nodes.models), nodes.gpu_milli, 1.3, rng)
    bins = nodes.bins()
    strategy = STRATEGIES["pack"](bins, rng)
    for shape in order:
        fits = bool(feasible(bins, shape).any())
        found = strategy.place(shape)
        assert (found is not None) == fits
        if found is not None:
            bins.take(found[0], shape, found[1])


def test_packing_leaves_less_than_best_fit_and_random() -> None:
    left = {
        name: np.mean([excerpt(name, seed)[2].unallocated_pct[130] for seed in range(4)])  # type: ignore[attr-defined]
        for name in STRATEGIES
    }
    assert left["pack"] < left["bestfit"] < left["random"]


def test_the_whole_scheduler_packs_as_its_score_does_and_refuses_nothing_that_fits() -> None:
    """With topologies, exact claims and fits behind it: the bins of the trace hold, and the result is that of the score."""
    left = []
    for seed in range(2):
        nodes = read_nodes(NODES)
        rng = np.random.default_rng(seed)
        order = arrivals(read_pods(PODS, nodes.models), nodes.gpu_milli, 1.3, rng)
        bins = nodes.bins()
        strategy = WholeScheduler(nodes)
        allocated = 0
        for shape in order:
            fits = bool(feasible(bins, shape).any())
            found = strategy.place(shape)
            assert (found is not None) == fits
            if found is not None:
                assert bins.gpu[list(found[1]), found[0]].min(initial=1000) >= shape.share_milli * bool(shape.gpus)
                bins.take(found[0], shape, found[1])
                allocated += shape.gpu_milli
        assert bins.free.min() >= 0 and bins.gpu.min() >= 0
        scored = excerpt("pack", seed)[2].unallocated_pct[130]  # type: ignore[attr-defined]
        left.append((100 - 100 * allocated / nodes.gpu_milli, scored))
    assert np.mean([a - b for a, b in left]) < 1.5


def test_the_folder_of_all_traces_will_do(tmp_path: Path) -> None:
    (tmp_path / "openb").mkdir()
    (tmp_path / "openb" / NODES_NAME).write_bytes(NODES.read_bytes())
    (tmp_path / "openb" / PODS_NAME.format("few")).write_bytes(PODS.read_bytes())
    arguments = ["--trace", "openb", "--workload", "few", "-o", "json", "--strategy", "scheduler"]
    outputs = [
        json.loads(CliRunner().invoke(simulate, [*arguments, "--trace-dir", str(folder)]).output)
        for folder in (tmp_path, tmp_path / "openb")
    ]
    assert outputs[0]["curve"] == outputs[1]["curve"]
    assert outputs[0]["placed"] > 0


def test_the_command_prints_the_documented_json() -> None:
    arguments = ["--trace", "openb", "--nodes", str(NODES), "--pods", str(PODS), "--seed", "5", "-o", "json"]
    first = CliRunner().invoke(simulate, arguments)
    assert first.exit_code == 0, first.output
    values = json.loads(first.output)
    assert set(values) == {
        "gpu_allocated_pct",
        "gpu_unallocated_pct",
        "curve",
        "placed",
        "refused",
        "placements_per_s",
    }
    assert values["gpu_allocated_pct"] + values["gpu_unallocated_pct"] == pytest.approx(100, abs=0.01)
    again = json.loads(CliRunner().invoke(simulate, arguments).output)
    assert {k: v for k, v in again.items() if k != "placements_per_s"} == {
        k: v for k, v in values.items() if k != "placements_per_s"
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,cpu_milli\n", "no column"),
        ("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,x,1,0,0\n", "no integer"),
        ("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,-1,1,0,0\n", "negative"),
        ("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,1,1,2,500\n", "no request"),
    ],
)
def test_a_broken_trace_is_told_with_its_column(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "pods.csv").write_text(text)
    with pytest.raises(TraceUnreadable, match=told):
        read_pods(tmp_path / "pods.csv", ("A",))
    missing = CliRunner().invoke(
        simulate, ["--trace", "openb", "--nodes", str(NODES), "--pods", str(tmp_path / "none.csv")]
    )
    assert missing.exit_code == 1 and "none.csv" in missing.output
