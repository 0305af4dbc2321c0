"""The supervised task families: their contract, the curves, the drawn characters, Omniglot's folder, clear errors."""

import math
import os
import shutil
import zipfile
from copy import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import envs
from envs import fewshot, omniglot
from envs.core import SupervisedTasks
from envs.fewshot import FewShot, Glyphs, Omniglot, catmull_rom, draw_glyphs, render_strokes
from envs.files import cached
from envs.omniglot import read_omniglot, stamp
from envs.regression import Sinusoid, SinusoidAllPhases, SinusoidOrLine

pytestmark = pytest.mark.xdist_group("supervised_envs")
NAMES = [family.__name__ for family in envs.SUPERVISED]
IMAGES = [family.__name__ for family in envs.SUPERVISED if family.is_classification]
WAVES = {Sinusoid: math.pi, SinusoidAllPhases: 2 * math.pi}
STRIPS = {"train": 0.03, "test": 0.07}  # a tenth of the tasks is in each of ten strips: a coarse uniform
WAYS, DRAWINGS = 5, 6
ALPHABETS = {"images_background/Greek": 11, "images_background/Latin_(old)": 6, "images_evaluation/Aurek": 13}
SPLITS = {"Glyphs": (41, 3, 16), "Omniglot": (20, 2, 8)}  # of 60 and of ALPHABETS' 30: 1100, 100, 423 of 1623
TRAINED, VALIDATED, TESTED = SPLITS["Omniglot"]
every_family = pytest.mark.parametrize("name", NAMES)
every_image_family = pytest.mark.parametrize("name", IMAGES)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def write_omniglot(root, alphabets, drawings=DRAWINGS):
    """A folder as Omniglot's authors pack it: 105x105 pictures of 1 bit, black ink on white, NNNN_MM.png."""
    rng, number = np.random.default_rng(0), 0
    for alphabet, characters in alphabets.items():
        for character in range(1, characters + 1):
            number += 1
            (folder := root / alphabet / f"character{character:02d}").mkdir(parents=True)
            corners = rng.integers(12, 93, (4, 2))
            for drawing in range(1, drawings + 1):
                picture = Image.new("1", (105, 105), 1)
                line = (corners + rng.integers(-5, 6, (4, 2))).flatten().tolist()
                ImageDraw.Draw(picture).line(line, fill=0, width=5)
                picture.save(folder / f"{number:04d}_{drawing:02d}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_omniglot(tmp_path_factory.mktemp("omniglot"), ALPHABETS)


@pytest.fixture(scope="module")
def families(folder):
    """One small instance of every family by name."""
    small = {"Glyphs": Glyphs(WAYS, classes=60, instances=DRAWINGS), "Omniglot": Omniglot(str(folder), WAYS)}
    return small | {family.__name__: family() for family in envs.SUPERVISED if not family.is_classification}


@pytest.fixture(scope="module")
def full():
    return Glyphs()


def pictures(images):
    """The bytes of every picture of images [.., 784] or [.., 28, 28], in order."""
    return [picture.tobytes() for picture in images.reshape(-1, 784).numpy()]


def numpy_sample(data, split="train", num_tasks=200, sizes=(7, 4)):
    """Tasks, x and y of all sets together, as float64 arrays."""
    tasks = data.sample_tasks(num_tasks, seeded(0), split)
    x, y = (torch.cat(parts, 1).numpy() for parts in zip(*data.sample(tasks, sizes, seeded(1)), strict=True))
    return tasks.numpy(), x, y


def uniform(values, low, high, tolerance=0.03):
    """Whether values lie in [low, high] and how many lie below a value is that of uniform ones, up to the tolerance."""
    unit = (np.sort(values) - low) / (high - low)
    inside = unit[0] > -1e-6 and unit[-1] < 1 + 1e-6
    return inside and np.abs(unit - (np.arange(len(unit)) + 0.5) / len(unit)).max() < tolerance


def test_the_uniformity_check_can_fail():
    grid = np.linspace(0, 1, 1000)
    assert uniform(grid, 0, 1)
    assert not any(uniform(grid, *bounds) for bounds in ((0, 0.9), (0.1, 1), (0, 1.1), (-0.1, 1)))
    assert not uniform(grid**2, 0, 1)


# ---------------------------------------------------------------- the contract


@every_family
def test_shapes_and_dtypes(name, families, folder):
    doubles = {"Glyphs": lambda: Glyphs(3, "cpu", torch.float64, classes=30, instances=6)}
    doubles["Omniglot"] = lambda: Omniglot(str(folder), 3, dtype=torch.float64)
    make_double = doubles.get(name, lambda: getattr(envs, name)(dtype=torch.float64))
    for data, ways, dtype in ((families[name], WAYS, torch.float32), (make_double(), 3, torch.float64)):
        assert isinstance(data, SupervisedTasks)
        per_class = ways if data.is_classification else 1
        width = {"SinusoidOrLine": 3, "Glyphs": ways, "Omniglot": ways}.get(name, 2)
        for split in ("train", "test"):
            tasks = data.sample_tasks(7, seeded(0), split)
            assert tasks.shape == (7, width)
            assert tasks.dtype == (torch.int64 if data.is_classification else dtype)
            sets = data.sample(tasks, (1, 3, 2), seeded(0))
            assert [x.shape for x, _ in sets] == [(7, per_class * size, data.num_inputs) for size in (1, 3, 2)]
            assert [y.shape for _, y in sets] == [(7, per_class * size, data.num_outputs) for size in (1, 3, 2)]
            assert {x.dtype for x, _ in sets} == {dtype}
            assert {y.dtype for _, y in sets} == {torch.bool if data.is_classification else dtype}
            assert (data.num_inputs, data.num_outputs) == ((784, ways) if data.is_classification else (1, 1))


@every_family
def test_no_example_is_in_two_sets(name, families):
    data = families[name]
    x_sets = [x for x, _ in data.sample(data.sample_tasks(50, seeded(0)), (1, 3, 2), seeded(1))]
    for of_one_task in zip(*x_sets, strict=True):
        rows = [row.tobytes() for x in of_one_task for row in x.numpy()]
        assert len(rows) == len(set(rows)) == 6 * (WAYS if data.is_classification else 1)


@every_family
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_generator_decides_everything(name, split, families):
    data = families[name]

    def draw(seed):
        generator = seeded(seed)
        tasks = data.sample_tasks(6, generator, split)
        return [tasks, *(tensor for pair in data.sample(tasks, (2, 1), generator) for tensor in pair)]

    def equal(first, second):
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    torch.manual_seed(1)
    before, first = torch.get_rng_state(), draw(5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(3)
    assert equal(first, draw(5))
    other = draw(6)
    assert not torch.equal(first[0], other[0])
    again = data.sample(first[0], (2, 1), seeded(7))
    assert not torch.equal(first[1], again[0][0])  # the examples are drawn anew for the same tasks


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IMAGES])
def test_curves_of_training_and_test_tasks_lie_in_strips_of_their_own(name, families):
    tasks = {split: families[name].sample_tasks(20000, seeded(0), split).numpy() for split in ("train", "test")}
    groups = [({split: t[:, 0] for split, t in tasks.items()}, 0.1, 5)]
    if name == "SinusoidOrLine":
        kinds = ((0, 1, 5), (1, -3, 3))
        groups = [({split: t[t[:, 0] == kind, 1] for split, t in tasks.items()}, *ends) for kind, *ends in kinds]
    for first, low, high in groups:
        strips = {split: set(np.floor((a - low) / (high - low) * 50).astype(int)) for split, a in first.items()}
        assert strips["test"] == set(range(2, 50, 5))
        assert strips["train"] == set(range(50)) - strips["test"]


