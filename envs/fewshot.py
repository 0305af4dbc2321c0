"""Few-shot image classification: tell N new characters apart after seeing K drawings of each.

`Glyphs` draws its characters itself, from a seed; `Omniglot` reads the real ones from a folder.
"""

import hashlib
import inspect
import math
from pathlib import Path

import torch
from torch import Generator, Tensor

from .core import SupervisedTasks
from .files import cached
from .omniglot import CLASSES, SIDE, read_omniglot, stamp

INSTANCES = 20  # drawings of each of Omniglot's characters
TRAIN_CLASSES, VALID_CLASSES = 1100, 100  # of Omniglot's 1,623 characters; the 423 others are the test's
STROKES, CONTROLS, SAMPLES = 4, 5, 16  # of a glyph at most; points a stroke runs through; curve points between two


class FewShot(SupervisedTasks):
    """N-way K-shot tasks on images [classes, instances, 28, 28] (uint8, ink 255).

    Input: a picture [784], ink 1 on 0. Target: its class within the task, one-hot [ways].
    Tasks: the classes [ways], all different. The first 1100 / 1623 of the classes are for training, and so are they
    rotated by 90, 180 and 270 degrees, as classes of their own. Unrotated are the next 100 / 1623, to choose step sizes
    and the like by ("valid"), and the others ("test"): as many of each as in cbfinn/maml's `data_generator.py`.
    Differs: its validation and test classes are rotated at random, too (openai/supervised-reptile: not).
    """

    num_inputs, is_classification = SIDE * SIDE, True

    def __init__(self, images: Tensor, ways: int = 5, device="cpu", dtype=torch.float32):
        super().__init__(device, dtype)
        trained, validated, tested = split_sizes(len(images))
        if not 2 <= ways <= tested:
            raise ValueError(f"--ways {ways}: allowed is 2 to {tested}, the test classes")
        self.num_outputs = ways
        rotated = [torch.rot90(images[:trained], turns, (2, 3)) for turns in range(4)]
        self.images = torch.cat([*rotated, images[trained:]]).flatten(2).to(device)  # [classes, instances, 784]
        ends = 4 * trained, 4 * trained + validated, len(self.images)
        self.classes = {"train": (0, ends[0]), "valid": (ends[0], ends[1]), "test": (ends[1], ends[2])}

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in self.classes:
            raise ValueError(f'split must be "train", "valid" or "test", got {split!r}')
        first, last = self.classes[split]
        if self.num_outputs > last - first:
            raise ValueError(f"--ways {self.num_outputs}: allowed is 2 to {last - first}, the {split} classes")
        drawn = torch.rand(num_tasks, last - first, generator=generator).topk(self.num_outputs).indices
        return (first + drawn).to(self.device)

    def sample(self, tasks, sizes, generator):
        """As in the base class, with `sizes` per class: ways * size pictures a set, ordered by instance, then class."""
        (N, ways), instances = tasks.shape, self.images.shape[1]
        if sum(sizes) > instances:
            raise ValueError(f"{sum(sizes)} drawings of each class are asked for, there are {instances}")
        order = torch.rand(N, ways, instances, generator=generator).argsort(-1)[..., : sum(sizes)]
        chosen = self.images[tasks[..., None], order.to(self.device)]  # [N, ways, sum(sizes), 784]
        x = (chosen.transpose(1, 2).to(self.dtype) / 255).flatten(1, 2)
        y = torch.eye(ways, dtype=torch.bool, device=self.device).repeat(sum(sizes), 1).expand(N, -1, -1)
        counts = [ways * size for size in sizes]
        return list(zip(x.split(counts, 1), y.split(counts, 1), strict=True))


class Glyphs(FewShot):
    """Characters drawn procedurally, in Omniglot's numbers: 1,623 classes of 20 drawings; nothing is downloaded.

    Source: ours; it stands in for Omniglot (Lake et al. 2015). A class is a set of 1 to 4 smooth strokes through random
    points; a drawing of it jitters the points, shifts the strokes, and applies a random affine map and pen width.
    Input, target, tasks: those of `FewShot`, in the order in which they are drawn: training has classes 0 to 1,099,
    validation the next 100, the test the last 423.
    """

    def __init__(self, ways=5, device="cpu", dtype=torch.float32, classes=CLASSES, instances=INSTANCES, seed=0):
        def draw() -> Tensor:
            return draw_glyphs(classes, instances, Generator().manual_seed(seed), device).cpu()

        # What could change a pixel: the numbers, the code that draws, torch, and the kind of device.
        code = hashlib.sha256(Path(inspect.getfile(draw_glyphs)).read_bytes()).hexdigest()
        source = f"{classes} {instances} {seed} {code} {torch.__version__} {torch.device(device).type}"
        images = cached("glyphs_28x28.pt", source, draw) if classes == CLASSES else draw()
        super().__init__(images, ways, device, dtype)


class Omniglot(FewShot):
    """Handwritten characters of 50 alphabets: 1,623 classes of 20 drawings (Lake et al. 2015).

    Source: github.com/brendenlake/omniglot, python/images_background.zip and images_evaluation.zip: `data` is the
    folder of these zips, or of what they hold, images_background/ALPHABET/characterNN/XXXX_NN.png, or one that has
    either in omniglot-py/, as torchvision and learn2learn leave it. The pictures, 28 x 28, are kept in
    omniglot_28x28.pt beside them, so that the next start is quick.
    Input, target, tasks: those of `FewShot`: 1,100 characters for training, 100 for validation, 423 for the test (of a
    part of the data set: the same shares), in the order of `torch.randperm` with seed 0 of all characters by name.
    Differs: cbfinn/maml shuffles what os.listdir gives, by Python's random with seed 1; since the order of that depends
    on the file system, which characters it has is not known. openai/supervised-reptile has 1,200 and 423.
    """

    def __init__(self, data: str, ways=5, device="cpu", dtype=torch.float32):
        images = cached("omniglot_28x28.pt", stamp(data), lambda: read_omniglot(data), beside=Path(data))
        images = images[torch.randperm(len(images), generator=Generator().manual_seed(0))]
        super().__init__(images, ways, device, dtype)


