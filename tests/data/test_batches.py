"""Streams: what is read is a function of the key and the position, and of nothing else."""

import random

import datasets
import numpy as np
import pytest
import torch
from naive_suppression import Environment
from points import make_points

from sophon_hf import ClassificationTask, DiffusionTask, FineTuningStrategy
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import build_domain
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.utils import derive_seed

CLASSIFIER = ModelInputs(names=("x",), main="x", labelled=True)
DIFFUSION = ModelInputs(names=("sample",), main="sample", labelled=False)


def numbered(examples: int, transform=None):
    """A domain whose example i is the number i."""
    dataset = make_points(0, examples).remove_columns("x").add_column("x", [[float(i)] for i in range(examples)])
    return build_domain(dataset if transform is None else dataset.with_transform(transform), CLASSIFIER)


def images(examples: int):
    pixels = torch.randn(examples, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return build_domain(datasets.Dataset.from_dict({"sample": pixels.tolist()}), DIFFUSION)


def numbers(batch) -> list[int]:
    return batch["x"].flatten().int().tolist()


def noisy(rows):
    """A random transform that asks all three sources of randomness."""
    noise = [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in rows["x"]]
    return {"x": [np.array(x, dtype=np.float32) + n for x, n in zip(rows["x"], noise)], "label": rows["label"]}


def assert_equal(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def merge(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_every_epoch_is_another_permutation():
    stream = Stream(numbered(30), ClassificationTask().collate, seed=5)
    epochs = [numbers(stream.batch(epoch * 30, 30)) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(range(30)) not in map(tuple, epochs)


def test_labels_stay_with_their_examples():
    domain = numbered(30)
    batch = Stream(domain, ClassificationTask().collate, seed=5).batch(20, 25)
    assert torch.equal(batch["labels"], domain.labels[numbers(batch)])


def test_a_batch_depends_on_key_and_position_only():
    domain, task = images(12), DiffusionTask()
    stream = Stream(domain, task.collate, seed=5)
    torch.manual_seed(0)
    late, early = stream.batch(31, 7), stream.batch(0, 7)
    torch.manual_seed(1)
    again = Stream(domain, task.collate, seed=5)
    assert_equal(again.batch(0, 7), early)
    assert_equal(again.batch(31, 7), late)
    other = Stream(domain, task.collate, seed=6).batch(0, 7)
    assert not torch.equal(other["target"], early["target"])
    assert not torch.equal(other["timestep"], early["timestep"])


def test_reading_leaves_the_random_state_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    Stream(images(12), DiffusionTask().collate, seed=5).batch(0, 7)
    Stream(numbered(12, noisy), ClassificationTask().collate, seed=5).batch(0, 7)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize(
    "make", (lambda: (numbered(12), ClassificationTask().collate), lambda: (images(12), DiffusionTask().collate))
)
@pytest.mark.parametrize("sizes", ((5, 5, 5, 5, 5, 5, 5), (1, 13, 21), (35,)))
def test_batches_across_epochs_equal_one_large_batch(make, sizes):
    stream = Stream(*make(), seed=3)
    starts = np.cumsum((0, *sizes))[:-1].tolist()
    pieces = [stream.batch(7 + start, size) for start, size in zip(starts, sizes)]
    assert_equal(merge(pieces), stream.batch(7, 35))


def test_batches_go_on_where_the_last_one_ended():
    stream = Stream(numbered(12), ClassificationTask().collate, seed=3)
    batches = stream.batches(5)
    assert_equal(merge([next(batches) for _ in range(8)]), stream.batch(0, 40))


def test_a_batch_larger_than_the_epoch_is_cut_to_it():
    batches = Stream(numbered(12), ClassificationTask().collate, seed=3).batches(50)
    first, second = numbers(next(batches)), numbers(next(batches))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_noise_of_an_example_changes_from_epoch_to_epoch():
    stream = Stream(images(12), DiffusionTask().collate, seed=3)
    targets = merge([stream.batch(0, 12), stream.batch(12, 12)])["target"].flatten(1)
    assert len(targets.unique(dim=0)) == 24


def test_noise_is_standard_normal_and_timesteps_cover_the_schedule():
    batch = Stream(images(12), DiffusionTask().collate, seed=3).batch(0, 3000)
    assert abs(float(batch["target"].mean())) < 0.02
    assert abs(float(batch["target"].std()) - 1) < 0.02
    assert abs(float(batch["timestep"].double().mean()) - 499.5) < 30
    assert batch["timestep"].min() < 10 and batch["timestep"].max() > 989


def test_a_stream_over_some_examples_reads_those_only():
    stream = Stream(numbered(30), ClassificationTask().collate, seed=3, indices=torch.tensor([3, 14, 15]))
    assert sorted(numbers(stream.batch(0, 3))) == [3, 14, 15]
    assert set(numbers(stream.batch(1, 20))) == {3, 14, 15}


def test_a_random_transform_is_seeded_by_key_and_position():
    domain, task = numbered(12, noisy), ClassificationTask()
    stream = Stream(domain, task.collate, seed=3)
    random.seed(0)
    first, second = stream.batch(0, 12), stream.batch(12, 12)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert_equal(Stream(domain, task.collate, seed=3).batch(0, 12), first)
    fractions = [{round(v - int(v), 6) for v in batch["x"].flatten().tolist()} for batch in (first, second)]
    assert len(fractions[0]) == 12, "every example of a batch has its own noise"
    assert not fractions[0] & fractions[1], "every epoch has its own noise"


def test_a_random_transform_does_not_depend_on_how_the_positions_are_cut_into_batches():
    stream = Stream(numbered(12, noisy), ClassificationTask().collate, seed=3)
    assert_equal(merge([stream.batch(0, 4), stream.batch(4, 4)]), stream.batch(0, 8))


def test_fine_tuning_and_evaluation_sets_are_disjoint_and_nine_to_one():
    domain = numbered(120)
    environment = Environment(domain, ClassificationTask(), FineTuningStrategy(), seed=4)
    r, t = environment.fine_tuning.indices.tolist(), environment.evaluation.indices.tolist()
    assert (len(r), len(t)) == (108, 12)
    assert sorted(r + t) == list(range(120))
    read = [set(numbers(stream.batch(0, 500))) for stream in (environment.fine_tuning, environment.evaluation)]
    assert read == [set(r), set(t)]


@pytest.mark.parametrize(("size", "batches"), [(4, 2), (5, 2), (10, 1), (11, 1), (1, 10)])
def test_a_distinct_batch_holds_no_example_twice(size, batches):
    stream = Stream(numbered(10), ClassificationTask().collate, seed=5)
    epochs = [
        [numbers(stream.distinct_batch(n, size)) for n in range(e * batches, (e + 1) * batches)] for e in range(4)
    ]
    for epoch in epochs:
        read = sum(epoch, [])
        assert len(read) == len(set(read)) == batches * min(size, 10)
    assert len({str(epoch) for epoch in epochs}) == 4
    walked = Stream(numbered(10), ClassificationTask().collate, seed=5).batch(0, 10)
    assert sum(epochs[0], []) == numbers(walked)[: batches * min(size, 10)]


def test_an_environment_is_decided_by_its_seed():
    domain, task, strategy = numbered(120), ClassificationTask(), FineTuningStrategy()
    torch.manual_seed(0)
    first = Environment(domain, task, strategy, seed=4)
    torch.manual_seed(1)
    again, other = (Environment(domain, task, strategy, seed=seed) for seed in (4, 5))
    assert (first.seed, first.strategy) == (4, strategy)
    assert_equal(first.fine_tuning.batch(0, 50), again.fine_tuning.batch(0, 50))
    assert_equal(first.evaluation.batch(0, 50), again.evaluation.batch(0, 50))
    assert set(first.evaluation.indices.tolist()) != set(other.evaluation.indices.tolist())


def test_a_small_domain_still_holds_something_out():
    environment = Environment(numbered(3), ClassificationTask(), FineTuningStrategy(), seed=0)
    assert (len(environment.fine_tuning.indices), len(environment.evaluation.indices)) == (2, 1)


def test_derived_seeds_do_not_change():
    assert derive_seed(0) == 3605381253883003538
    assert derive_seed(42, "R") == 4571372049590876857


def test_derived_seeds_depend_on_every_part_of_the_key():
    keys = [(), (1,), (2,), ("1",), (1, 2), (2, 1), (12,), ("1, 2",), (1, "R"), (1, "T"), (1, 2, 3)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**62 for seed in seeds)