@every_image_family
def test_classes_of_training_and_test_tasks_never_meet(name, families):
    data, (trained, validated, _) = families[name], SPLITS[name]
    few = copy(data)
    few.num_outputs = 2  # there are only two or three characters for validation
    tasks = {split: few.sample_tasks(1000, seeded(0), split) for split in ("train", "valid", "test")}
    ends = 0, 4 * trained, 4 * trained + validated, len(data.images)
    for split, first, last in zip(tasks, ends, ends[1:], strict=False):
        assert set(tasks[split].flatten().tolist()) == set(range(first, last))
    seen = {
        split: set(pictures((255 * data.sample(drawn, (1, 1), seeded(1))[0][0]).round().to(torch.uint8)))
        for split, drawn in tasks.items()
    }
    assert len(seen["train"]) > len(seen["test"]) > len(seen["valid"]) > 1
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


@pytest.mark.parametrize("name", NAMES)
def test_another_split_is_a_value_error(name, families):
    with pytest.raises(ValueError, match="'held out'"):
        families[name].sample_tasks(2, seeded(0), "held out")


# ---------------------------------------------------------------- curves


@pytest.mark.parametrize("family", WAVES)
def test_waves_against_numpy(family):
    tasks, x, y = numpy_sample(family(dtype=torch.float64))
    np.testing.assert_allclose(y[..., 0], tasks[:, :1] * np.sin(x[..., 0] - tasks[:, 1:]), atol=1e-12)
    assert np.abs(y[..., 0] - tasks[:, :1] * np.sin(x[..., 0] + tasks[:, 1:])).max() > 1


@pytest.mark.parametrize("family", WAVES)
def test_ranges_of_waves(family):
    for split in ("train", "test"):
        tasks, x, _ = numpy_sample(family(), split, num_tasks=5000)
        assert uniform(tasks[:, 0], 0.1, 5, STRIPS[split])
        assert uniform(tasks[:, 1], 0, WAVES[family])
        assert uniform(x.flatten(), -5, 5)


def test_waves_and_lines_alternate_and_agree_with_numpy():
    first_kinds = set()
    for seed in range(8):
        kind = SinusoidOrLine().sample_tasks(9, seeded(seed))[:, 0]
        assert (kind[1:] + kind[:-1] == 1).all()
        first_kinds.add(float(kind[0]))
    assert first_kinds == {0.0, 1.0}
    tasks, x, y = numpy_sample(SinusoidOrLine(dtype=torch.float64))
    for (kind, first, second), x_B, y_B in zip(tasks, x[..., 0], y[..., 0], strict=True):
        expected = first * np.sin(x_B + second) if kind == 0 else first * x_B + second
        np.testing.assert_allclose(y_B, expected, atol=1e-12)