def split_sizes(classes: int) -> tuple[int, int, int]:
    """How many of so many classes are for training, validation and the test: Omniglot's shares, rounded."""
    trained = round(classes * TRAIN_CLASSES / CLASSES)
    validated = round(classes * (TRAIN_CLASSES + VALID_CLASSES) / CLASSES) - trained
    return trained, validated, classes - trained - validated


# ---------------------------------------------------------------- drawing


def draw_glyphs(classes: int, instances: int, generator: Generator, device="cpu") -> Tensor:
    """Pictures [classes, instances, 28, 28] (uint8) of random characters; the picture's side is the unit of length."""

    def normal(std, *shape):
        return std * torch.randn(classes, instances, *shape, generator=generator)

    controls, drawn = _characters(classes, generator)
    controls = controls[:, None] + normal(0.03, STROKES, CONTROLS, 2) + normal(0.03, STROKES, 1, 2)
    angle, shear, scale = normal(math.radians(13)), normal(0.2), 1 + normal(0.14, 2)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    slant = torch.stack([one, shear, zero, one], -1).unflatten(-1, (2, 2))
    affine = (turn @ slant @ torch.diag_embed(scale))[:, :, None]  # [classes, instances, 1, 2, 2]
    controls = (controls - 0.5).flatten(2, 3) @ affine[:, :, 0].mT + 0.5 + normal(0.05, 1, 2)
    curves = catmull_rom(controls.unflatten(2, (STROKES, CONTROLS)))
    curves = torch.where(drawn[:, None, :, None, None], curves, 9.0).flatten(2, 3).flatten(0, 1)  # 9: off the paper
    pen = 0.022 + 0.012 * torch.rand(classes * instances, generator=generator)
    parts = zip(curves.to(device).split(512), pen.to(device).split(512), strict=True)
    return torch.cat([render_strokes(*part) for part in parts]).view(classes, instances, SIDE, SIDE)


def _characters(classes: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Control points [classes, strokes, 5, 2] of random characters, and which strokes they have [classes, strokes]."""
    count = 1 + torch.multinomial(torch.tensor([0.2, 0.35, 0.3, 0.15]), classes, True, generator=generator)
    drawn = torch.arange(STROKES) < count[:, None]
    start = 0.2 + 0.6 * torch.rand(classes, STROKES, 1, 2, generator=generator)
    heading = 2 * math.pi * torch.rand(classes, STROKES, 1, generator=generator)
    turns = 0.9 * torch.randn(classes, STROKES, CONTROLS - 2, generator=generator)
    heading = torch.cat([heading, turns], -1).cumsum(-1)
    length = 0.08 + 0.18 * torch.rand(classes, STROKES, CONTROLS - 1, generator=generator)
    steps = length[..., None] * torch.stack([heading.cos(), heading.sin()], -1)
    controls = torch.cat([start, start + steps.cumsum(-2)], -2)
    points, absent = controls.flatten(1, 2), ~drawn.repeat_interleave(CONTROLS, 1)[..., None]
    low = points.masked_fill(absent, math.inf).amin(1)
    high = points.masked_fill(absent, -math.inf).amax(1)
    scale = 0.76 / (high - low).amax(-1)  # the larger side of the character's box
    return 0.5 + (controls - (low + high)[:, None, None] / 2) * scale[:, None, None, None], drawn


def catmull_rom(controls: Tensor) -> Tensor:
    """Points [.., 4 * 16 + 1, 2] of the curves that run smoothly through control points [.., 5, 2]."""
    ends = 2 * controls[..., [0, -1], :] - controls[..., [1, -2], :]
    p = torch.cat([ends[..., :1, :], controls, ends[..., 1:, :]], -2)[..., None, :]
    p0, p1, p2, p3 = (p[..., i : i + CONTROLS - 1, :, :] for i in range(4))
    t = torch.arange(SAMPLES, dtype=controls.dtype)[:, None] / SAMPLES
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return torch.cat([curve.flatten(-3, -2), controls[..., -1:, :]], -2)


def render_strokes(points: Tensor, pen: Tensor) -> Tensor:
    """Pictures [B, 28, 28] (uint8): sigmoid(140 (pen half-width [B] - distance to the nearest of points [B, P, 2])).

    The distance is a smooth minimum, -log sum exp(-beta d^2) / beta: its terms are products of one factor for x and one
    for y, so that all pixels together are one matrix product.
    """
    beta = 2e4
    centres = (torch.arange(SIDE, device=points.device) + 0.5) / SIDE
    x, y = (points[..., None] - centres).square().mul(-beta).clamp_min(-80).exp().unbind(2)  # [B, P, 28] each
    near = y.mT @ x
    distance = (-torch.log(near) / beta).clamp_min(0).sqrt().masked_fill(near < 1e-32, math.inf)  # beyond 0.06
    return (255 * torch.sigmoid(140 * (pen[:, None, None] - distance))).round().to(torch.uint8)
