"""Augmentation: what each change does to an example, where its draws come from, and what is refused."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedtrain.data.base import Examples
from fedtrain.errors import ExperimentError
from fedtrain.experiment import load
from fedtrain.experiment.augment import AugmentationSection, objections, unsuited
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import exchanged, snapshot
from fedtrain.privacy.accounting import Spend
from fedtrain.seeds import generator
from fedtrain.training.augment import Augmenter
from fedtrain.training.batches import Batch
from fedtrain.training.loop import Assignment, Recipe, Trainer

KINDS = ["flip", "crop", "rotate", "colour", "noise", "erase", "mask", "replace", "mixup", "cutmix"]
SECTIONS = TypeAdapter(list[AugmentationSection])
IMAGES = torch.randn(64, 3, 8, 6, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(400, 30, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(200 * 20).view(200, 20)


def sections(*written):
    return SECTIONS.validate_python(list(written))


def augmenter(*written, stream=0, **options) -> Augmenter:
    return Augmenter(sections(*written), generator(0, stream), **options)


def changed(inputs, name, **options):
    before = inputs.clone()
    found = augmenter({"name": name, **options}).inputs(inputs)
    assert torch.equal(inputs, before), "the examples themselves must not change"
    return found


def test_a_bare_name_stands_for_its_defaults():
    assert sections("crop", "noise") == sections({"name": "crop", "padding": 4}, {"name": "noise", "std": 0.1})
    with pytest.raises(ValidationError, match="flop"):
        sections("flop")


def test_an_unknown_name_is_a_fault_of_the_file(tiny):
    with pytest.raises(ExperimentError) as caught:
        load(tiny, ['training.augment=["flip", "crpo"]'])
    (fault,) = caught.value.faults
    assert (fault.path, fault.got) == ("training.augment[1].name", '"crpo"')
    assert "Did you mean crop?" in fault.hint


@pytest.mark.parametrize(("axis", "dim"), [("horizontal", 3), ("vertical", 2)])
def test_flip_mirrors_some_examples_and_leaves_the_others(axis, dim):
    found = changed(IMAGES, "flip", axis=axis)
    mirrored = [bool(torch.equal(f, x.flip(dim - 1))) for f, x in zip(found, IMAGES)]
    untouched = [bool(torch.equal(f, x)) for f, x in zip(found, IMAGES)]
    assert all(a != b for a, b in zip(mirrored, untouched))
    assert 16 < sum(mirrored) < 48  # of 64; four deviations
    assert torch.equal(changed(IMAGES, "flip", axis=axis, probability=1.0), IMAGES.flip(dim))


def test_crop_is_a_window_of_the_mirrored_image():
    found = changed(IMAGES, "crop", padding=2)
    padded = nn.functional.pad(IMAGES, (2, 2, 2, 2), mode="reflect")
    places = []
    for f, p in zip(found, padded):
        here = [(y, x) for y in range(5) for x in range(5) if torch.equal(f, p[:, y : y + 8, x : x + 6])]
        assert len(here) == 1
        places += here
    assert {y for y, _ in places} == {x for _, x in places} == set(range(5))


def test_rotate_turns_by_an_angle_of_its_own():
    # Of a quarter turn, torch.rot90 knows every pixel; 90 degrees are drawn by a generator that gives the bound.
    class Bound:
        def uniform(self, low, high, size):
            return np.full(size, high)

    square = IMAGES[:, :, :6]
    found = Augmenter(sections({"name": "rotate", "degrees": 90.0}), Bound()).inputs(square)
    torch.testing.assert_close(found, torch.rot90(square, 1, (2, 3)), rtol=1e-4, atol=1e-5)
    half = Augmenter(sections({"name": "rotate", "degrees": 180.0}), Bound()).inputs(IMAGES)
    torch.testing.assert_close(half, IMAGES.flip(2, 3), rtol=1e-4, atol=1e-5)
    # Off the square, a line through the centre keeps its slope in pixels.
    wide = torch.zeros(1, 1, 33, 65)
    wide[..., 16, :] = 1
    turned = Augmenter(sections({"name": "rotate", "degrees": 45.0}), Bound()).inputs(wide)[0, 0]
    assert all(turned[16 - offset, 32 + offset] > 0.9 for offset in range(-10, 11))


def test_colour_shifts_and_stretches_as_drawn():
    bright = changed(IMAGES, "colour", brightness=0.5, contrast=0.0) - IMAGES
    assert float(bright.flatten(1).std(1).max()) < 1e-6
    shifts = bright.mean((1, 2, 3))
    assert 0.35 < float(shifts.max()) <= 0.5
    assert -0.5 <= float(shifts.min()) < -0.35
    contrast = changed(IMAGES, "colour", brightness=0.0, contrast=0.4)
    torch.testing.assert_close(contrast.mean((1, 2, 3)), IMAGES.mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    factors = contrast.flatten(1).std(1) / IMAGES.flatten(1).std(1)
    assert 0.6 <= float(factors.min()) < 0.75 < 1.25 < float(factors.max()) <= 1.4
    grey = IMAGES[:, :1].expand(-1, 3, -1, -1).clone()
    torch.testing.assert_close(changed(grey, "colour", brightness=0.0, contrast=0.0, saturation=1.0), grey)


def test_noise_has_the_given_deviation():
    noise = changed(TABLE, "noise", std=0.3) - TABLE
    assert float(noise.std()) == pytest.approx(0.3, rel=4.9 / math.sqrt(2 * noise.numel()))
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.9  # each example has its own


def test_erase_clears_one_rectangle():
    pictures = torch.ones(300, 1, 20, 30)
    cleared = changed(pictures, "erase", probability=0.5, area=0.4)[:, 0] == 0
    hit = cleared.flatten(1).any(1)
    assert 100 < int(hit.sum()) < 200
    shares = cleared[hit].double().mean((1, 2))
    assert 0.01 < float(shares.min()) < 0.05
    assert 0.35 < float(shares.max()) < 0.44  # sides are whole pixels
    for one in cleared[hit]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns)
        assert int(rows.int().diff().abs().sum()) <= 2  # without a gap
    borders = cleared[:, 0], cleared[:, -1], cleared[:, :, 0], cleared[:, :, -1]
    assert all(border.any() for border in borders)


def test_mask_sets_the_given_share_to_zero():
    found = changed(TABLE, "mask", share=0.2)
    gone = found == 0
    assert torch.equal(found[~gone], TABLE[~gone])
    assert float(gone.double().mean()) == pytest.approx(0.2, abs=4.9 * 0.4 / math.sqrt(TABLE.numel()))


def test_replace_draws_from_the_same_text():
    found = changed(TOKENS, "replace", share=0.3)
    assert found.dtype == torch.int64
    assert torch.equal(found // 20, TOKENS // 20)  # tokens of row i are 20 i to 20 i + 19
    share = float((found != TOKENS).double().mean())
    assert share == pytest.approx(0.3 * 19 / 20, abs=4.9 * 0.46 / math.sqrt(TOKENS.numel()))


def test_mixup_mixes_inputs_as_the_loss_is_mixed():
    inputs, targets = torch.eye(50), torch.arange(50)
    mixed = augmenter({"name": "mixup", "alpha": 1.0}).batch(Batch(inputs, targets))
    assert torch.equal(mixed.targets, targets)
    assert sorted(mixed.mixed.tolist()) == list(range(50))
    expected = torch.zeros(50, 50)
    for row, (own, other, share) in enumerate(zip(targets, mixed.mixed, mixed.share)):
        expected[row, own] += share
        expected[row, other] += 1 - share
    torch.testing.assert_close(mixed.inputs, expected)
    assert float(mixed.share.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.08)  # Beta(1, 1) is uniform


def test_cutmix_pastes_a_rectangle_and_mixes_by_its_area():
    inputs = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 12, 10)
    mixed = augmenter("cutmix").batch(Batch(inputs, torch.arange(40)))
    own = mixed.inputs == inputs
    assert torch.equal(mixed.inputs[~own], mixed.mixed.view(-1, 1, 1, 1).expand_as(inputs)[~own].float())
    others = mixed.mixed != mixed.targets
    torch.testing.assert_close(mixed.share[others], own.float().mean((1, 2, 3))[others])
    assert float(mixed.share.min()) < 0.4 < 0.9 < float(mixed.share.max())


def test_changes_follow_each_other_in_the_lists_order():
    shifted = augmenter({"name": "colour", "brightness": 9.0, "contrast": 0.0}, {"name": "erase", "probability": 1.0})
    assert (shifted.inputs(IMAGES) == 0).any()
    erased = augmenter({"name": "erase", "probability": 1.0}, {"name": "colour", "brightness": 9.0, "contrast": 0.0})
    assert not (erased.inputs(IMAGES) == 0).any()


@pytest.mark.parametrize("name", KINDS)
def test_the_same_stream_gives_the_same_bytes(name):
    inputs = {"mask": TABLE, "replace": TOKENS}.get(name, IMAGES)
    batch = Batch(inputs, torch.arange(len(inputs)))
    first, again, other = (augmenter(name, stream=stream).batch(batch) for stream in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs)
    assert (first.inputs.dtype, first.inputs.shape) == (inputs.dtype, inputs.shape)
    assert not torch.equal(first.inputs, other.inputs)


def test_images_keep_the_models_layout():
    found = augmenter("crop", "rotate", "mixup", layout=torch.channels_last).batch(Batch(IMAGES, torch.arange(64)))
    assert found.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("written", "shape", "tokens", "why"),
    [
        ("crop", (30,), False, '"crop" is for images, and the data\'s inputs are features'),
        ("cutmix", (30,), False, '"cutmix" is for images'),
        ("mask", (1, 8, 8), False, '"mask" is for features, and the data\'s inputs are images'),
        ("noise", (80,), True, '"noise" is for numbers, and the data\'s inputs are tokens'),
        ("replace", (30,), False, '"replace" is for tokens'),
        ({"name": "crop", "padding": 8}, (1, 8, 9), False, "padding = 8, and the images are 8 x 9 pixels"),
        ({"name": "colour", "saturation": 0.1}, (1, 8, 8), False, "needs 3 channels, and images have 1"),
        ("noise", (30,), False, ""),
        ("mixup", (128, 3), False, ""),
        ({"name": "colour", "saturation": 0.1}, (3, 8, 8), False, ""),
    ],
)
def test_inputs_of_another_kind_are_refused(written, shape, tokens, why):
    found = unsuited(sections(written), shape, tokens)
    assert why in found
    assert bool(found) == bool(why)


PRIVATE = ["privacy.delta=1e-5", "privacy.noise_multiplier=1.0", "data.test=0.0"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (['training.augment=["mixup", "flip"]'], "as its last"),
        (['training.augment=["mixup", "cutmix"]'], "as its last"),
        (['training.augment=["flip", "mixup"]'], None),
        (['training.augment=["mixup"]', "training.balance=weight"], 'take "oversample"'),
        ([*PRIVATE, 'training.augment=["mixup"]'], "mixes examples"),
        ([*PRIVATE, "privacy.augmentations=4"], "privacy.augmentations = 4 needs training.augment"),
        ([*PRIVATE, "privacy.augmentations=4", 'training.augment=["flip"]'], None),
    ],
)
def test_what_does_not_go_together_is_said(tiny, overrides, why):
    try:
        found = " ".join(objections(load(tiny, overrides)))
    except ExperimentError as error:
        found = str(error)
    assert why in found if why else found == ""


class Pictures:
    """A linear model of images that tells the mean of what it was shown."""

    def __init__(self) -> None:
        self.seen = []

    def model(self):
        class Watching(nn.Module):
            def __init__(self, seen):
                super().__init__()
                self.linear, self.seen = nn.Linear(64, 3), seen

            def forward(self, x):
                self.seen.append(x.detach().clone())
                return self.linear(x.flatten(1))

        return Watching(self.seen)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def metrics(self):
        return {}


def trained(augment, seed=0, privacy=None, evaluate=False):
    task = Pictures()
    training = TrainingSection(augment=sections(*augment), batch_size=8)
    trainer = Trainer(task, Recipe(training, privacy=privacy), seed, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    examples = Examples(torch.randn(20, 1, 8, 8, generator=rng), torch.randint(3, (20,), generator=rng))
    charge = Spend(1.0, 0.5, 3) if privacy else None
    assignment = Assignment(2, "c", snapshot(exchanged(trainer.model)), charge=charge)
    result = trainer.train(assignment, examples).delta
    if evaluate:
        trainer.personalize(assignment, examples, 1)
    return result, task.seen, examples


def test_training_sees_augmented_examples_drawn_from_the_named_stream():
    first, seen, examples = trained(["noise", "flip"])
    again = trained(["noise", "flip"])[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    plain, seen_plain, _ = trained([])
    assert all(not torch.equal(first[name], plain[name]) for name in first)
    assert {tuple(x.flatten().tolist()) for batch in seen_plain for x in batch} == {
        tuple(x.flatten().tolist()) for x in examples.inputs
    }
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen_plain))


def test_mixup_trains_and_fine_tuning_augments_too():
    result, seen, examples = trained(["mixup"], evaluate=True)
    assert all(bool(delta.isfinite().all()) and bool(delta.any()) for delta in result.values())
    assert len(seen) == 6  # three steps of the round, three of fine-tuning
    known = {tuple(x.flatten().tolist()) for x in examples.inputs}
    for batch in seen:
        assert any(tuple(x.flatten().tolist()) not in known for x in batch)


def test_private_draws_follow_from_the_noise_seed_alone():
    def of(seed, noise_seed):
        privacy = SamplePrivacy(noise_multiplier=1.0, delta=1e-5, noise_seed=noise_seed, augmentations=3)
        return trained(["noise"], seed, privacy)[1]

    first, again, other_run = of(0, 5), of(1, 5), of(0, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other_run))
    secret, secret_again = of(0, None), of(0, None)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(secret, secret_again))
    assert all(len(batch) % 3 == 0 for batch in first[-3:])  # three copies of each example