@pytest.mark.parametrize("split", ["train", "test"])
def test_ranges_of_waves_and_lines(split):
    tasks, x, _ = numpy_sample(SinusoidOrLine(), split, num_tasks=20000)
    wave, line = (tasks[tasks[:, 0] == kind, 1:].T for kind in (0, 1))
    assert uniform(wave[0], 1, 5, STRIPS[split])
    assert uniform(wave[1], 0, math.pi)
    assert uniform(line[0], -3, 3, STRIPS[split])
    assert uniform(line[1], -3, 3)
    assert uniform(x.flatten(), -5, 5)


# ---------------------------------------------------------------- tasks on images


@every_image_family
@pytest.mark.parametrize("split", ["train", "test"])
def test_sets_hold_the_right_pictures_under_the_right_labels(name, split, families):
    data, sizes = families[name], (1, 3)
    origin = {picture: divmod(i, DRAWINGS) for i, picture in enumerate(pictures(data.images))}
    assert len(origin) == len(data.images) * DRAWINGS
    tasks = data.sample_tasks(100, seeded(0), split)
    sets, used = data.sample(tasks, sizes, seeded(1)), set()
    for n, classes in enumerate(tasks.tolist()):
        assert len(set(classes)) == WAYS
        seen = []
        for (x, y), size in zip(sets, sizes, strict=True):
            pixels = (255 * x[n]).round().to(torch.uint8)
            assert torch.equal(x[n], pixels / 255)
            found = [origin[picture] for picture in pictures(pixels)]
            assert (y[n].sum(1) == 1).all()
            assert [number for number, _ in found] == [classes[label] for label in y[n].int().argmax(1)]
            assert [number for number, _ in found] == classes * size  # by instance, then class
            seen += found
        assert len(seen) == len(set(seen))  # no drawing in both sets
        used |= {drawing for _, drawing in seen}
    assert used == set(range(DRAWINGS))


@every_image_family
def test_too_many_drawings_or_ways_are_value_errors(name, families, folder):
    data, held_out = families[name], SPLITS[name][2]
    with pytest.raises(ValueError, match="7 drawings of each class are asked for, there are 6"):
        data.sample(data.sample_tasks(2, seeded(0)), (3, 4), seeded(0))
    make = {"Glyphs": lambda ways: Glyphs(ways, classes=60, instances=1), "Omniglot": lambda w: Omniglot(folder, w)}[
        name
    ]
    for ways in (-1, 0, 1, held_out + 1):
        with pytest.raises(ValueError, match=f"--ways {ways}: allowed is 2 to {held_out}"):
            make(ways)
    assert sorted(make(held_out).sample_tasks(1, seeded(0), "test")[0].tolist()) == sorted(
        range(len(data.images) - held_out, len(data.images))
    )


@pytest.mark.parametrize(("classes", "trained", "held_out"), [(30, 20, 8), (60, 41, 16), (100, 68, 26), (203, 138, 53)])
def test_the_shares_of_the_splits(classes, trained, held_out):
    assert trained == round(classes * 0.677757240)
    assert held_out == classes - round(classes * 0.739371534)  # the same as when nothing was for validation
    data = Glyphs(2, classes=classes, instances=1)
    last = 3 * trained + classes
    ends = 4 * trained, last - held_out, last
    assert data.classes == {"train": (0, ends[0]), "valid": (ends[0], ends[1]), "test": (ends[1], last)}
    assert data.images.shape == (last, 1, 784)


@every_image_family
def test_more_ways_than_a_split_has_classes_are_a_value_error(name, families):
    data, validated = families[name], SPLITS[name][1]
    with pytest.raises(ValueError, match=f"--ways {WAYS}: allowed is 2 to {validated}, the valid classes"):
        data.sample_tasks(2, seeded(0), "valid")


def test_an_evaluation_is_on_the_split_that_is_asked_for(families):
    tasks = copy(families["Glyphs"])
    tasks.num_outputs, tasks._test_tasks = 2, None
    drawn = {"test": tasks.test_set(50)[0].flatten().tolist()}
    assert tasks.test_set_name() == "held-out tasks"
    tasks.held_out, tasks._test_tasks = "valid", None
    drawn["valid"] = tasks.test_set(50)[0].flatten().tolist()
    assert tasks.test_set_name() == "validation tasks"
    for split, classes in drawn.items():
        assert set(classes) <= set(range(*tasks.classes[split]))
        assert len(set(classes)) > 2


def assert_rotated(images, trained):
    square = images.view(*images.shape[:2], 28, 28).numpy()
    for turns in range(4):
        expected = np.stack([[np.rot90(drawing, turns) for drawing in drawings] for drawings in square[:trained]])
        np.testing.assert_array_equal(square[turns * trained : (turns + 1) * trained], expected)


@every_image_family
def test_rotated_classes(name, families):
    trained = SPLITS[name][0]
    assert_rotated(families[name].images, trained)
    with pytest.raises(AssertionError):
        assert_rotated(families[name].images.view(-1, DRAWINGS, 28, 28).mT.flatten(2), trained)  # turns the other way


def test_the_default_has_omniglots_numbers(full):
    assert (fewshot.CLASSES, fewshot.INSTANCES, fewshot.SIDE) == (1623, 20, 28)
    assert fewshot.split_sizes(1623) == (1100, 100, 423)
    assert full.images.shape == (4 * 1100 + 100 + 423, 20, 784)
    assert full.images.dtype == torch.uint8
    assert full.classes == {"train": (0, 4400), "valid": (4400, 4500), "test": (4500, 4923)}
    assert_rotated(full.images[:, :1], 1100)
    assert len(set(pictures(full.images))) == 4923 * 20  # no held-out picture is a training picture


# ---------------------------------------------------------------- drawing


def slow_picture(points, pen):
    """[28, 28] in 0..255: row i, column j is the point (x, y) = ((j + 0.5) / 28, (i + 0.5) / 28)."""
    picture = np.zeros((28, 28))
    for i, j in np.ndindex(28, 28):
        distance = np.hypot(points[:, 0] - (j + 0.5) / 28, points[:, 1] - (i + 0.5) / 28).min()
        picture[i, j] = 255 / (1 + math.exp(min(140 * (distance - pen), 500)))
    return picture


def strokes(count):
    """Curve points [count, P, 2] and pens [count] of random characters, absent strokes off the paper."""
    generator = seeded(3)
    controls, drawn = fewshot._characters(count, generator)
    points = torch.where(drawn[:, :, None, None], catmull_rom(controls), 9.0).flatten(1, 2)
    return points, 0.022 + 0.012 * torch.rand(count, generator=generator)


def test_rendering_against_the_exact_distance():
    points, pens = strokes(12)
    drawn = render_strokes(points, pens).numpy().astype(float)

    def slow(pen_scale=1.0):
        pairs = zip(points.double().numpy(), pens.tolist(), strict=True)
        return np.stack([slow_picture(curve, pen * pen_scale) for curve, pen in pairs])

    def close(expected):  # the smooth minimum is never the larger one: ink can be a little darker, but not lighter
        error = drawn - expected
        inked = error[expected > 10]  # fainter ink, further than 0.06 from the stroke, is cut off
        return inked.min() > -1 and error.min() > -8 and error.max() < 26 and np.abs(error).mean() < 2.5

    exact = slow()
    assert close(exact)
    assert (drawn[exact < 0.5] == 0).all()
    assert not close(slow(0.9))
    assert not close(slow(1.1))
    assert not close(exact.swapaxes(1, 2))  # x is the column


def test_rendering_of_single_points_is_exact():
    points, pens = torch.rand(20, 1, 2, generator=seeded(0)), torch.linspace(0.022, 0.034, 20)
    drawn = render_strokes(points, pens).numpy().astype(float)
    exact = np.stack([slow_picture(*pair) for pair in zip(points.double().numpy(), pens.tolist(), strict=True)])
    near = exact > 10
    assert near.sum() > 60
    assert (drawn[exact < 0.5] == 0).all()
    np.testing.assert_allclose(drawn[near], exact[near], atol=0.6)
    assert drawn[~near].max() < 14


def test_a_stroke_off_the_paper_leaves_no_ink():
    assert render_strokes(torch.full((1, 65, 2), 9.0), torch.tensor([0.03])).sum() == 0


def test_curves_pass_their_controls_smoothly():
    controls = torch.randn(50, 4, 5, 2, generator=seeded(0), dtype=torch.float64)
    curves = catmull_rom(controls)
    assert curves.shape == (50, 4, 65, 2)
    torch.testing.assert_close(curves[..., ::16, :], controls)
    one_sided = torch.tensor([-11.0, 18, -9, 2], dtype=torch.float64) * 16 / 6  # exact for cubics
    for joint in (16, 32, 48):
        after = (one_sided[:, None] * curves[..., joint : joint + 4, :]).sum(-2)
        before = -(one_sided.flip(0)[:, None] * curves[..., joint - 3 : joint + 1, :]).sum(-2)
        torch.testing.assert_close(after, before)
        chord = (controls[..., joint // 16 + 1, :] - controls[..., joint // 16 - 1, :]) / 2
        torch.testing.assert_close(after, chord)


def test_curves_against_the_matrix_form():
    matrix = np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    controls = np.random.default_rng(0).normal(size=(5, 2))
    around = np.concatenate([2 * controls[:1] - controls[1:2], controls, 2 * controls[-1:] - controls[-2:-1]])
    expected = [
        (position % 1) ** np.arange(4) @ matrix @ around[int(position) : int(position) + 4]
        for position in np.arange(64) / 16
    ]
    drawn = catmull_rom(torch.from_numpy(controls)).numpy()
    np.testing.assert_allclose(drawn, np.stack([*expected, controls[-1]]), atol=1e-12)


def test_characters_fill_their_box():
    controls, drawn = fewshot._characters(2000, seeded(0))
    counts = drawn.sum(1).numpy()
    assert all((drawn[i] == (torch.arange(4) < count)).all() for i, count in enumerate(counts))
    np.testing.assert_allclose(np.bincount(counts, minlength=5) / 2000, [0, 0.2, 0.35, 0.3, 0.15], atol=0.04)
    for character, count in zip(controls.numpy(), counts, strict=True):
        points = character[:count].reshape(-1, 2)
        assert np.ptp(points, 0).max() == pytest.approx(0.76, abs=1e-5)
        np.testing.assert_allclose((points.min(0) + points.max(0)) / 2, 0.5, atol=1e-5)


def test_drawings_are_jittered_beyond_an_affine_map(monkeypatch):
    kept = []
    monkeypatch.setattr(fewshot, "catmull_rom", lambda controls: kept.append(controls) or catmull_rom(controls))
    draw_glyphs(100, 10, seeded(0))
    character = fewshot._characters(100, seeded(0))[0].double().numpy().reshape(100, 20, 2)
    drawings = kept[0].double().numpy().reshape(100, 10, 20, 2)
    whole, strokes = np.ones((20, 1)), np.kron(np.eye(4), np.ones((5, 1)))
    spread = []
    for offsets in (whole, strokes):  # one shift for the character, or one for every stroke
        left = 0
        for points, drawn in zip(character, drawings, strict=True):
            design = np.concatenate([points, offsets], 1)
            residual = drawn - design @ (np.linalg.pinv(design) @ drawn)
            left += (residual**2).sum() / (20 - design.shape[1])
        spread.append(math.sqrt(left / 100 / 20))
    assert spread[1] == pytest.approx(0.03, abs=0.004)
    assert spread[0] > 1.2 * spread[1]


def test_the_seed_decides_the_pictures():
    first, same, other = (Glyphs(2, classes=30, instances=3, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not set(pictures(first)) & set(pictures(other))
    drawn = draw_glyphs(30, 3, seeded(0))
    assert drawn.shape == (30, 3, 28, 28)
    assert pictures(first[:20]) == pictures(drawn[:20])
    assert pictures(first[-10:]) == pictures(drawn[20:])


def test_drawings_of_a_class_are_alike_but_not_the_same(full):
    x = full.images[4500:, :10].float() / 255
    blurred = torch.nn.functional.avg_pool2d(x.view(-1, 1, 28, 28), 5, 1).flatten(1)
    distance = torch.cdist(blurred, blurred).view(423, 10, 423, 10).transpose(1, 2)
    own = distance.diagonal().sum((0, 1)) / 90
    others = (distance.sum((0, 1, 2, 3)) - own.sum() * 90) / (423 * 422 * 100)
    assert 0.2 < float(own.mean() / others) < 0.9
    assert float((own < others).float().mean()) > 0.9


def nearest_mean_accuracy(data, shots):
    generator = seeded(0)
    support, query = data.sample(data.sample_tasks(600, generator, "test"), (shots, 15), generator)
    means = support[1].float().mT @ support[0] / shots
    guess = torch.cdist(query[0], means).argmin(-1)
    return float((guess == query[1].int().argmax(-1)).float().mean())


def test_held_out_classes_are_as_hard_to_tell_apart_by_pixels_as_measured(full):
    assert 0.40 < nearest_mean_accuracy(full, 1) < 0.52  # Omniglot's own pictures are about as hard; chance is 0.2
    assert 0.68 < nearest_mean_accuracy(full, 5) < 0.78


# ---------------------------------------------------------------- Omniglot's folder


def test_omniglot_is_read_in_the_order_of_names(folder):
    images = read_omniglot(str(folder))
    assert images.shape == (30, DRAWINGS, 28, 28)
    assert images.dtype == torch.uint8
    paths = [folder / a / f"character{c:02d}" for a, count in ALPHABETS.items() for c in range(1, count + 1)]
    for path, drawings in zip(paths, images.numpy(), strict=True):
        for file, picture in zip(sorted(path.iterdir()), drawings, strict=True):
            with Image.open(file) as image:
                assert (image.mode, image.size) == ("1", (105, 105))
                ink = 255.0 * ~np.asarray(image)
            exact = np.kron(ink, np.ones((4, 4))).reshape(28, 15, 28, 15).mean((1, 3))  # 105 * 4 = 28 * 15
            assert np.abs(picture - exact).max() < 80
            assert np.abs(picture - exact).mean() < 4
            assert picture.max() > 200
            assert np.median(picture) == 0


def test_a_known_shape_stays_where_it_is(tmp_path):
    root = write_omniglot(tmp_path, {"images_background/Greek": 1}, drawings=1)
    paper, expected = np.ones((105, 105), bool), np.zeros((28, 28))
    for rows, columns in ((slice(0, 2), slice(0, 7)), (slice(2, 5), slice(0, 1)), (slice(5, 6), slice(0, 3))):
        paper[rows.start * 15 : rows.stop * 15, columns.start * 15 : columns.stop * 15] = False  # 15 pixels become 4
        expected[rows.start * 4 : rows.stop * 4, columns.start * 4 : columns.stop * 4] = 255
    Image.fromarray(paper).save(next(root.rglob("*.png")))
    np.testing.assert_array_equal(read_omniglot(str(root))[0, 0], expected)


def test_omniglots_split_is_fixed_and_holds_every_character_once(folder, families):
    torch.manual_seed(9)
    images = Omniglot(str(folder), WAYS).images
    assert torch.equal(images, families["Omniglot"].images)
    assert images.shape == (4 * TRAINED + 30 - TRAINED, DRAWINGS, 784)
    by_name = [tuple(pictures(character)) for character in read_omniglot(str(folder))]
    upright = [tuple(pictures(character)) for character in torch.cat([images[:TRAINED], images[4 * TRAINED :]])]
    assert sorted(upright) == sorted(by_name)
    held_out = {by_name.index(character) for character in upright[TRAINED:]}
    assert held_out & set(range(17))  # from the first folder ...
    assert held_out & set(range(17, 30))  # ... and from the second


def test_other_files_do_not_disturb(tmp_path):
    root = write_omniglot(tmp_path / "data", {"images_background/Greek": 3, "images_evaluation/Aurek": 2}, 2)
    expected = read_omniglot(str(root))
    for place in (".", "images_background", "images_background/Greek", "images_background/Greek/character02"):
        for file in (".DS_Store", "README.md", "Thumbs.db", "images_background.zip", "character99"):
            (root / place / file).write_bytes(b"\0\1")
    (root / "__MACOSX/images_background/Greek/character01").mkdir(parents=True)
    (root / "strokes_background/Greek/character01").mkdir(parents=True)
    assert torch.equal(read_omniglot(str(root)), expected)


def _hidden_pictures(root):
    for path in list(root.rglob("*.png")):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7")


def _hidden_folder(root):
    (root / "images_background/.ipynb_checkpoints").mkdir()


def _small_set(root):
    shutil.copytree(root / "images_background", root / "images_background_small1")


@pytest.mark.parametrize("add", [_hidden_pictures, _hidden_folder, _small_set])
def test_what_unpacking_leaves_behind_does_not_disturb(add, tmp_path):
    root = write_omniglot(tmp_path, {"images_background/Greek": 3}, 2)
    expected = read_omniglot(str(root))
    add(root)
    assert torch.equal(read_omniglot(str(root)), expected)


# Each breaks a folder and returns the path that the message must begin with, and what it must contain.


def _no_folder(root):
    shutil.rmtree(root)
    return root, "no images_background/ALPHABET/characterNN/ folders"


def _empty_folder(root):
    shutil.rmtree(root / "images_background")
    return root, "no images_background/ALPHABET/characterNN/ folders"


def _no_characters(root):
    (empty := root / "images_background/Klingon").mkdir()
    return empty, "no characterNN folders"


def _missing_character(root):
    shutil.rmtree(root / "images_background/Latin/character02")
    return root / "images_background/Latin", r"character02 is missing .*character03"


def _missing_drawing(root):
    next((character := root / "images_background/Latin/character03").iterdir()).unlink()
    return character, "1 drawings .*, most characters have 2"


def _text_file(root):
    (path := root / "images_background/Greek/character02/0002_01.png").write_text("not found\n")
    return path, "not a picture"


def _no_bytes(root):
    (path := root / "images_background/Greek/character02/0002_01.png").write_bytes(b"")
    return path, "not a picture"


def _truncated_file(root):
    path = root / "images_background/Latin/character01/0004_02.png"
    path.write_bytes(path.read_bytes()[:-40])
    return path, "not a picture"


def _short_header(root):
    path = root / "images_background/Latin/character01/0004_02.png"
    path.write_bytes(path.read_bytes()[:8] + bytes.fromhex("0000000049484452a8a1ae0a"))  # an IHDR of no bytes
    return path, "not a picture"


def _no_drawings(root):
    for path in root.rglob("*.png"):
        path.unlink()
    return root, "drawings"


BROKEN = [_no_folder, _empty_folder, _no_characters, _missing_character, _missing_drawing, _text_file, _no_bytes]
BROKEN += [_truncated_file, _short_header, _no_drawings]


@pytest.mark.parametrize("breaks", BROKEN)
def test_a_broken_folder_is_a_value_error_that_names_the_place(breaks, tmp_path):
    root = write_omniglot(tmp_path / "data", {"images_background/Greek": 3, "images_background/Latin": 4}, 2)
    assert read_omniglot(str(root)).shape == (7, 2, 28, 28)
    place, words = breaks(root)
    with pytest.raises(ValueError, match=words) as error:
        read_omniglot(str(root))
    assert str(error.value).startswith(f"{place}")
    message = refusal("Omniglot-v0", 2, 2, str(root))
    assert message == f"--data {error.value}"


def test_an_alphabet_that_is_missing_from_the_real_omniglot_is_named(tmp_path):
    """Whole parts, too; a data set of one's own, with a few alphabets of the same names, is nobody's mistake."""
    one_each = {f"images_background/{name}": 1 for name in omniglot.ALPHABETS[:30]}
    one_each |= {f"images_evaluation/{name}": 1 for name in omniglot.ALPHABETS[30:]}
    root = write_omniglot(tmp_path, one_each, 1)
    shutil.rmtree(root / "images_background/Greek")
    words = "not the whole Omniglot: Greek missing"
    with pytest.raises(ValueError, match=words) as error:
        read_omniglot(str(root))
    assert str(error.value) == f"{root}: {words}"
    shutil.rmtree(root / "images_background")
    words = "not the whole Omniglot: Alphabet_of_the_Magi, Anglo-Saxon_Futhorc, Arcadian and 27 more missing"
    assert refusal("Omniglot-v0", 2, 2, str(root)) == f"--data {root}: {words}"
    for name in omniglot.ALPHABETS[39:]:
        shutil.rmtree(root / "images_evaluation" / name)
    assert len(read_omniglot(str(root))) == 9


def test_fifty_alphabets_must_have_all_characters(tmp_path):
    root = write_omniglot(tmp_path, {f"images_background/A{i:02d}": 1 for i in range(50)}, 1)
    with pytest.raises(ValueError, match="50 characters in 50 alphabets; the whole Omniglot has 1623") as error:
        read_omniglot(str(root))
    assert str(error.value).startswith(f"{root}: ")
    shutil.rmtree(root / "images_background/A07")
    assert len(read_omniglot(str(root))) == 49


# ---------------------------------------------------------------- make_supervised


def refusal(*args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        envs.make_supervised(*args, **kwargs)
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture
def blank_glyphs(monkeypatch):
    monkeypatch.setattr(fewshot, "draw_glyphs", lambda *_: torch.zeros(1623, 20, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IMAGES])
def test_make_supervised_makes_curves(name):
    assert type(envs.make_supervised(f"{name}-v0", 0, 99)).__name__ == name


@pytest.mark.usefixtures("blank_glyphs")
def test_make_supervised_makes_image_tasks_up_to_the_limits(folder):
    glyphs = envs.make_supervised("Glyphs-v0", 423, 20)
    assert (type(glyphs), glyphs.num_outputs) == (Glyphs, 423)
    real = envs.make_supervised("Omniglot-v0", TESTED, DRAWINGS, str(folder))
    assert (type(real), real.num_outputs) == (Omniglot, TESTED)
    assert isinstance(real, FewShot)
    assert (glyphs.held_out, real.held_out) == ("test", "test")
    assert envs.make_supervised("Glyphs-v0", 100, 20, split="valid").held_out == "valid"


@pytest.mark.usefixtures("blank_glyphs")
def test_only_images_have_classes_for_validation(folder):
    message = "--eval-split valid: allowed is test; only images have classes for validation"
    assert refusal("Sinusoid-v0", 5, 2, split="valid") == message
    assert refusal("Glyphs-v0", 101, 2, split="valid") == "--ways 101: allowed is 2 to 100, the valid classes"
    message = f"--ways 3: allowed is 2 to {VALIDATED}, the valid classes"
    assert refusal("Omniglot-v0", 3, 2, str(folder), split="valid") == message


@pytest.mark.parametrize("env_id", ["Nope-v0", "Sinusoid", "HalfCheetahDir-v0", ""])
def test_an_unknown_family_is_refused(env_id):
    message = refusal(env_id, 5, 2)
    assert message.startswith(f"--env-id {env_id} is no supervised task family; allowed: ")
    assert message.split("allowed: ")[1].split(", ") == [f"{name}-v0" for name in NAMES]


@pytest.mark.parametrize(("env_id", "data"), [("Glyphs-v0", "/tmp"), ("Sinusoid-v0", "/tmp"), ("Omniglot-v0", "")])
def test_a_folder_goes_with_omniglot_only(env_id, data):
    message = refusal(env_id, 5, 2, data)
    told = "reads no --data; Omniglot-v0 does" if data else "reads its pictures from --data DIR"
    assert message == f"--env-id {env_id} --data '{data}': {env_id} {told}"


@pytest.mark.usefixtures("blank_glyphs")
@pytest.mark.parametrize("ways", [-1, 0, 1])
def test_too_few_or_too_many_ways_are_refused(ways, folder):
    for value in (ways, 425 + ways):
        assert refusal("Glyphs-v0", value, 2) == f"--ways {value}: allowed is 2 to 423, the test classes"
    for value in (ways, 10 + ways):
        message = refusal("Omniglot-v0", value, 2, str(folder))
        assert message == f"--ways {value}: allowed is 2 to 8, the test classes"


@pytest.mark.usefixtures("blank_glyphs")
def test_too_many_drawings_are_refused(folder):
    assert refusal("Glyphs-v0", 5, 22) == "--shots 11: allowed is 1 to 10; a class has 20 drawings"
    assert refusal("Glyphs-v0", 5, 21).startswith("--shots")
    assert refusal("Omniglot-v0", 5, 8, str(folder)) == "--shots 4: allowed is 1 to 3; a class has 6 drawings"


@every_family
def test_cuda_without_a_device_is_refused(name, monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(f"{name}-v0", 5, 2, str(folder) if name == "Omniglot" else "", cuda=True)
    assert message.startswith("--cuda: torch sees no CUDA device")
    assert "leave the flag out" in message


# ---------------------------------------------------------------- zips, other layouts, and what is kept


def pack(root, part):
    """A part as the official distribution has it: a zip beside the folder, which goes."""
    with zipfile.ZipFile(root / f"{part}.zip", "w") as file:
        for path in sorted((root / part).rglob("*"), reverse=True):  # the order in a zip is nobody's promise
            file.write(path, path.relative_to(root))
    shutil.rmtree(root / part)


def test_zips_are_read_as_the_folders_in_them(tmp_path):
    root = write_omniglot(tmp_path, {"images_background/Greek": 3, "images_evaluation/Aurek": 2}, 2)
    expected = read_omniglot(str(root))
    pack(root, "images_evaluation")
    assert torch.equal(read_omniglot(str(root)), expected)
    pack(root, "images_background")
    assert torch.equal(read_omniglot(str(root)), expected)


def test_torchvisions_layout_is_found(tmp_path):
    root = write_omniglot(tmp_path / "omniglot-py", {"images_background/Greek": 3, "images_evaluation/Aurek": 2}, 2)
    pack(root, "images_evaluation")
    assert torch.equal(read_omniglot(str(tmp_path)), read_omniglot(str(root)))


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])
    return str(path), "not a whole zip"


def _damaged(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("images_background/Latin/character02/0005_01.png")
    content[info.header_offset + 80] ^= 1
    path.write_bytes(content)
    return f"{path}/Latin/character02/0005_01.png", "not a picture"


def _without_an_alphabets_characters(path):
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("images_background/Klingon/", "")
    return f"{path}/Klingon", "no characterNN folders"


def _no_omniglot(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cats/1.png", "")
    return str(path.parent), "no images_background/ALPHABET/characterNN/ folders"


@pytest.mark.parametrize("breaks", [_cut_short, _damaged, _without_an_alphabets_characters, _no_omniglot])
def test_a_broken_zip_is_a_value_error_that_names_the_place(breaks, tmp_path):
    root = write_omniglot(tmp_path / "data", {"images_background/Greek": 3, "images_background/Latin": 4}, 2)
    pack(root, "images_background")
    place, words = breaks(root / "images_background.zip")
    with pytest.raises(ValueError, match=words) as error:
        read_omniglot(str(root))
    assert str(error.value).startswith(place)
    assert refusal("Omniglot-v0", 2, 2, str(root)) == f"--data {error.value}"


@pytest.fixture
def makes(tmp_path, monkeypatch):
    """Keeps a tensor under a source, and tells whether it had to be made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def keep(source, value, beside=None):
        made = []
        images = cached("x.pt", source, lambda: made.append(1) or torch.full((2, 3), value, dtype=torch.uint8), beside)
        return images.flatten().tolist(), bool(made)

    return keep


def test_what_is_kept_is_used_while_it_is_whole_and_of_the_same_source(makes, tmp_path):
    ones, twos = [1] * 6, [2] * 6
    assert makes("a", 1, tmp_path) == (ones, True)
    assert makes("a", 2, tmp_path) == (ones, False)
    assert makes("b", 2, tmp_path) == (twos, True)
    assert makes("b", 1, tmp_path) == (twos, False)
    assert not (tmp_path / "home").exists()
    path = tmp_path / "x.pt"
    whole = path.read_bytes()
    position = whole.rindex(b"\2\2\2\2\2\2")
    for broken in (whole[:-100], b"", b"nonsense", whole[:position] + b"\3" + whole[position + 1 :]):
        path.write_bytes(broken)
        assert makes("b", 2, tmp_path) == (twos, True)
        assert makes("b", 1, tmp_path) == (twos, False)


def test_where_nothing_can_be_written_the_home_keeps_it_or_nothing_does(makes, tmp_path):
    (tmp_path / "file").write_bytes(b"")  # no folder: nothing can be written there, not even by root
    assert makes("a", 1, tmp_path / "file") == ([1] * 6, True)
    assert (tmp_path / "home/cleanmeta/x.pt").exists()
    assert makes("a", 2, tmp_path / "file") == ([1] * 6, False)
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_bytes(b"")
    assert makes("a", 2, tmp_path / "file") == ([2] * 6, True)


@pytest.mark.parametrize("packed", [False, True])
def test_omniglots_second_start_reads_what_the_first_one_kept_unless_a_file_has_changed(packed, tmp_path, monkeypatch):
    root = write_omniglot(tmp_path, {"images_background/Greek": 3, "images_evaluation/Aurek": 3}, 2)
    if packed:
        pack(root, "images_background")
        pack(root, "images_evaluation")
    reads = []
    monkeypatch.setattr(fewshot, "read_omniglot", lambda data: reads.append(data) or read_omniglot(data))
    first = Omniglot(str(root), 2).images
    assert torch.equal(Omniglot(str(root), 2).images, first)
    assert len(reads) == 1
    before = stamp(str(root))
    changed = root / "images_evaluation.zip" if packed else next(root.rglob("*.png"))
    os.utime(changed, ns=(0, 0))
    assert stamp(str(root)) != before
    assert torch.equal(Omniglot(str(root), 2).images, first)
    assert len(reads) == 2


def test_glyphs_are_drawn_once(monkeypatch):
    drawn = []

    def draw(classes, instances, generator, device):
        drawn.append(classes)
        return torch.randint(256, (classes, instances, 28, 28), generator=generator, dtype=torch.uint8)

    monkeypatch.setattr(fewshot, "draw_glyphs", draw)
    first, again, other = Glyphs().images, Glyphs().images, Glyphs(seed=1).images
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert drawn == [1623, 1623]
